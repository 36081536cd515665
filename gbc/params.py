"""params.yaml as typed, validated, frozen dataclasses, filled by Hydra's compose; and the frame of every stage's command."""

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gbc.artifacts import InputError

T = TypeVar("T")


def ranged(low: float, high: float = float("inf")) -> Any:
    """A required number, or list of numbers, in [low, high]."""
    return field(default=MISSING, metadata={"low": low, "high": high})


def one_of(*choices: str) -> Any:
    """A required string out of `choices`."""
    return field(default=MISSING, metadata={"choices": choices})


@dataclass(frozen=True)
class SampleParams:
    """One dataset: where its images are, which classes, how many of each."""

    source: str = one_of("circle", "mnist", "torchvision", "faces", "celeba", "npz", "folder")
    classes: list[int] = ranged(0)
    per_class: int = ranged(1)
    path: str = ""
    attribute: str = ""


@dataclass(frozen=True)
class PretrainParams:
    """One classifier: its data, its architecture and its full-batch descent."""

    data: str = MISSING
    architecture: str = one_of("homogeneous", "biased", "batchnorm")
    hidden: list[int] = ranged(1)
    first_scale: float = ranged(0)
    rest_scale: float = ranged(0)
    step_size: float = ranged(0)
    weight_decay: float = ranged(0)
    max_steps: int = ranged(1)
    stop_log_loss: float = ranged(float("-inf"))


@dataclass(frozen=True)
class LambdaParams:
    """Random inputs of the Euler equations: number of batches, and samples in each."""

    inputs: int = ranged(1)
    batch: int = ranged(2)


@dataclass(frozen=True)
class GeneratorParams:
    """What all generators share: the networks g and h, the optimiser, the constants of the loss."""

    noise: int = ranged(1)
    spread: float = ranged(0)
    width: int = ranged(1)
    channels: int = ranged(4)
    learning_rate: float = ranged(0)
    alpha_learning_rate: float = ranged(0)
    delta: float = ranged(0)
    gate: float = ranged(0)


@dataclass(frozen=True)
class TrainParams:
    """One generator: the classifiers that it is born from, and the weights of its loss."""

    classifiers: list[str] = MISSING
    anchors: int = ranged(1)
    batch: int = ranged(2)
    total_variation: float = ranged(0)
    statistics: float = ranged(0)
    span: float = ranged(0)
    margin_reward: float = ranged(0, 1)
    multiplier_floor: float = ranged(0, 1)


@dataclass(frozen=True)
class CelebAParams:
    """CelebA: one task for every attribute, none by default."""

    attributes: list[str] = MISSING
    sample: SampleParams = MISSING
    pretrain: PretrainParams = MISSING
    train: TrainParams = MISSING


@dataclass(frozen=True)
class EvaluateParams:
    """Samples drawn from every generator."""

    samples: int = ranged(1)


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml."""

    beta: float = ranged(0)
    seed: int = ranged(0)
    steps: int = ranged(1)
    device: str = one_of("auto", "cpu", "cuda")
    launch: str = MISSING
    sample: dict[str, SampleParams] = MISSING
    pretrain: dict[str, PretrainParams] = MISSING
    estimate_lambda: LambdaParams = MISSING
    generator: GeneratorParams = MISSING
    train_single: dict[str, TrainParams] = MISSING
    train_multi: dict[str, TrainParams] = MISSING
    evaluate: EvaluateParams = MISSING
    celeba: CelebAParams = MISSING

    @property
    def train(self) -> dict[str, TrainParams]:
        """Every generator, born from one classifier or several."""
        return self.train_single | self.train_multi


def _check(value: Any, path: str) -> Iterator[str]:
    """One complaint for every value that is out of the range its field declares."""
    if dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            inner, name, allowed = getattr(value, part.name), f"{path}{part.name}", part.metadata
            if "choices" in allowed and inner not in allowed["choices"]:
                yield f"{name}={inner} is not one of {', '.join(allowed['choices'])}"
            elif "low" in allowed:
                for number in inner if isinstance(inner, list) else [inner]:
                    if not allowed["low"] <= number <= allowed["high"]:
                        yield f"{name}={inner} is not in [{allowed['low']}, {allowed['high']}]"
            else:
                yield from _check(inner, f"{name}.")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _check(inner, f"{path}{key}.")


def load_params(overrides: list[str], path: Path = Path("params.yaml")) -> Params:
    """Parameters of `path` with Hydra `overrides` (key=value) applied.

    Every attribute of `celeba.attributes` becomes a task named celeba_<attribute>. Raises `InputError` that names the key if
    one is unknown, missing, of the wrong type or out of range.
    """
    try:
        with initialize_config_dir(str(path.parent.resolve()), version_base="1.3"):
            config = compose(path.stem, overrides=overrides)
        params = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Params), config))
    except (HydraException, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None)
        raise InputError(f"{path}: {str(error).splitlines()[0]}" + (f" (at {key})" if key else "")) from error
    assert isinstance(params, Params)
    if complaints := list(_check(params, "")):
        raise InputError(f"{path}: {'; '.join(complaints)}")
    for attribute in params.celeba.attributes:
        name = f"celeba_{attribute}"
        params.sample[name] = dataclasses.replace(params.celeba.sample, attribute=attribute)
        params.pretrain[name] = dataclasses.replace(params.celeba.pretrain, data=name)
        params.train_single[name] = dataclasses.replace(params.celeba.train, classifiers=[name])
    return params


def entry(block: Mapping[str, T], name: str) -> T:
    """Entry `name` of a block of params.yaml; raises `InputError` if there is none."""
    if name not in block:
        raise InputError(f"params.yaml has no {name!r} for this stage; it has {', '.join(block)}")
    return block[name]


def device(params: Params) -> torch.device:
    """The device to train on: CUDA where there is one, unless `device` says otherwise."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda, but PyTorch finds no CUDA device here; set device=auto or device=cpu")
    return torch.device("cuda" if params.device != "cpu" and torch.cuda.is_available() else "cpu")


def run_stage(main: Callable[..., None]) -> None:
    """Run `main(params, *names)` from the command line: names first, then Hydra overrides.

    Bad input ends in one line on stderr and exit code 1.
    """
    arguments = list(inspect.signature(main).parameters)[1:]
    usage = " ".join(["python -m stages." + Path(sys.argv[0]).stem, *arguments, "[key=value ...]"])
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    names = [argument for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    try:
        if len(names) != len(inspect.signature(main).parameters) - 1:
            raise InputError(f"usage: {usage}")
        main(load_params(overrides), *names)
    except InputError as error:
        sys.exit(f"error: {error}")
