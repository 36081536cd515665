"""params.yaml is typed and validated, and every refusal names the key."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gbc.params import InputError, device, entry, load_params
from tests.tiny import ROOT


def test_overrides_reach_their_place_and_the_rest_stays():
    params = load_params(["beta=0.5", "train_single.mnist.batch=20", "generator.learning_rate=1e-3"])
    assert params.beta == 0.5
    assert params.train_single["mnist"].batch == 20
    assert params.generator.learning_rate == 0.001
    assert params.train_single["faces"].members == 1
    assert params.train_single["toy"].polish == 0
    assert load_params(["+train_single.faces.members=2"]).train_single["faces"].members == 2
    assert params.train_multi["mnist_pair"].classifiers == ["mnist_low", "mnist_high"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("betta=1", "betta"),
        ("train_single.mnist.bach=3", "bach"),
        ("+train_single.mnist.bach=3", "bach"),
        ("beta=-1", r"beta=-1.0 is not in \[0, inf\]"),
        ("beta=inf", "beta=inf is not finite"),
        ("train_single.mnist.classifiers=[mnist,faces]", r"train_single.mnist.classifiers=\['mnist', 'faces'\] must name 1"),
        ("train_multi.mnist_pair.classifiers=[]", r"train_multi.mnist_pair.classifiers=\[\] must name 2"),
        ("steps=many", "steps"),
        ("steps=1.5", "steps"),
        ("train_single.mnist.members=0", r"members=0 is not in \[1, 100\]"),
        ("device=tpu", "device=tpu is not one of auto, cpu, cuda"),
        ("pretrain.mnist.hidden=[100,0]", r"pretrain.mnist.hidden=0 is not in"),
        ("sample.mnist.source=imagenet", "sample.mnist.source=imagenet is not one of"),
        ("celeba.pretrain.architecture=vgg", "celeba.pretrain.architecture=vgg is not one of"),
        ("~seed", "seed"),
        ("beta=[", "beta"),
    ],
)
def test_bad_parameters_are_refused_by_name_in_one_line(override: str, message: str):
    with pytest.raises(InputError, match=message) as error:
        load_params([override])
    assert "\n" not in str(error.value)


def test_an_attribute_of_celeba_becomes_a_task_of_every_block():
    assert not any(name.startswith("celeba") for name in load_params([]).train)
    params = load_params(["celeba.attributes=[Male]"])
    assert params.sample["celeba_Male"].attribute == "Male"
    assert params.pretrain["celeba_Male"].architecture == "batchnorm"
    assert params.train["celeba_Male"].classifiers == ["celeba_Male"]


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="no 'cats' for this stage; it has toy, "):
        entry(load_params([]).sample, "cats")


def test_the_device_is_what_was_asked_for():
    assert device(load_params(["device=cpu"])).type == "cpu"
    assert device(load_params(["device=auto"])).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asserts what happens where there is no CUDA device")
def test_cuda_is_not_silently_replaced():
    with pytest.raises(InputError, match="device=cuda, but PyTorch finds no CUDA device"):
        device(load_params(["device=cuda"]))


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="params"):
        load_params([], tmp_path / "params.yaml")


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(InputError, match="params.yaml with no overrides: .*codec can't decode"):
        load_params([], tmp_path / "params.yaml")


def test_a_stage_that_cannot_write_says_so_in_one_line(tmp_path: Path):
    shutil.copy("params.yaml", tmp_path)
    (tmp_path / "data").write_text("")  # where a folder should be
    command = [sys.executable, "-m", "stages.sample", "toy"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*data.*\n", done.stderr)


def test_every_parameter_is_plain_for_dvc(tmp_path: Path):
    # Interpolations would be frozen by `dvc exp run -S`, anchors would not follow it, and PyYAML reads 1e-3 as a string.
    text = Path("params.yaml").read_text()
    assert "${" not in text
    assert "&" not in text.replace("& ", "")
    strings = {"auto", "cpu", "cuda", "python"}

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, str) and value not in strings:
            with pytest.raises(ValueError, match="could not convert"):
                float(value)

    walk({key: value for key, value in yaml.safe_load(text).items() if key != "launch"})
    shutil.copy("params.yaml", tmp_path)
    assert load_params([], tmp_path / "params.yaml") == load_params([])


@pytest.mark.parametrize("stage", sorted(path.stem for path in Path("stages").glob("[a-z]*.py")))
def test_help_is_there_at_once(stage: str):
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: python -m stages.{stage} ")
    assert " gbc.params" in done.stderr
    assert not {"torch", "pandas", "matplotlib"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
