"""What several test modules share."""

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from tests import tiny


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
