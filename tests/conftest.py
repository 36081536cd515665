"""What several test modules share."""

import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from tests import tiny

# Property tests take the same examples in every run, so that a failure is the change's and not the draw's.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights in every run, for tests that leave a network as torch initialises it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A repository with a reproduced tiny pipeline, one for all of pytest's processes; tests clone it, or leave it as it was."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "gbc"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder / "project", ignore_errors=True)  # of a process that failed
            tiny.reproduced(folder / "project")
            (folder / "made").touch()
    return folder / "project"
