"""What a long run shows while it lasts: a bar or lines on stderr, and for a generator a picture that is drawn anew."""

import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from gbc.artifacts import save_table, write_bytes
from gbc.distributed import rank

EVERY = 30.0  # seconds between two lines, and between two pictures
LINE = "{desc}: {n_fmt} of {total_fmt} steps, {rate_fmt}, {remaining} left{postfix}"


class _Lines:
    """A file for tqdm, in which all that it writes starts a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, name: str) -> "tqdm[Any]":
    """A bar on a terminal, elsewhere a line every half minute. Of several processes, the first alone shows one."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=name, mininterval=1, disable=rank() > 0)
    return tqdm(total=total, desc=name, mininterval=EVERY, miniters=1, bar_format=LINE, file=_Lines(), disable=rank() > 0)  # type: ignore[arg-type]


class Live:
    """A training as it goes: its loss terms in <path>.csv, their curves beside samples in <path>.png, for a viewer that reloads."""

    def __init__(self, path: Path):
        self.path, self.drawn = path, time.monotonic()

    def due(self) -> bool:
        """Whether half a minute has passed since the start or the last picture; never in a process that is not the first."""
        return rank() == 0 and time.monotonic() - self.drawn > EVERY

    def draw(self, rows: Sequence[Mapping[str, float | int]], samples: Float[Tensor, "n *shape"]) -> None:
        """Write both files from the loss terms so far and samples, images or points."""
        from matplotlib.figure import Figure  # a second, which short trainings need not spend
        from torchvision.utils import make_grid

        table = pd.DataFrame(rows)
        figure = Figure(figsize=(10, 4), dpi=80, layout="constrained")
        left, right = figure.subplots(1, 2)
        for t, part in table.groupby("classifier"):
            for term in ("stationarity", "duality"):
                left.plot(part["step"], part[term], label=f"{term}, classifier {t}")
        left.set(xlabel="step", yscale="log", title=self.path.name)
        left.legend()
        shown = samples.cpu()
        if shown.ndim == 2:
            right.scatter(*shown.T.numpy())
            right.set_aspect("equal")
        else:
            right.imshow(make_grid(shown.reshape(len(shown), -1, *shown.shape[-2:]), nrow=5, pad_value=1).movedim(0, -1).numpy())
            right.axis("off")
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        save_table(self.path.with_suffix(".csv"), table)
        write_bytes(self.path.with_suffix(".png"), picture.getvalue())
        self.drawn = time.monotonic()
