"""What several test modules share."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a reproduced tiny pipeline; tests clone it, or leave it as it was."""
    return tiny.reproduced(tmp_path_factory.mktemp("gbc") / "project")
