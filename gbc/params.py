"""params.yaml as typed, validated, frozen dataclasses, filled by Hydra's compose; and the frame of every stage's command."""

import dataclasses
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

if TYPE_CHECKING:
    import torch  # imported where it is used: `--help` answers at once

T = TypeVar("T")


class InputError(Exception):
    """Bad input, told in one line: what is wrong, where, and what to do."""


def ranged(low: float, high: float = float("inf"), default: Any = dataclasses.MISSING) -> Any:
    """A number, or list of numbers, in [low, high]; required, unless there is a `default`."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(*choices: str) -> Any:
    """A required string out of `choices`."""
    return field(metadata={"choices": choices})


@dataclass(frozen=True)
class SampleParams:
    """One dataset: where its images are, which classes, how many of each."""

    source: str = one_of("circle", "mnist", "torchvision", "faces", "celeba", "npz", "folder")
    classes: list[int] = ranged(0.0)
    per_class: int = ranged(1.0)
    path: str = ""
    attribute: str = ""


ARCHITECTURES = ("homogeneous", "biased", "batchnorm", "convolutional", "residual")


@dataclass(frozen=True)
class PretrainParams:
    """One classifier, trained on the dataset of its name: architecture and full-batch descent."""

    architecture: str = one_of(*ARCHITECTURES)
    hidden: list[int] = ranged(1.0)
    first_scale: float = ranged(0.0)
    rest_scale: float = ranged(0.0)
    step_size: float = ranged(0.0)
    momentum: float = ranged(0.0, 0.999)
    weight_decay: float = ranged(0.0)
    smoothing: float = ranged(0.0, 1000.0)
    max_steps: int = ranged(1.0)
    settle_steps: int = ranged(0.0)
    stop_log_loss: float = ranged(float("-inf"))
    plateau: float = ranged(0.0, 1.0)
    precision: str = one_of("float32", "float64")


@dataclass(frozen=True)
class LambdaParams:
    """Random inputs of the Euler equations: number of batches, at least, and samples in each."""

    inputs: int = ranged(1.0)
    batch: int = ranged(2.0)


@dataclass(frozen=True)
class GeneratorParams:
    """What all generators share: the networks g and h, the optimiser, the constants of the loss."""

    noise: int = ranged(1.0)
    spread: float = ranged(0.0)
    width: int = ranged(1.0)
    channels: int = ranged(4.0)
    learning_rate: float = ranged(0.0)
    alpha_learning_rate: float = ranged(0.0)
    delta: float = ranged(0.0)


@dataclass(frozen=True)
class TrainParams:
    """One generator: the classifiers that it is born from, and the weights of its loss."""

    classifiers: list[str]
    anchors: int = ranged(1.0)
    batch: int = ranged(2.0)
    length: float = ranged(0.0)
    matrix_learning_rate: float = ranged(0.0)
    stationarity: float = ranged(0.0)
    duality: float = ranged(0.0)
    gate: float = ranged(0.0)
    total_variation: float = ranged(0.0)
    statistics: float = ranged(0.0)
    collapse: float = ranged(0.0)
    margin_reward: float = ranged(0.0, 1.0)
    multiplier: str = one_of("relu", "softplus", "equal")
    multiplier_floor: float = ranged(0.0, 1.0)
    matmul_precision: str = one_of("highest", "high", "medium")
    images: int = ranged(0.0, default=0)
    members: int = ranged(1.0, 100.0, default=1)
    polish: float = ranged(0.0, default=0.0)


@dataclass(frozen=True)
class CelebAParams:
    """CelebA: one task for every attribute, none by default."""

    attributes: list[str]
    sample: SampleParams
    pretrain: PretrainParams
    train: TrainParams


@dataclass(frozen=True)
class EvaluateParams:
    """Samples drawn from every generator."""

    samples: int = ranged(1.0)


@dataclass(frozen=True, kw_only=True)
class Params:
    """The whole of params.yaml."""

    beta: float = ranged(0.0)
    seed: int = ranged(0.0, 2.0**53)
    steps: int = ranged(1.0)
    device: str = one_of("auto", "cpu", "cuda")
    launch: str
    sample: dict[str, SampleParams]
    pretrain: dict[str, PretrainParams]
    estimate_lambda: LambdaParams
    generator: GeneratorParams
    train_single: dict[str, TrainParams]
    train_multi: dict[str, TrainParams]
    evaluate: EvaluateParams
    celeba: CelebAParams

    @property
    def train(self) -> dict[str, TrainParams]:
        """Every generator, born from one classifier or several."""
        return self.train_single | self.train_multi

    def training_steps(self, length: float) -> int:
        """Steps of a training of this `length`, at least one."""
        return max(1, round(self.steps * length))


def _fill(kind: Any, value: Any, name: str, allowed: Mapping[str, Any]) -> Any:
    """`value` as a `kind`, a dataclass or an annotation of one of its fields; raises `InputError` with the full `name` of what is wrong."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        fields = {part.name: part for part in dataclasses.fields(kind)}
        prefix = f"{name}." if name else ""
        if unknown := sorted(set(map(str, value)) - set(fields)):
            raise InputError(f"{prefix}{unknown[0]} is not a parameter; {name or 'the top level'} has {', '.join(fields)}")
        required = {part.name for part in fields.values() if part.default is dataclasses.MISSING}
        if missing := sorted(required - set(map(str, value))):
            raise InputError(f"{prefix}{missing[0]} is missing")
        hints = get_type_hints(kind)
        return kind(
            **{str(key): _fill(hints[str(key)], inner, f"{prefix}{key}", fields[str(key)].metadata) for key, inner in value.items()}
        )
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return {str(key): _fill(get_args(kind)[1], inner, f"{name}.{key}", allowed) for key, inner in value.items()}
    if get_origin(kind) is list and isinstance(value, list):
        return [_fill(get_args(kind)[0], inner, name, allowed) for inner in value]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{name}={value!r} is not a {getattr(kind, '__name__', kind)}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{name}={value} is not finite")
    if "low" in allowed and not allowed["low"] <= value <= allowed["high"]:
        raise InputError(f"{name}={value} is not in [{allowed['low']:g}, {allowed['high']:g}]")
    if "choices" in allowed and value not in allowed["choices"]:
        raise InputError(f"{name}={value} is not one of {', '.join(allowed['choices'])}")
    return value


