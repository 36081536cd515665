"""What a generator gives away of known training images: python -m gbc.audit data/generators/mine --train train.npz --control control.npz.

For whoever has the images. Controls are images of the same classes that the classifier never saw: what is as near to them as to the
training images is of the class, not of the images. Prints the scores beside their baselines.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gbc.params import InputError
from gbc.sample import check_draw

if TYPE_CHECKING:  # imported where they are used: `--help` answers at once
    import pandas as pd
    from torch import Tensor

SHOWN = 60  # training images in the picture


def audit(
    artifact: Path, train_file: Path, control_file: Path, count: int, seed: int
) -> tuple[dict[str, dict[str, float]], "pd.DataFrame", dict[str, "Tensor"]]:
    """Scores of `count` samples of the generator in folder `artifact` and of its baselines; every image's best SSIM; and pictures.

    The pictures, bytes, are the training images that are reproduced best, and the nearest sample of each. Raises `InputError` if a file is
    missing or not what it should be, its images are not of the generator's shape, one has a label that the generator does not know, one
    is in both, `count` or `seed` is out of range, or the generator's training diverged.
    """
    check_draw(count, seed)
    import pandas as pd
    import torch

    from gbc.artifacts import load_network
    from gbc.datasets import SMALLEST, read_npz
    from gbc.evaluation import Images, baselines, compare, overlap, shared_scores
    from gbc.generator import Mixture, to_uint8

    generator = load_network(artifact, Mixture)
    shape, known = generator.output_shape, sorted(set().union(*generator.known))
    if len(shape) == 1 or min(shape[-2:]) < SMALLEST:
        raise InputError(f"{artifact}: its samples have shape {list(shape)}; scores by SSIM need {SMALLEST}×{SMALLEST} pixels at least")
    parts = []
    for path in (train_file, control_file):
        x, y = read_npz(path)
        if x.shape[1:] != shape:
            raise InputError(f"{path}: images of shape {list(x.shape[1:])}, but {artifact} makes {list(shape)}")
        if strange := sorted(set(y.tolist()) - set(known)):
            raise InputError(f"{path}: label {strange[0]} is unknown to {artifact}; it knows {', '.join(map(str, known))}")
        parts.append(Images(torch.from_numpy(x), torch.from_numpy(y).long()))
    train, control = parts
    if overlap(train.x, control.x):
        raise InputError(f"{control_file}: some of its images are in {train_file} too; controls are images that the classifier never saw")
    generated = Images(*generator.sample(count, torch.Generator().manual_seed(seed)))
    ours = compare(generated, train, control)
    scores = {"generated": shared_scores(ours)} | baselines(generator, train, control, count, seed)
    best, nearest = ours.train.max(0)
    roles = {"train": (best, train), "control": (ours.control.amax(0), control)}
    tables = [pd.DataFrame({"images": role, "label": images.y, "ssim": values}) for role, (values, images) in roles.items()]
    order = best.argsort(descending=True, stable=True)[:SHOWN]
    pictures = {"generated": to_uint8(generated.x[nearest[order]]), "train": to_uint8(train.x[order])}
    return scores, pd.concat([table.rename_axis("place").reset_index() for table in tables]), pictures


def main() -> None:
    """The command; bad input ends in one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m gbc.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of the generator")
    parser.add_argument("--train", type=Path, required=True, help="npz file of the training images: `images` and `labels`")
    parser.add_argument("--control", type=Path, required=True, help="npz file of images never seen, best as many of each class")
    parser.add_argument("--count", type=int, default=2000, help="samples to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds draw equal samples (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="folder for found.png, the training images reproduced best below their nearest sample, and ssim.csv"
    )
    arguments = parser.parse_args()
    try:
        scores, table, pictures = audit(arguments.artifact, arguments.train, arguments.control, arguments.count, arguments.seed)
        from gbc.page import beside

        generated = scores.pop("generated")
        print(beside(generated | {"baselines": scores}).to_string(float_format="{:.3f}".format))
        if arguments.out:
            from gbc.artifacts import save_table
            from gbc.figures import fig_images, save_figure

            save_table(arguments.out / "ssim.csv", table)
            title = "Even rows: the training images reproduced best; odd rows: the sample nearest to each"
            figure = fig_images(pictures["generated"].numpy(), pictures["train"].numpy(), 1, title)
            save_figure(arguments.out / "found.png", figure)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
