"""Every command of the README and of docs/ works as written, in a new clone of a pipeline of tiny tasks; its scores are the pipeline's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gbc.page import BASELINES
from tests.tiny import ROOT, clone, run

DOCUMENTS = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(document: str) -> list[str]:
    """The indented blocks of a document in Markdown."""
    found = re.findall(r"(?<=\n\n)(?: {4}.*\n)+", (ROOT / document).read_text())
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def like(cell: str, value: float) -> str:
    """A number with as many decimals as a cell of a table has."""
    return f"{value:.{len(cell.partition('.')[2])}f}"


def test_the_scores_of_tables_are_those_of_the_report():
    scores = json.loads((ROOT / "reports/metrics.json").read_text())
    columns = "precision_ratio recall_ratio ssim_precision ssim_recall train_control_auc leak_60 diversity_ratio".split()
    columns += ["accuracy_on_generated"]
    found, text = set(), "".join((ROOT / document).read_text() for document in ("README.md", "docs/workflow.md"))
    for name, cells in re.findall(r"^\| `(\w+)`.*?\| (.*) \|$", text, re.MULTILINE):
        row, own = cells.split(" | "), scores.get(name, {})
        if len(row) == 9:
            for cell, key in zip(row[:8], columns, strict=True):
                assert cell == like(cell, own[key]), (name, key)
            assert row[8] == f"{own['kkt_residual']:.2f} ({own['oracle_residual']:.2f})", name
            found.add(name)
        elif len(row) == 2:
            assert row == [f"{own['within_015']:.0%}", f"{own['points_hit']} of {own['points_active']}"], name
            found.add(name)
        elif len(row) == 5:
            known = scores["certify"][name]
            everywhere, on_z1 = ([known[f"{images}_residual{where}"] for images in ("oracle", "heldout")] for where in ("_all", ""))
            for cell, value in zip([row[2], row[3], *row[4].split(", ")], [*everywhere, *on_z1], strict=True):
                assert cell == like(cell, value), name
        else:
            pytest.fail(f"{name}: a row of {len(row)} cells")
    assert found == {name for name, own in scores.items() if "kkt_residual" in own}
    kinds = {label: kind for kind, label in BASELINES.items()}
    baselines = re.findall(r"^\| \*baseline for `(\w+)`: (.*?)\* \| (.*) \|$", text, re.MULTILINE)
    for name, kind, cells in baselines:
        for cell, key in zip(re.findall(r"-?\d\.\d+", cells), columns[2:6], strict=True):
            assert cell == like(cell, scores[name]["baselines"][kinds[kind]][key]), (name, kind, key)
    assert len(baselines) > 5


@pytest.mark.slow
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document)])
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
