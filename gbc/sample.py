"""Draw images from a generator's folder, with no other file: python -m gbc.sample data/generators/mnist --label 3 --out grid.png."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gbc.params import InputError

if TYPE_CHECKING:  # imported where they are used: `--help` answers at once
    from torch import Tensor

    from gbc.generator import Mixture


def check_draw(count: int, seed: int) -> None:
    """Raises `InputError` if so many samples cannot be drawn, or not with this seed."""
    if count < 1:
        raise InputError(f"count={count} is less than 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed} is not in [0, 2^63)")


def agreed_images(mixture: "Mixture", label: int | None = None) -> "Tensor":
    """Images [n, *output_shape] at the first member's anchors that another agrees on, of `label` or all, those of the largest SSIM first.

    Raises `InputError` if there is one member alone, or no such code.
    """
    from gbc.similarity import AGREED, agreement, surest

    if mixture.members == 1:
        raise InputError("this generator has one member, which has none to agree with; `members` in params.yaml has to be 2 or more")
    x, y = mixture.bank()
    similarity = agreement(x, y, mixture.heard(), mixture.members)
    order = surest(similarity, mixture.members)
    order = order[(similarity[order] > AGREED) & ((y[order] == label) | (label is None))]
    if not len(order):
        raise InputError(f"the members of this generator agree on no image{'' if label is None else f' of label {label}'}")
    return x[order]


def grid(artifact: Path, count: int, seed: int, label: int | None = None, agreed: bool = False) -> bytes:
    """A square grid of `count` images drawn from the generator in folder `artifact`, as PNG.

    With `agreed`, at most `count` of its first member's fixed codes that another member agrees on, the surest first; `seed` has no effect.
    Raises `InputError` if there is no generator, it makes no images, the label is unknown, `count` or `seed` is out of range, or, with
    `agreed`, it has one member, or they agree on nothing.
    """
    check_draw(count, seed)
    import torch
    from torchvision.utils import make_grid

    from gbc.artifacts import load_network, png
    from gbc.generator import Mixture, to_uint8

    generator = load_network(artifact, Mixture)
    shape = generator.output_shape
    if len(shape) < 2 or math.prod(shape[:-2]) not in (1, 3):
        raise InputError(f"{artifact}: its samples have shape {list(shape)}; there are no images to draw")
    if agreed:
        images = agreed_images(generator, label)[:count]
    else:
        images, _ = generator.sample(count, torch.Generator().manual_seed(seed), label=label)
    images = images.reshape(len(images), -1, *shape[-2:])
    return png(to_uint8(make_grid(images, nrow=math.ceil(math.sqrt(len(images))))).numpy())


def main() -> None:
    """The command; bad input ends in one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m gbc.sample", description=__doc__)
    parser.add_argument("artifact", type=Path, help="folder with architecture.json and weights.safetensors")
    parser.add_argument("--label", type=int, help="draw this label alone; all labels in equal shares without it")
    parser.add_argument("--count", type=int, default=64, help="number of images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds draw equal images (default: %(default)s)")
    parser.add_argument("--agreed", action="store_true", help="not fresh noise, but what members born apart agree on, the surest first")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    try:
        picture = grid(arguments.artifact, arguments.count, arguments.seed, arguments.label, arguments.agreed)
        from gbc.artifacts import write_bytes

        write_bytes(arguments.out, picture)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
