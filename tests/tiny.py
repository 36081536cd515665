"""The whole pipeline at tiny sizes, in a git and DVC repository of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
Run = subprocess.CompletedProcess[str]

TASKS = {
    "sample": ["toy_1", "toy_2", "faces"],
    "pretrain": ["toy_1", "toy_2", "faces"],
    "train_single": ["toy_1", "faces"],
    "train_multi": ["toy_pair"],
}


def environment() -> dict[str, str]:
    """Variables of a command that finds this environment's programs first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(*command: str, cwd: Path, check: bool = True) -> Run:
    """Run a command in this environment."""
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def stages_run(done: Run) -> list[str]:
    """Names of the stages that a command of DVC ran, or would run."""
    return re.findall(r"Running stage '(.*?)'", done.stdout)


def shrink(path: Path) -> None:
    """Keep a few tasks and make every one tiny."""
    params = yaml.safe_load(path.read_text())
    for block, names in TASKS.items():
        params[block] = {name: params[block][name] for name in names}
    params["sample"]["faces"]["per_class"] = 10
    for task in params["pretrain"].values():
        task |= {"hidden": [12, 8], "max_steps": 20, "settle_steps": 5}
    for task in (params["train_single"] | params["train_multi"]).values():
        task |= {"anchors": 4, "batch": 12}
    params["train_single"]["faces"] |= {"members": 2, "length": 2.0, "polish": 1.0}
    params["steps"] = 6
    params["generator"] |= {"noise": 4, "width": 16, "channels": 8}
    params["evaluate"]["samples"] = 40
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def clone(origin: Path, folder: Path) -> Path:
    """A clone of `origin` at `folder` that can commit, and for which make finds this environment up to date."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    run("git", "clone", "-q", str(origin), str(folder), cwd=folder.parent)
    equip(folder)
    return folder


def equip(folder: Path) -> None:
    """Give git a name to commit under, and make this environment, which it then finds up to date."""
    run("git", "config", "user.name", "test", cwd=folder)
    run("git", "config", "user.email", "test@example.com", cwd=folder)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(folder / name, (0, 0))


def reproduced(folder: Path) -> Path:
    """A repository at `folder` with a reproduced pipeline, committed and pushed to its remotes."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines():
        if not name.startswith(("reports/", "data/evidence/", "tests/")) and name != "dvc.lock" and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shrink(folder / "params.yaml")
    run("git", "init", "-q", "-b", "main", cwd=folder)
    equip(folder)
    run("git", "add", "-A", cwd=folder)
    run("git", "commit", "-qm", "tiny", cwd=folder)
    first = run("dvc", "repro", cwd=folder)
    assert len(stages_run(first)) == 3 * 3 + 3 + 3 + 1
    run("dvc", "push", "-q", cwd=folder)
    run("make", "evidence", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", "commit", "-qm", "results", cwd=folder)
    return folder
