"""Files between stages: whole or not at all, equal bytes for equal contents, one clear line when damaged."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from gbc.artifacts import load_json, load_table, load_tensors, save_json, save_table, save_tensors
from gbc.params import InputError


def test_tensors_survive_and_their_bytes_do_not_depend_on_order(tmp_path: Path):
    a, b = torch.arange(6).reshape(2, 3), torch.rand(4)
    save_tensors(tmp_path / "one", {"a": a, "b": b})
    save_tensors(tmp_path / "two", {"b": b, "a": a})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_tensors(tmp_path / "one")
    assert torch.equal(loaded["a"], a)
    assert torch.equal(loaded["b"], b)


def test_a_truncated_file_is_one_line_that_names_it(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.rand(100)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"weights.safetensors: not a whole safetensors file") as error:
        load_tensors(path)
    assert "\n" not in str(error.value)


def test_missing_files_say_how_to_get_them(tmp_path: Path):
    for load in (load_tensors, load_json, load_table):
        with pytest.raises(InputError, match="dvc pull"):
            load(tmp_path / "none")


def test_json_is_sorted_and_refuses_nan(tmp_path: Path):
    save_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    assert load_json(tmp_path / "a.json") == {"a": [2], "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json(tmp_path / "a.json", float("nan"))
    assert load_json(tmp_path / "a.json") == {"a": [2], "b": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_json(tmp_path / "a.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_json(tmp_path / "a.json", 1)

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_json(tmp_path / "a.json", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert load_json(tmp_path / "a.json") == 1


def test_tables_survive(tmp_path: Path):
    table = pd.DataFrame({"step": [0, 1], "loss": [0.5, 1e-9]})
    save_table(tmp_path / "t.csv", table)
    pd.testing.assert_frame_equal(load_table(tmp_path / "t.csv"), table)
    for damaged in (b"", b"\xff\xfe\x00", b"a,b\n1,2,3\n4\n5,6,7,8\n"):
        (tmp_path / "t.csv").write_bytes(damaged)
        with pytest.raises(InputError, match="t.csv: not a CSV table"):
            load_table(tmp_path / "t.csv")
