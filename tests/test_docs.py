"""Every command of the README and of docs/ works as written, in a new clone of a pipeline of tiny tasks; its scores are the pipeline's."""

import json
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


def test_the_readmes_scores_are_those_of_the_report():
    scores = json.loads((ROOT / "reports/metrics.json").read_text())
    columns = "precision_ratio recall_ratio ssim_precision ssim_recall train_control_auc leak_60 diversity_ratio".split()
    columns += ["accuracy_on_generated"]
    found = set()
    for name, cells in re.findall(r"^\| `(\w+)`.*?\| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE):
        row, own = cells.split(" | "), scores.get(name, {})
        if len(row) == 9:
            for cell, key in zip(row[:8], columns, strict=True):
                assert cell == f"{own[key]:.{len(cell.partition('.')[2])}f}", (name, key)
            assert row[8] == f"{own['kkt_residual']:.2f} ({own['oracle_residual']:.2f})", name
            found.add(name)
        elif len(row) == 2:
            assert row == [f"{own['within_015']:.0%}", f"{own['points_hit']} of {own['points_active']}"], name
            found.add(name)
    assert found == {name for name, own in scores.items() if "kkt_residual" in own}


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
