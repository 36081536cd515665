"""Random search of a generator's hyperparameters, as in the paper: a study of Optuna whose trials are experiments of DVC.

A trial is judged by the KKT violation that its training ends with, which needs the classifier's weights alone; never by an
evaluation, which sees training images. Trials run in a private clone of the last commit, so that the workspace stays as it is.
"""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import psutil
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from gbc.artifacts import save_table
from gbc.params import InputError, Params, entry

Space = dict[str, tuple[float, float] | list[int]]

POLL = 5.0  # seconds between two looks at a training, or at other searches' trials
HEARTBEAT, GRACE = 15, 60  # seconds between two signs of life of a trial, and without one until it counts as killed
STARTUP = 4  # trials that end before any is pruned
RUNGS = 10  # every 10th row of a loss curve is reported: pruning compares trials at equal steps
MARK = "GBC_SEARCH"  # in the environment of a trial's processes: its clone
USED = ("dvc.yaml", "dvc.lock", "params.yaml", "gbc", "stages")  # what a training depends on
DVC = (sys.executable, "-m", "dvc")


def place(params: Params, name: str) -> tuple[str, str]:
    """The DVC stage that trains generator `name`, and the block of params.yaml that describes it."""
    if name in (f"celeba_{attribute}" for attribute in params.celeba.attributes):
        return f"train_celeba@{name.removeprefix('celeba_')}", "celeba.train"
    stage = "train_multi" if name in params.train_multi else "train_single"
    return f"{stage}@{name}", f"{stage}.{name}"


