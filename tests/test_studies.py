"""Studies of a tiny task: each term off in turn, other sizes."""

import copy
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from gbc.generator import Pixels
from gbc.params import InputError, Params, TrainParams, load_params
from gbc.studies import PIXELS, SEEDS, SIZES, VARIANTS, ablate, alone, collect, pixels, rival, scale, subject
from gbc.training import FIT_STEPS, PIXEL_RATE
from tests.tiny import ROOT, clone, run

TINY = [
    "sample.faces.per_class=10",
    "pretrain.faces.hidden=[12,8]",
    "pretrain.faces.max_steps=20",
    "pretrain.faces.settle_steps=5",
    "train_single.faces.anchors=4",
    "train_single.faces.batch=12",
    "train_single.faces.length=1",
    "train_single.faces.polish=0",
    "generator.noise=4",
    "generator.width=16",
    "generator.channels=8",
    "evaluate.samples=40",
    "steps=4",
]


def tiny(*overrides: str) -> Params:
    return load_params([*TINY, *overrides])


def faces(*overrides: str) -> tuple[Params, TrainParams]:
    params = tiny(*overrides)
    return params, params.train["faces"]


def test_every_term_is_switched_off_once_and_what_is_known_is_not_made_again():
    known = {"statistics off", "collapse off", "learned multipliers", "smooth gate off", "total variation off", "duality off"}
    rows = {row["variant"]: row for row in ablate(*faces("seed=1"), known)}
    assert set(rows) == {*VARIANTS, PIXELS} - known
    assert all(row["seed"] == 1 for row in rows.values())
    assert {row["steps"] for variant, row in rows.items() if variant != PIXELS} == {4}
    assert rows["all terms"]["kkt_residual"] != rows["stationarity off"]["kkt_residual"]
    assert list(ablate(*faces("seed=1"), {*VARIANTS, PIXELS})) == []


def test_a_task_alone_has_one_member_and_no_polish():
    _, task = faces("+train_single.faces.members=2", "train_single.faces.polish=1", "train_single.faces.gate=7")
    assert (alone(task).members, alone(task).polish, alone(task).gate) == (1, 0, 7)


def test_a_variant_that_repeats_another_is_left_out():
    off = ["train_single.faces.statistics=0", "train_single.faces.collapse=0", "train_single.faces.multiplier=relu"]
    known = {"all terms", "duality off", "total variation off", "smooth gate off", PIXELS}
    assert [row["variant"] for row in ablate(*faces(*off), known)] == ["stationarity off"]


def test_pixels_are_as_many_draws_as_there_are_members_and_polish_counts_as_theirs():
    params, task = faces("+train_single.faces.members=2", "train_single.faces.polish=1", "seed=1")
    parents = [subject(params, "faces")]
    first, second = pixels(params, task, parents)
    assert isinstance(first.generator, Pixels)
    one, other = (draw.generator.bank()[0] for draw in (first, second))
    assert one.shape == other.shape == (2 * 4, 25, 25)
    assert not torch.equal(one, other)
    assert first.history["step"].iloc[-1] == second.history["step"].iloc[-1]
    assert list(rival(params, task, {PIXELS})) == []
    (row,) = rival(params, alone(task), set())
    assert (row["variant"], row["seed"]) == (PIXELS, 1)
    assert row["steps"] < first.history["step"].iloc[-1]


def test_sizes_change_the_dataset_the_batch_and_the_classifier():
    known = {f"{images} per class, width × {factor:g}" for images, factor in SIZES[1:-1]}
    small, wide = scale(*faces(), known)
    assert (small["images"], small["width"], wide["images"], wide["width"]) == (20, 1.0, 40, 2.0)
    assert small["weights_per_pixel"] == (625 * 12 + 12 * 8 + 8 * 2 + 3 * (12 + 8) - 12 - 8) / (20 * 625)


def test_a_study_goes_on_where_it_was_stopped_with_the_same_parameters(tmp_path):
    path, made = tmp_path / "study.csv", []
    polished = faces("+train_single.faces.members=2", "train_single.faces.polish=1")

    def study(params: Params, task: TrainParams, known: set[str]) -> Iterator[dict[str, Any]]:
        for variant in sorted({"a", "b"} - known):
            if len(made) == 3:
                made.append(None)
                raise KeyboardInterrupt
            assert (task.members, task.polish) == (2, 1)
            made.append((params.seed, variant))
            yield {"variant": variant, "seed": params.seed}

    with pytest.raises(KeyboardInterrupt):
        collect(path, study, *polished, {"pixel_rate": 0.2})
    with pytest.raises(InputError, match="made with train.gate=50.0, not 0.0; keep to it"):
        collect(path, study, *faces("train_single.faces.gate=0"), {"pixel_rate": 0.2})
    with pytest.raises(InputError, match="made with pixel_rate=0.2, not 0.1; keep to it"):
        collect(path, study, *polished, {"pixel_rate": 0.1})
    collect(path, study, *polished, {"pixel_rate": 0.2})
    assert made == [(0, "a"), (0, "b"), (1, "a"), None, (1, "b"), (2, "a"), (2, "b")]
    assert len(pd.read_csv(path)) == 2 * SEEDS


