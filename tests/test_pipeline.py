"""The whole pipeline at tiny sizes, in a git and DVC repository of its own."""

import ast
import functools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from gbc.artifacts import load_json, load_network, load_table
from gbc.generator import Mixture
from tests.tiny import ROOT, clone, run, stages_run


@pytest.mark.slow
def test_a_second_repro_runs_nothing(project: Path):
    assert stages_run(run("dvc", "repro", cwd=project)) == []


@pytest.mark.slow
def test_the_report_is_whole_and_opens_offline(project: Path):
    metrics = json.loads((project / "reports/metrics.json").read_text())
    assert set(metrics) == {"toy_1", "faces", "toy_pair", "certify"}
    assert set(metrics["certify"]) == {"toy_1", "toy_2", "faces"}
    assert metrics["certify"]["faces"]["z1"] == ["layers.5.bias", "layers.5.weight", "layers.7.weight"]
    assert {"within_015", "points_hit", "points_active", "kkt_residual", "oracle_residual", "seconds"} <= set(metrics["toy_pair"])
    assert {"own_015", "others_015"} <= set(metrics["toy_pair"])
    assert {"ssim_precision", "train_control_auc", "kkt_residual", "oracle_residual", "seconds", "baselines"} <= set(metrics["faces"])
    figures = {path.stem for path in (project / "reports/figures").iterdir()}
    assert {"fig2_duality", "fig3_lambda", "fig7_faces", "loss_curves", "ssim_distribution"} <= figures
    page = (project / "reports/index.html").read_text()
    assert page.count("data-pair=") == 40  # every sample of faces
    assert not re.search(r"""(src|href)=["']?(https?:|//|[\w./]+\.(png|css|js))""", page)


@pytest.mark.slow
def test_reports_deleted_and_rebuilt_are_the_same_bytes(project: Path):
    before = {path: path.read_bytes() for path in (project / "reports").rglob("*") if path.is_file()}
    shutil.rmtree(project / "reports")
    run("python", "-m", "stages.report", cwd=project)
    assert {path: path.read_bytes() for path in (project / "reports").rglob("*") if path.is_file()} == before
    assert run("git", "status", "--short", cwd=project).stdout == ""