def search_space(params: Params, name: str) -> Space:
    """By key of params.yaml, what is drawn for generator `name`: log-uniform in a range, or one of a list; what is 0 stays 0."""
    task, (_, block) = entry(params.train, name), place(params, name)
    around = {"generator.learning_rate": params.generator.learning_rate}
    around |= {f"{block}.{key}": getattr(task, key) for key in ("matrix_learning_rate", "total_variation")}
    ranges: Space = {key: (value / 4, value * 4) for key, value in around.items() if value}
    batches = sorted({max(2, task.batch // 2), task.batch, 2 * task.batch})
    return {"beta": (5.0, 500.0), f"{block}.batch": batches} | ranges


def propose(trial: Trial, space: Space, seed: int) -> tuple[int, dict[str, float]]:
    """The proposal's index and values, which depend on the seed and the index alone.

    Indices count trials from 0, except that a trial in place of a killed one takes over the latter's.
    """
    first = trial.user_attrs.get("in_place_of", trial.number)
    index = sum("in_place_of" not in other.user_attrs for other in trial.study.get_trials(deepcopy=False)[:first])
    trial.study.sampler = optuna.samplers.RandomSampler(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))
    return index, {
        key: trial.suggest_categorical(key, choice) if isinstance(choice, list) else trial.suggest_float(key, *choice, log=True)
        for key, choice in space.items()
    }


def retry(study: optuna.Study, trial: Trial | FrozenTrial) -> None:
    """Have another trial take the place of a killed one."""
    study.enqueue_trial({}, user_attrs={"in_place_of": trial.user_attrs.get("in_place_of", trial.number)})


def open_study(name: str, storage: str) -> optuna.Study:
    """The study of this name, begun if there is none; raises `InputError` if the storage cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    if storage.startswith("sqlite:///"):
        Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            rows = optuna.storages.RDBStorage(
                storage, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry
            )
        return optuna.create_study(study_name=name, storage=rows, pruner=optuna.pruners.MedianPruner(STARTUP), load_if_exists=True)
    except (ImportError, SQLAlchemyError, OptunaError) as error:
        raise InputError(f"--storage: {str(error).splitlines()[0]}") from error


def run(*command: str, cwd: Path | None = None, failure: str = "") -> str:
    """What a command prints; raises `InputError` with `failure`, or the command and its errors, if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise InputError(failure or f"{' '.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def kill(folder: Path) -> None:
    """End the processes of the trial in a clone, orphans included."""
    while found := [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(MARK) == str(folder)]:
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=POLL)


@contextmanager
def clone(study: str, commit: str, classifiers: Sequence[str]) -> Iterator[Path]:
    """A clone of the repository at `commit` with the classifiers and their Λ, gone afterwards, as are those of killed searches.

    Raises `InputError` if DVC's cache, which the clone shares, lacks one of them.
    """
    origin, host = Path.cwd(), socket.gethostname()
    folder = origin / f".dvc/tmp/search/{study}-{host}-{os.getpid()}"

    def remove(old: Path) -> None:
        kill(old)
        shutil.rmtree(old, ignore_errors=True)

    for old in folder.parent.glob(f"*-{host}-*"):
        if old == folder or not psutil.pid_exists(int(old.name.rpartition("-")[2])):
            remove(old)
    try:
        identity = ("--config", "user.name=search", "--config", f"user.email=search@{host}")
        run("git", "clone", "--quiet", "--shared", "--no-checkout", *identity, str(origin), str(folder))
        run("git", "checkout", "--quiet", "--detach", commit, cwd=folder)
        cache = run(*DVC, "cache", "dir")
        (folder / ".dvc/config.local").write_text(f"[cache]\n    dir = {cache}\n[core]\n    site_cache_dir = {folder}/.dvc/tmp/site\n")
        needed = [f"data/{kind}/{classifier}" for kind in ("classifiers", "lambda") for classifier in classifiers]
        missing = f"{' or '.join(needed)} is not in DVC's cache; run `dvc pull`, or `dvc repro` to make it"
        run(*DVC, "checkout", *needed, cwd=folder, failure=missing)
        yield folder
    finally:
        remove(folder)


def report(trial: Trial, history: Path, start: int) -> float:
    """Tell the trial, for pruning, the violations from step `start` on; the last one, or NaN while there is none.

    A violation is stationarity plus duality, both relative, mean over classifiers and members.
    """
    if not history.is_file():
        return float("nan")
    table = pd.read_csv(history)
    table["violation"] = table["stationarity"] + table["duality"]
    curve = [(int(step), float(part["violation"].mean())) for step, part in table.groupby("step")]  # type: ignore[arg-type]
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for step, value in curve[::RUNGS]:
        if step >= start and step not in known:
            trial.report(value, step)
    return curve[-1][1]


def objective(trial: Trial, params: Params, name: str, seed: int, commit: str, folder: Path) -> float:
    """The violation that a training in the clone `folder` ends with; raises `TrialPruned` if it lags behind, half way or later."""
    (stage, _), (index, values) = place(params, name), propose(trial, search_space(params, name), seed)
    experiment = f"search-{trial.study.study_name}-{index:04}"
    trial.set_user_attr("experiment", experiment)
    trial.set_user_attr("commit", commit)
    trial.set_user_attr("host", socket.gethostname())
    settings = [part for key, value in values.items() for part in ("-S", f"{key}={value}")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    task, log = params.train[name], folder / ".dvc/tmp/search.log"
    half = params.training_steps(task.length + task.polish) // 2
    try:
        with log.open("wb") as output:
            training = subprocess.Popen(
                [*DVC, "exp", "run", "--single-item", "--name", experiment, *settings, stage],
                cwd=folder,
                env=os.environ | {"PATH": path, MARK: str(folder)},
                stdout=output,
                stderr=output,
            )
        while training.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                training.wait(POLL)
            report(trial, folder / f"data/live/{name}.csv", half)
            if trial.should_prune():
                kill(folder)
                # What `dvc exp save` would do, did it not ask for all outputs of the pipeline.
                run("git", "commit", "--quiet", "--all", "--message", "pruned", cwd=folder)
                run("git", "push", "--quiet", "--force", "origin", f"HEAD:refs/exps/{commit[:2]}/{commit[2:]}/{experiment}", cwd=folder)
                print(f"{experiment}: pruned", flush=True)
                raise optuna.TrialPruned
        if training.returncode:
            raise InputError(f"{experiment}: {' '.join(log.read_text().split('> python')[-1].split())}")
        run(*DVC, "exp", "push", "--no-cache", "--force", "origin", experiment, cwd=folder)
        violation = report(trial, folder / f"data/histories/{name}/history.csv", half)
    except KeyboardInterrupt:
        retry(trial.study, trial)
        raise
    print(f"{experiment}: KKT violation {violation:.4g}", flush=True)
    if not np.isfinite(violation):
        raise optuna.TrialPruned
    return violation


def search(params: Params, name: str, trials: int, study: optuna.Study, seed: int) -> None:
    """Add trials of generator `name` until the study has so many finished ones, those of other machines included.

    A killed trial is made again. Raises `InputError` if the study was begun with other parameters, what it needs is not committed
    or not in DVC's cache, or a training fails; the next search goes on with the next proposal.
    """
    if seed < 0:
        raise InputError(f"--seed {seed} is less than 0")
    run("git", "diff", "--quiet", "HEAD", "--", *USED, failure=f"the search tries the last commit: commit changes of {', '.join(USED)}")
    commit, task = run("git", "rev-parse", "HEAD"), entry(params.train, name)
    common = {"search seed": seed, "beta": params.beta, "seed": params.seed, "steps": params.steps}
    setting = common | dataclasses.asdict(params.generator) | dataclasses.asdict(task)
    begun = study.user_attrs.get("setting", setting)
    if changed := [key for key in setting if begun.get(key) != setting[key]]:
        raise InputError(f"study {study.study_name!r} has {changed[0]}={begun.get(changed[0])}; keep to it, or name another with --study")
    study.set_user_attr("setting", setting)
    while True:
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        finished, running = states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED), states.count(TrialState.RUNNING)
        if finished >= trials:
            return
        if TrialState.WAITING in states or finished + running < trials:
            with clone(study.study_name, commit, task.classifiers) as folder:
                study.optimize(lambda trial: objective(trial, params, name, seed, commit, folder), n_trials=1)
        else:
            time.sleep(POLL)
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                optuna.storages.fail_stale_trials(study)


def best(study: optuna.Study) -> FrozenTrial:
    """The trial of the smallest violation; raises `InputError` if none has ended."""
    try:
        return study.best_trial
    except ValueError as error:
        raise InputError(f"no trial of study {study.study_name!r} has ended yet") from error


def apply(study: optuna.Study) -> None:
    """Bring the best trial's params and generator into the workspace, and into data/studies/ what every parameter contributed.

    Raises `InputError` if its experiment is in another machine's repository, or of another commit, whose files it would bring back.
    """
    trial = best(study)
    experiment, commit, host = (trial.user_attrs[key] for key in ("experiment", "commit", "host"))
    anew = f"make it anew with `dvc exp run {' '.join(f'-S {key}={value}' for key, value in trial.params.items())}`"
    run("git", "diff", "--quiet", commit, "HEAD", failure=f"{experiment} is of commit {commit[:7]}; check that out, or {anew}")
    try:
        print(run(*DVC, "exp", "apply", experiment))
    except InputError as error:
        raise InputError(f"{error} (tried on {host}; `dvc exp push` it there and `dvc exp pull` it here, or {anew})") from error
    save_table(Path(f"data/studies/search_{study.study_name}.csv"), importances(study))


def importances(study: optuna.Study) -> pd.DataFrame:
    """Every parameter's share in the spread of the violations, largest first; empty while fewer than two trials have ended."""
    if sum(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)) < 2:
        return pd.DataFrame({"parameter": [], "importance": []})
    found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
    return pd.DataFrame({"parameter": found.keys(), "importance": found.values()})