def test_the_makefiles_studies_are_those_in_the_report(tmp_path):
    commands = re.findall(r"-m stages\.(ablate|pixels|scale) (\w+) ?(.*)", (ROOT / "Makefile").read_text())
    found = {kind: sorted(name for own, name, _ in commands if own == kind) for kind in ("ablate", "pixels", "scale")}
    images = ["faces", "mnist", "mnist_10", "mnist_pair", "mnist_plain"]
    assert found == {"ablate": ["mnist_10", "mnist_plain"], "pixels": images, "scale": ["mnist_10"]}
    stems = {"ablate": "ablation", "pixels": "pixels", "scale": "scaling"}
    assert sorted(path.stem for path in (ROOT / "data/studies").glob("*.json")) == sorted(
        f"{stems[kind]}_{name}" for kind, name, _ in commands
    )
    for kind, name, overrides in commands:
        stem = f"{stems[kind]}_{name}"
        for ending in (".csv", ".json"):
            shutil.copy(ROOT / f"data/studies/{stem}{ending}", tmp_path)
        params = load_params(shlex.split(overrides), ROOT / "params.yaml")
        task = params.train[name] if kind == "pixels" else alone(params.train[name])
        pixel = {"pixel_rate": PIXEL_RATE}
        constants = {"ablate": pixel, "pixels": pixel | {"fit_steps": FIT_STEPS}, "scale": {}}[kind]
        collect(tmp_path / f"{stem}.csv", lambda *_: iter(()), params, task, constants)


def test_points_are_refused(tmp_path):
    params = load_params([])
    with pytest.raises(InputError, match="classifier toy_1 takes points; a study scores images"):
        collect(tmp_path / "study.csv", ablate, params, params.train["toy_1"], {})


@pytest.mark.slow
def test_scores_of_other_seeds_are_collected_from_git_and_dvc(project: Path):
    folder = clone(project, project.parent / "seeds")
    run("dvc", "pull", "-q", cwd=folder)
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    (folder / "data/studies/seeds.csv").unlink(missing_ok=True)

    def change(key: str, value: Any, *stages: str) -> None:
        changed = copy.deepcopy(lock)
        for stage in stages:
            changed["stages"][stage]["params"]["params.yaml"][key] = value
        (folder / "dvc.lock").write_text(yaml.safe_dump(changed, sort_keys=False))

    def collected(revision: str) -> tuple[str, list[tuple[str, int]]]:
        said = run("python", "-m", "stages.seeds", revision, cwd=folder).stdout
        table = pd.read_csv(folder / "data/studies/seeds.csv")
        return said.strip(), sorted(zip(table["variant"], table["seed"], strict=True))

    change("seed", 3, *(name for name in lock["stages"] if name != "report"))
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("seed: 0", "seed: 3"))
    metrics = json.loads((folder / "reports/metrics.json").read_text())
    metrics["faces"]["train_control_auc"] = 0.125
    (folder / "reports/metrics.json").write_text(json.dumps(metrics))
    run("dvc", "exp", "save", "--name", "third", cwd=folder)
    change("seed", 3, "sample@toy_1")
    del metrics["toy_pair"]
    (folder / "reports/metrics.json").write_text(json.dumps(metrics))
    run("git", "commit", "-qam", "one seed for the images of toy_1, another for the rest; no toy_pair", cwd=folder)
    run("git", "tag", "mixed", cwd=folder)
    run("git", "reset", "-q", "--hard", "HEAD~1", cwd=folder)
    (folder / "data/studies/seeds.csv").unlink(missing_ok=True)

    names = ["faces", "toy_1", "toy_pair"]
    assert collected("HEAD") == ("HEAD: faces, toy_1, toy_pair", [(name, 0) for name in names])
    assert collected("third") == ("third: faces, toy_1, toy_pair", [(name, seed) for name in names for seed in (0, 3)])
    assert collected("mixed") == ("mixed: faces", [(name, seed) for name in names for seed in (0, 3)])
    table = pd.read_csv(folder / "data/studies/seeds.csv").set_index(["variant", "seed"])
    assert table.loc[("faces", 3), "train_control_auc"] == 0.125

    change("generator", {"noise": 5}, "train_single@faces")  # another generator of faces, of which the table has none yet
    assert collected("third") == ("third: toy_1, toy_pair", [(name, seed) for name in names[1:] for seed in (0, 3)])
    change("beta", 1.0, "train_single@faces", "train_single@toy_1", "train_multi@toy_pair")
    refused = {
        ("nothing",): "nothing: unknown Git revision",
        ("HEAD",): "HEAD has no generator of one seed with the parameters",
        ("HEAD", "beta=1"): "seeds.csv is for the parameters of params.yaml",
    }
    for arguments, line in refused.items():
        done = run("python", "-m", "stages.seeds", *arguments, cwd=folder, check=False)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith(f"error: {line}")
