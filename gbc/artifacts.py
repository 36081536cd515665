"""Files that pass between stages: atomic, byte-stable, free of pickle.

Tensors are safetensors without metadata, tables are CSV, everything else is JSON with sorted keys, so that equal
contents are equal bytes and DVC's hashes mean what they say.
"""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor, nn

from gbc.params import InputError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """Content of `path`; raises `InputError` if there is no such file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); run `dvc pull`, or `dvc repro` to make it") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors."""
    write_bytes(path, serialize_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file; raises `InputError` if it is missing, truncated or something else."""
    try:
        return parse_tensors(read_bytes(path))
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); restore it with `dvc checkout` or make it anew") from error


def save_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys; NaN and infinity are refused."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def load_json(path: Path) -> Any:
    """Value of a JSON file; raises `InputError` if it is missing or not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore it with `dvc checkout` or make it anew") from error


class Network(nn.Module):
    """A network that files can hold: `architecture_keys` names its constructor's arguments, kept as attributes."""

    architecture_keys: ClassVar[tuple[str, ...]]


N = TypeVar("N", bound=Network)


def save_network(folder: Path, network: Network) -> None:
    """Write architecture.json and weights.safetensors: the whole network."""
    save_json(folder / "architecture.json", {key: getattr(network, key) for key in network.architecture_keys})
    save_tensors(folder / "weights.safetensors", network.state_dict())


def load_network(folder: Path, kind: type[N]) -> N:
    """Read what `save_network` wrote; raises `InputError` if a file is missing or damaged, or the two do not match."""
    description, weights = load_json(folder / "architecture.json"), load_tensors(folder / "weights.safetensors")
    try:
        network = kind(**{key: _tuples(description[key]) for key in kind.architecture_keys})
        network.load_state_dict(weights)
    except InputError as error:
        raise InputError(f"{folder}/architecture.json: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{folder}: weights.safetensors does not fit architecture.json ({' '.join(str(error).split())})") from error
    return network


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def png(image: np.ndarray) -> bytes:
    """An image [height, width] or [channels, height, width] of bytes as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(image, 0, -1) if image.ndim == 3 else image).save(buffer, format="png")
    return buffer.getvalue()


def save_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, seven significant digits."""
    write_bytes(path, table.to_csv(index=False, float_format="%.7g", lineterminator="\n").encode())


def load_table(path: Path) -> pd.DataFrame:
    """Table of a CSV file; raises `InputError` if it is missing or not a table."""
    try:
        return pd.read_csv(io.BytesIO(read_bytes(path)))
    except ValueError as error:
        raise InputError(f"{path}: not a CSV table ({error}); restore it with `dvc checkout` or make it anew") from error
