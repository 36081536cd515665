"""An audit with images that the generator makes, and with others."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gbc.artifacts import save_network
from gbc.audit import SHOWN, audit, main
from gbc.generator import Generator, Mixture
from gbc.params import InputError


def generator(shape: tuple[int, ...] = (12, 12)) -> Mixture:
    """Two random members of four anchors for each of the labels 0 and 3; without noise, so that its bank is all that it makes."""
    parts = [Generator(((0, 3),), shape, noise=3, anchors=4, spread=0.0, width=16, channels=8) for _ in range(2)]
    return Mixture.of([part.initialise(torch.Generator().manual_seed(k)) for k, part in enumerate(parts)]).eval()


def write(path: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(path, images=x, labels=y)
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A generator, a training set of which all but every fourth image is made by it, and controls that are noise."""
    g = generator()
    save_network(tmp_path / "g", g)
    x, y = (part.numpy().copy() for part in g.bank())
    noise = np.random.default_rng(0).random(x.shape, dtype=np.float32)
    x[::4] = noise[::4]
    return tmp_path / "g", write(tmp_path / "train.npz", x, y), write(tmp_path / "control.npz", np.random.default_rng(1).random(x.shape), y)


def test_what_the_generator_makes_is_found_and_what_it_does_not_is_not(files: tuple[Path, Path, Path]):
    scores, table, pictures = audit(*files, count=400, seed=0)
    assert list(scores) == ["generated", "training", "class_mean", "untrained"]
    assert scores["generated"]["leak_60"] == 0.75
    assert scores["generated"]["train_control_auc"] == pytest.approx(0.875, abs=0.1)
    best = table.loc[table["images"] == "train", "ssim"].to_numpy()
    assert best[np.arange(16) % 4 > 0].min() > 0.999
    assert best[::4].max() < 0.6
    assert table["images"].value_counts().to_dict() == {"train": 16, "control": 16}
    found = pictures["train"].shape[0]
    assert found == min(SHOWN, 16)
    assert torch.equal(pictures["train"][:12], pictures["generated"][:12])
    assert not torch.equal(pictures["train"][12:], pictures["generated"][12:])


def test_what_does_not_fit_the_generator_is_refused(files: tuple[Path, Path, Path], tmp_path: Path):
    artifact, train, control = files
    two = np.zeros(2, dtype=int)
    refused = {
        write(tmp_path / "large.npz", np.zeros((2, 14, 12)), two): "images of shape [14, 12], but",
        write(tmp_path / "strange.npz", np.zeros((2, 12, 12)), two + 5): "label 5 is unknown to",
        tmp_path / "nothing.npz": "not an npz file",
    }
    for path, message in refused.items():
        with pytest.raises(InputError, match=re.escape(f"{path.name}: {message}")):
            audit(artifact, path, control, 10, 0)
        with pytest.raises(InputError, match=re.escape(f"{path.name}: {message}")):
            audit(artifact, train, path, 10, 0)
    with pytest.raises(InputError, match=r"control.npz: some of its images are in .*train.npz too"):
        with np.load(train) as seen, np.load(control) as unseen:
            audit(artifact, train, write(control, np.concatenate([unseen["images"][1:], seen["images"][:1]]), seen["labels"]), 10, 0)
    for k, shape in enumerate([(8, 8), (2,)]):
        save_network(tmp_path / f"small{k}", generator(shape))
        with pytest.raises(InputError, match=re.escape(f"samples have shape {list(shape)}; scores by SSIM need 11×11")):
            audit(tmp_path / f"small{k}", train, control, 10, 0)


def test_a_generator_that_makes_no_numbers_is_not_taken_for_one_that_gives_nothing_away(files: tuple[Path, Path, Path]):
    g = generator()
    g.parts[1].centres.fill_(torch.nan)
    save_network(files[0], g)
    with pytest.raises(InputError, match="its training diverged"):
        audit(*files, count=10, seed=0)


def test_the_command_prints_the_scores_and_writes_a_picture_and_a_table(
    files: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["audit", str(files[0]), "--train", str(files[1]), "--control", str(files[2]), "--out", str(tmp_path / "audit"), "--count"]
    monkeypatch.setattr(sys, "argv", [*command, "400"])
    main()
    assert re.search(r"^generated .* 0\.750$", capsys.readouterr().out, re.MULTILINE)
    assert len(pd.read_csv(tmp_path / "audit/ssim.csv")) == 32
    with Image.open(tmp_path / "audit/found.png") as picture:
        assert picture.size[0] > 100
    monkeypatch.setattr(sys, "argv", [*command, "0"])
    with pytest.raises(SystemExit, match="error: count=0 is less than 1"):
        main()
