"""Every command of the README and of docs/ works as written, in a new clone of a pipeline of tiny tasks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT, clone, run

DOCUMENTS = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(document: str) -> list[str]:
    """The indented blocks of a document in Markdown."""
    found = re.findall(r"(?<=\n\n)(?: {4}.*\n)+", (ROOT / document).read_text())
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_works_as_written(document: str, project: Path, tmp_path: Path):
    shutil.copytree(project.parent / "gbc-remote", tmp_path / "gbc-remote")
    folder = clone(project, tmp_path / "gbc")
    run("dvc", "pull", "-q", cwd=folder)
    programs = Path(sys.executable).parent  # of this environment; the documents say how to find them
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != programs)
    script = []
    for block in blocks(document):
        script.append(f"python - <<'PYTHON'\n{block}PYTHON\n" if block.startswith("import ") else block)
    assert len(script) > 2
    try:
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", "".join(script)],
            cwd=folder,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
    finally:
        run("dvc", "queue", "stop", "--kill", cwd=folder, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