@pytest.mark.slow
def test_a_second_clone_pulls_and_runs_nothing(project: Path):
    second = clone(project, project.parent / "second")
    run("dvc", "pull", "-q", cwd=second)
    assert stages_run(run("dvc", "repro", cwd=second)) == []
    assert (second / "data/generators/faces/weights.safetensors").read_bytes() == (
        project / "data/generators/faces/weights.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_clone_without_the_local_remote_rebuilds_the_report_from_git_alone(project: Path):
    alone = clone(project, project.parent / "apart/clone")
    run("dvc", "pull", "-q", "--allow-missing", "--remote", "evidence", cwd=alone)
    assert stages_run(run("dvc", "repro", "--dry", "--allow-missing", cwd=alone)) == []
    shutil.rmtree(alone / "reports")
    run("python", "-m", "stages.report", cwd=alone)
    assert run("git", "status", "--short", cwd=alone).stdout == ""


@pytest.mark.slow
def test_ci_redraws_the_report_and_refuses_another(project: Path, tmp_path: Path):
    alone = clone(project, tmp_path / "apart/ci")
    command = ["env", f"GITHUB_STEP_SUMMARY={tmp_path / 'summary'}", ".ci/report"]
    run(*command, cwd=alone)
    summary = (tmp_path / "summary").read_text()
    assert "train/control AUC" in summary
    assert "| faces" in summary
    page = alone / "reports/index.html"
    page.write_text(page.read_text().replace("Generator Born", "Generator, born"))
    run("git", "commit", "-qam", "by hand", cwd=alone)
    done = run(*command, cwd=alone, check=False)
    assert done.returncode != 0
    assert "Running stage 'report'" in done.stdout  # the page is not what dvc.lock says


@pytest.mark.slow
def test_an_experiment_with_another_beta_runs_only_generators_and_what_follows(project: Path):
    other = clone(project, project.parent / "experiment")
    run("dvc", "pull", "-q", cwd=other)
    done = run("dvc", "exp", "run", "-S", "beta=0.5", "-n", "half", cwd=other)
    expected = {
        "train_single@toy_1",
        "train_single@faces",
        "train_multi@toy_pair",
        "evaluate@toy_1",
        "evaluate@faces",
        "evaluate_multi@toy_pair",
        "report",
    }
    assert set(stages_run(done)) == expected
    assert "half" in run("dvc", "exp", "show", "--csv", cwd=other).stdout
    assert "kkt_residual" in run("dvc", "metrics", "diff", cwd=other).stdout


@pytest.mark.slow
def test_a_queued_sweep_ends_with_an_experiment_for_every_value(project: Path):
    other = clone(project, project.parent / "sweep")
    run("dvc", "pull", "-q", cwd=other)
    values = [0.5, 5.0, 100.0, 500.0]
    run("dvc", "exp", "run", "--queue", "-S", f"beta={','.join(map(str, values))}", cwd=other)
    run("dvc", "queue", "start", "-j", "2", cwd=other)
    deadline = time.monotonic() + 1200
    try:
        while re.search("Queued|Running", status := run("dvc", "queue", "status", cwd=other).stdout):
            assert time.monotonic() < deadline, status
            time.sleep(1)
    finally:
        run("dvc", "queue", "stop", "--kill", cwd=other, check=False)
    assert status.count("Success") == len(values), status
    shown = json.loads(run("dvc", "exp", "show", "--json", cwd=other).stdout)
    head = next(row for row in shown if row["rev"] != "workspace")
    betas = [part["revs"][0]["data"]["params"]["params.yaml"]["data"]["beta"] for part in head["experiments"]]
    assert sorted(betas) == values


@pytest.fixture(scope="module")
def bare(project: Path) -> Path:
    """A clone whose only data are a classifier and its Λ."""
    folder = clone(project, project.parent / "bare")
    run("dvc", "pull", "-q", "data/classifiers/faces", "data/lambda/faces", cwd=folder)
    return folder


def truncate(folder: Path) -> None:
    weights = folder / "data/classifiers/faces/weights.safetensors"
    content = weights.read_bytes()
    weights.unlink()  # DVC's files are read-only
    weights.write_bytes(content[:-100])


BAD_INPUT: dict[str, tuple[list[str], Callable[[Path], None], str]] = {
    "unknown parameter": (["sample", "faces", "betta=1"], lambda _: None, "betta"),
    "negative beta": (["train_single", "faces", "beta=-1"], lambda _: None, "beta=-1.0 is not in"),
    "too many images": (["sample", "faces", "sample.faces.per_class=600"], lambda _: None, "fewer than per_class=600"),
    "no CelebA": (["sample", "celeba_Male", "celeba.attributes=[Male]"], lambda _: None, "no whole copy of CelebA"),
    "truncated weights": (
        ["train_single", "faces"],
        truncate,
        "data/classifiers/faces/weights.safetensors: not a whole safetensors file",
    ),
    "no such task": (["evaluate", "cats"], lambda _: None, "no 'cats'"),
    "no name": (["evaluate"], lambda _: None, "usage: python -m stages.evaluate name"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_clear_line(bare: Path, case: str):
    command, spoil, message = BAD_INPUT[case]
    spoil(bare)
    done = run("python", "-m", f"stages.{command[0]}", *command[1:], cwd=bare, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_no_generator_stage_can_see_images():
    """Walk dvc.yaml from every generator stage upwards: images are reached through pretraining alone, and only its weights."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    body = {name: stage.get("do", stage) for name, stage in stages.items()}
    trainers = [name for name in body if name.startswith("train_")]
    assert len(trainers) == 3
    for name in trainers:
        files = [dep for dep in body[name]["deps"] if dep.startswith("data/")]
        assert files
        assert all(dep.startswith(("data/classifiers/", "data/lambda/")) for dep in files)
        assert "gbc/datasets.py" not in body[name]["deps"]
    for name in body:
        if name.startswith("estimate_lambda"):
            assert [dep.split("/")[1] for dep in body[name]["deps"] if dep.startswith("data/")] == ["classifiers"]
    seen = {name for name in body if any(dep.startswith(("data/samples", "data/raw")) for dep in body[name]["deps"])}
    assert {name.removesuffix("_celeba").removesuffix("_multi") for name in seen} == {"sample", "pretrain", "evaluate"}


@functools.cache
def loaded_by(stage: str) -> set[str]:
    """The modules of gbc/ that a stage's script loads, with what it imports inside `main`."""
    parts = ast.walk(ast.parse((ROOT / f"stages/{stage}.py").read_text()))
    imports = {part.module for part in parts if isinstance(part, ast.ImportFrom)}
    code = "import sys; [__import__(m) for m in sys.argv[1:]]; print(*(m for m in sys.modules if m.startswith('gbc.')))"
    modules = run(sys.executable, "-c", code, *sorted(filter(None, imports)), cwd=ROOT).stdout.split()
    return {f"gbc/{module.removeprefix('gbc.')}.py" for module in modules}


def test_the_generators_modules_never_import_the_datasets():
    for stage in ("train_single", "train_multi"):
        assert "gbc/training.py" in loaded_by(stage)
        assert not {"gbc/datasets.py", "gbc/pretraining.py"} & loaded_by(stage)


def test_a_classifiers_folder_holds_weights_and_architecture_only(project: Path):
    for folder in (project / "data/classifiers").iterdir():
        if folder.is_dir():
            assert sorted(path.name for path in folder.iterdir()) == ["architecture.json", "weights.safetensors"]


@pytest.mark.slow
def test_members_are_born_apart_and_the_report_says_what_they_agree_on(project: Path):
    first, second = load_network(project / "data/generators/faces", Mixture).parts
    assert not torch.equal(first.centres, second.centres)
    assert not torch.equal(first.bank()[0], second.bank()[0])
    history = load_table(project / "data/histories/faces/history.csv").set_index("member")
    assert [history.loc[member, "step"].tolist()[-1] for member in (0, 1)] == [18, 18]  # 12, 6 of free images, and g fitted to them
    metrics = load_json(project / "reports/metrics.json")
    last = [history.loc[member, "stationarity"].tolist()[-1] for member in (0, 1)]
    assert metrics["faces"]["kkt_residual"] == pytest.approx(sum(last) / 2)
    assert 0 <= metrics["faces"]["agreed"] <= 1
    assert "agreed" not in metrics["toy_1"]
    assert (project / "reports/figures/agreed_faces.png").is_file()


def test_every_stage_names_the_modules_it_uses():
    """DVC does not trace imports: a stage's deps must be the gbc modules that its script loads."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        body = stage.get("do", stage)
        script = body["cmd"].split("stages.")[1].split()[0]
        assert loaded_by(script) == {dep for dep in body["deps"] if dep.startswith("gbc/") and dep.endswith(".py")}, name
