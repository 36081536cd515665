"""Random search: what is proposed, what is pruned, and a search that is killed and goes on."""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from gbc.params import InputError, load_params
from tests.tiny import ROOT, clone, environment, run

optuna = pytest.importorskip("optuna")
search = pytest.importorskip("gbc.search")


def studied(database: Path, trials: int, seed: int = 0, killed: tuple[int, ...] = ()) -> list[dict[str, float]]:
    """Proposals for mnist of all finished trials, by index, after so many more trials, of which some are killed."""
    study, space = search.open_study("mnist", f"sqlite:///{database}"), search.search_space(load_params([], ROOT / "params.yaml"), "mnist")

    def objective(trial: Any) -> float:
        index, _ = search.propose(trial, space, seed)
        trial.set_user_attr("index", index)
        if trial.number in killed:
            search.retry(study, trial)
            raise KeyboardInterrupt
        return 1.0

    for _ in range(trials):
        with suppress(KeyboardInterrupt):
            study.optimize(objective, n_trials=1)
    ended = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert sorted(trial.user_attrs["index"] for trial in ended) == list(range(len(ended)))
    return [trial.params for trial in sorted(ended, key=lambda trial: trial.user_attrs["index"])]


def test_the_same_seed_proposes_the_same_trials(tmp_path: Path):
    first = studied(tmp_path / "first.db", 3)
    assert first == studied(tmp_path / "second.db", 3)
    assert first != studied(tmp_path / "third.db", 3, seed=1)
    assert len({trial["beta"] for trial in first}) == 3


def test_a_search_that_goes_on_proposes_what_an_uninterrupted_one_would(tmp_path: Path):
    studied(tmp_path / "new/parts.db", 1)
    assert studied(tmp_path / "new/parts.db", 2) == studied(tmp_path / "whole.db", 3)


def test_a_trial_that_takes_the_place_of_a_killed_one_makes_its_proposal(tmp_path: Path):
    assert studied(tmp_path / "parts.db", 6, killed=(1, 2, 4)) == studied(tmp_path / "whole.db", 3)


def test_the_space_is_around_the_committed_values():
    params = load_params(["train_single.mnist.batch=500", "train_single.mnist.total_variation=12"], ROOT / "params.yaml")
    space = search.search_space(params, "mnist")
    own = {f"train_single.mnist.{key}" for key in ("batch", "total_variation", "matrix_learning_rate")}
    assert set(space) == {"beta", "generator.learning_rate"} | own
    assert space["train_single.mnist.batch"] == [250, 500, 1000]
    assert space["train_single.mnist.total_variation"] == (3, 48)
    assert set(search.search_space(params, "toy_pair")) == {"beta", "generator.learning_rate", "train_multi.toy_pair.batch"}
    celeba = load_params(["celeba.attributes=[Male]"], ROOT / "params.yaml")
    assert search.place(celeba, "celeba_Male") == ("train_celeba@Male", "celeba.train")
    with pytest.raises(InputError, match="no 'cats'"):
        search.search_space(params, "cats")


def test_a_trial_that_lags_behind_half_way_is_pruned(tmp_path: Path):
    study, history = search.open_study("mnist", f"sqlite:///{tmp_path}/mnist.db"), tmp_path / "history.csv"

    def objective(trial: Any, violation: float) -> float:
        history.unlink(missing_ok=True)
        assert math.isnan(search.report(trial, history, 100))
        assert not trial.should_prune()
        rows = [f"{step},{t},{violation},{t}" for step in range(0, 200, 2) for t in range(2)]
        history.write_text("\n".join(["step,classifier,stationarity,duality", *rows]))
        for _ in range(2):
            assert search.report(trial, history, 100) == violation + 0.5
        if trial.should_prune():
            raise optuna.TrialPruned
        return violation

    for violation in (1, 2, 3, 4, 9, 1):
        study.optimize(functools.partial(objective, violation=violation), n_trials=1)
    assert [trial.state.name for trial in study.trials] == [*["COMPLETE"] * 4, "PRUNED", "COMPLETE"]
    assert list(study.trials[0].intermediate_values) == [100, 120, 140, 160, 180]


def test_a_storage_that_cannot_be_used_ends_in_one_line():
    with pytest.raises(InputError, match=r"^--storage: Could not parse.*$"):
        search.open_study("mnist", "nonsense")


def command(folder: Path, trials: int) -> "subprocess.Popen[str]":
    """A search, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "stages.search", "toy_1", "--trials", str(trials)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_killed_search_goes_on_and_its_best_trial_is_applied(project: Path):
    folder = clone(project, project.parent / "searched")
    run("dvc", "pull", "-q", cwd=folder)
    with command(folder, 3) as killed:
        assert killed.stdout
        assert killed.stdout.readline().startswith("search-toy_1-0000: KKT violation ")
        deadline = time.monotonic() + 600
        clones = folder / ".dvc/tmp/search"
        while not list(clones.glob("*/.dvc/tmp/search.log")):  # the second trial's training has begun
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(killed.pid, signal.SIGKILL)
    assert len(list(clones.iterdir())) == 1
    with command(folder, 3) as again:
        output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert not list(clones.iterdir())
    assert run("git", "status", "--short", cwd=folder).stdout == ""

    study = search.open_study("toy_1", f"sqlite:///{folder}/data/search/toy_1.db")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 3
    assert states.count("FAIL") == 1
    names = {f"search-toy_1-{index:04}" for index in range(3)}
    assert {trial.user_attrs["experiment"] for trial in study.trials if trial.state.name == "COMPLETE"} == names
    assert set(run("dvc", "exp", "list", "--name-only", cwd=folder).stdout.split()) == names
    assert search.importances(study)["importance"].sum() == pytest.approx(1)

    best = search.best(study)
    assert f"best: {best.user_attrs['experiment']}, KKT violation {best.value:.4g}" in output
    run("python", "-m", "stages.search", "toy_1", "--apply", cwd=folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    assert params["beta"] == best.params["beta"]
    assert params["generator"]["learning_rate"] == best.params["generator.learning_rate"]
    assert params["train_single"]["toy_1"]["batch"] == best.params["train_single.toy_1.batch"]
    shares = pd.read_csv(folder / "data/studies/search_toy_1.csv")
    assert set(shares["parameter"]) == set(best.params)
    assert run("dvc", "status", "train_single@toy_1", cwd=folder).stdout.strip() == "Data and pipelines are up to date."
    refused = run("python", "-m", "stages.search", "toy_1", cwd=folder, check=False)
    assert refused.stderr.startswith("error: the search tries the last commit")
    assert refused.stderr.count("\n") == 1
    run("git", "commit", "-qam", "best", cwd=folder)
    refused = run("python", "-m", "stages.search", "toy_1", "--apply", cwd=folder, check=False)
    assert refused.stderr.startswith(f"error: {best.user_attrs['experiment']} is of commit ")
    assert f"-S beta={best.params['beta']} " in refused.stderr
