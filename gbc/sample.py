"""Draw images from a generator's folder, with no other file: python -m gbc.sample data/generators/mnist --label 3 --out grid.png."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gbc.params import InputError

if TYPE_CHECKING:  # imported where they are used: `--help` answers at once
    from torch import Tensor

    from gbc.generator import Generator


def draw(generator: "Generator", count: int, seed: int, label: int | None = None) -> "Tensor":
    """`count` samples [count, *output_shape] of `label`, or of all labels in equal shares; raises `InputError` if the label is unknown.

    The classifier index is drawn from those that know the label.
    """
    import torch

    rng = torch.Generator().manual_seed(seed)
    if label is None:
        return generator.sample(count, rng)[0]
    knows = torch.tensor([t for t, labels in enumerate(generator.known) if label in labels], dtype=torch.int64)
    if not len(knows):
        raise InputError(f"label {label} is unknown to this generator; it knows {', '.join(map(str, generator.labels.tolist()))}")
    t = knows[torch.randint(len(knows), (count,), generator=rng)]
    y = torch.full_like(t, label)
    anchor = torch.randint(generator.anchors, (count,), generator=rng)
    with torch.no_grad():
        return generator.eval()(generator.perturb(anchor, y, rng), y, t)


def grid(artifact: Path, count: int, seed: int, label: int | None = None) -> bytes:
    """A square grid of `count` images drawn from the generator in folder `artifact`, as PNG.

    Raises `InputError` if there is no generator, it makes no images, the label is unknown, or `count` or `seed` is out of range.
    """
    if count < 1:
        raise InputError(f"count={count} is less than 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed} is not in [0, 2^63)")
    from torchvision.utils import make_grid

    from gbc.artifacts import load_network, png
    from gbc.generator import Generator, to_uint8

    generator = load_network(artifact, Generator)
    shape = generator.output_shape
    if len(shape) < 2 or math.prod(shape[:-2]) not in (1, 3):
        raise InputError(f"{artifact}: its samples have shape {list(shape)}; there are no images to draw")
    images = draw(generator, count, seed, label).reshape(count, -1, *shape[-2:])
    return png(to_uint8(make_grid(images, nrow=math.ceil(math.sqrt(count)))).numpy())


def main() -> None:
    """The command; bad input ends in one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m gbc.sample", description=__doc__)
    parser.add_argument("artifact", type=Path, help="folder with architecture.json and weights.safetensors")
    parser.add_argument("--label", type=int, help="draw this label alone; all labels in equal shares without it")
    parser.add_argument("--count", type=int, default=64, help="number of images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds draw equal images (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    try:
        picture = grid(arguments.artifact, arguments.count, arguments.seed, arguments.label)
        from gbc.artifacts import write_bytes

        write_bytes(arguments.out, picture)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
