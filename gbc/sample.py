"""Draw images from a generator's folder, with no other file: python -m gbc.sample data/generators/mnist --label 3 --out grid.png."""

import argparse
import math
import sys
from pathlib import Path

from gbc.params import InputError


def grid(artifact: Path, count: int, seed: int, label: int | None = None, agreed: bool = False) -> bytes:
    """A square grid of `count` images drawn from the generator in folder `artifact`, as PNG.

    With `agreed`, at most `count` of its fixed codes that its members agree on, those first on which they agree most; `seed` has no effect.
    Raises `InputError` if there is no generator, it makes no images, the label is unknown, `count` or `seed` is out of range, or there is
    nothing that members agree on.
    """
    if count < 1:
        raise InputError(f"count={count} is less than 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed} is not in [0, 2^63)")
    import torch
    from torchvision.utils import make_grid

    from gbc.artifacts import load_network, png
    from gbc.generator import Mixture, to_uint8
    from gbc.similarity import AGREED, agreement

    generator = load_network(artifact, Mixture)
    shape = generator.output_shape
    if len(shape) < 2 or math.prod(shape[:-2]) not in (1, 3):
        raise InputError(f"{artifact}: its samples have shape {list(shape)}; there are no images to draw")
    labels = sorted(set().union(*generator.known))
    if label is not None and label not in labels:
        raise InputError(f"label {label} is unknown to this generator; it knows {', '.join(map(str, labels))}")
    if agreed:
        images, y = generator.bank()
        similarity = agreement(images, y, generator.members)
        own = torch.arange(len(y)) < len(y) // generator.members  # what a member's code agrees with is another's
        wanted = own & (similarity > AGREED) & (torch.isin(y, y.new_tensor(labels if label is None else [label])))
        if not wanted.any():
            raise InputError(f"{artifact}: its {generator.members} members agree on no image; `members` in params.yaml has to be 2 or more")
        order = similarity.argsort(descending=True, stable=True)
        images = images[order[wanted[order]][:count]]
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
    parser.add_argument("--agreed", action="store_true", help="only images that generators born apart agree on, the surest first")
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
