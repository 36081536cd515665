"""The whole pipeline at tiny sizes, in a git and DVC repository of its own."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
Run = subprocess.CompletedProcess[str]

TASKS = {
    "sample": ["toy_1", "toy_2", "faces"],
    "pretrain": ["toy_1", "toy_2", "faces"],
    "train_single": ["toy_1", "faces"],
    "train_multi": ["toy_pair"],
}


def run(*command: str, cwd: Path, check: bool = True) -> Run:
    """Run a command with this environment's programs first in PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def stages_run(done: Run) -> list[str]:
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
    params["steps"] = 6
    params["generator"] |= {"noise": 4, "width": 16, "channels": 8}
    params["evaluate"]["samples"] = 40
    path.write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a reproduced pipeline, committed and pushed to its remotes."""
    folder = tmp_path_factory.mktemp("gbc") / "project"
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines():
        if not name.startswith(("reports/", "data/evidence/", "tests/")) and name != "dvc.lock" and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shrink(folder / "params.yaml")
    run("git", "init", "-q", "-b", "main", cwd=folder)
    run("git", "config", "user.name", "test", cwd=folder)
    run("git", "config", "user.email", "test@example.com", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", "commit", "-qm", "tiny", cwd=folder)
    first = run("dvc", "repro", cwd=folder)
    assert len(stages_run(first)) == 3 * 3 + 3 + 3 + 1
    run("dvc", "push", "-q", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", "commit", "-qm", "results", cwd=folder)
    return folder


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
    assert {"ssim_precision", "train_control_auc", "kkt_residual", "oracle_residual", "seconds", "baselines"} <= set(metrics["faces"])
    figures = {path.stem for path in (project / "reports/figures").iterdir()}
    assert {"fig2_duality", "fig3_lambda", "fig7_faces", "loss_curves", "ssim_distribution"} <= figures
    page = (project / "reports/index.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures)
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
    clone = project.parent / "second"
    run("git", "clone", "-q", str(project), str(clone), cwd=project.parent)
    run("dvc", "pull", "-q", cwd=clone)
    assert stages_run(run("dvc", "repro", cwd=clone)) == []
    assert (clone / "data/generators/faces/weights.safetensors").read_bytes() == (
        project / "data/generators/faces/weights.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_clone_without_the_local_remote_rebuilds_the_report_from_git_alone(project: Path):
    apart = project.parent / "apart"
    apart.mkdir()
    clone = apart / "clone"
    run("git", "clone", "-q", str(project), str(clone), cwd=apart)
    run("dvc", "pull", "-q", "--allow-missing", "--remote", "evidence", cwd=clone)
    assert stages_run(run("dvc", "repro", "--dry", "--allow-missing", cwd=clone)) == []
    shutil.rmtree(clone / "reports")
    run("python", "-m", "stages.report", cwd=clone)
    assert run("git", "status", "--short", cwd=clone).stdout == ""


@pytest.mark.slow
def test_an_experiment_with_another_beta_runs_only_generators_and_what_follows(project: Path):
    clone = project.parent / "experiment"
    run("git", "clone", "-q", str(project), str(clone), cwd=project.parent)
    run("dvc", "pull", "-q", cwd=clone)
    done = run("dvc", "exp", "run", "-S", "beta=0.5", "-n", "half", cwd=clone)
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
    assert "half" in run("dvc", "exp", "show", "--csv", cwd=clone).stdout
    assert "kkt_residual" in run("dvc", "metrics", "diff", cwd=clone).stdout


@pytest.fixture(scope="module")
def bare(project: Path) -> Path:
    """A clone whose only data are a classifier and its Λ."""
    clone = project.parent / "bare"
    run("git", "clone", "-q", str(project), str(clone), cwd=project.parent)
    run("dvc", "pull", "-q", "data/classifiers/faces", "data/lambda/faces", cwd=clone)
    return clone


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


def test_every_stage_names_the_modules_it_uses():
    """DVC does not trace imports: a stage's deps must be the gbc modules that its script loads."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        body = stage.get("do", stage)
        script = body["cmd"].split("stages.")[1].split()[0]
        assert loaded_by(script) == {dep for dep in body["deps"] if dep.startswith("gbc/")}, name