def load_params(overrides: list[str], path: Path = Path("params.yaml")) -> Params:
    """Parameters of `path` with Hydra `overrides` (key=value) applied.

    Every attribute of `celeba.attributes` becomes a task named celeba_<attribute>. Raises `InputError` that names the key if
    one is unknown, missing, of the wrong type or out of range.
    """
    try:
        with initialize_config_dir(str(path.parent.resolve()), version_base="1.3"):
            config = OmegaConf.to_container(compose(path.stem, overrides=overrides), resolve=True)
        params = _fill(Params, config, "", {})
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} with {' '.join(overrides) or 'no overrides'}: {' '.join(str(error).split())}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for block, count in (("train_single", 1), ("train_multi", 2)):
        for name, task in getattr(params, block).items():
            if len(task.classifiers) != count:
                raise InputError(f"{path}: {block}.{name}.classifiers={task.classifiers} must name {count}")
    for attribute in params.celeba.attributes:
        name = f"celeba_{attribute}"
        params.sample[name] = dataclasses.replace(params.celeba.sample, attribute=attribute)
        params.pretrain[name] = params.celeba.pretrain
        params.train_single[name] = dataclasses.replace(params.celeba.train, classifiers=[name])
    return params


def entry(block: Mapping[str, T], name: str) -> T:
    """Entry `name` of a block of params.yaml; raises `InputError` if there is none."""
    if name not in block:
        raise InputError(f"params.yaml has no {name!r} for this stage; it has {', '.join(block)}")
    return block[name]


def device(params: Params) -> "torch.device":
    """The device to train on: CUDA where there is one, unless `device` says otherwise."""
    import torch

    if params.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda, but PyTorch finds no CUDA device here; set device=auto or device=cpu")
    return torch.device("cuda" if params.device != "cpu" and torch.cuda.is_available() else "cpu")


def run_stage(main: Callable[..., None]) -> None:
    """Run `main(params, *names)` from the command line: names first, then Hydra overrides.

    `--help` prints what the stage does. Bad input ends in one line on stderr and exit code 1. `main` imports what it needs
    itself, so that neither waits for PyTorch.
    """
    arguments = list(inspect.signature(main).parameters)[1:]
    usage = " ".join(["usage: python -m stages." + Path(sys.argv[0]).stem, *arguments, "[key=value ...]"])
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage, sys.modules[main.__module__].__doc__, inspect.getdoc(main), "Keys and their comments: params.yaml.", sep="\n")
        return
    names = [argument for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    try:
        if len(names) != len(arguments):
            raise InputError(usage)
        params = load_params(overrides)
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        torch.set_deterministic_debug_mode("error")  # imports less than use_deterministic_algorithms, in a third of the time
        main(params, *names)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
