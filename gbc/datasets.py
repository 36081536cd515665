"""Images, sampled: a balanced, seeded training subset, controls, and a reference set of the same classes.

The classifier's stages import this module; the generator's never do. torchvision is imported where it is used: it takes two seconds.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from skimage.data import lfw_subset
from torch import Tensor

from gbc.params import InputError, SampleParams

REFERENCE = 2000  # images at most that play the perfect generator
CELEBA_SIZE = 32  # pixels; the paper's
SMALLEST = 11  # pixels of a side: the window of SSIM
ROLES = ("train", "control", "reference")


@dataclass(frozen=True)
class Pool:
    """What a source offers: the class of every item, and a function that loads chosen items as [n, *shape] float32."""

    y: np.ndarray
    load: Callable[[np.ndarray], np.ndarray]


def _pool(x: np.ndarray, y: np.ndarray) -> Pool:
    return Pool(np.asarray(y), lambda chosen: x[chosen])


def _reader(data: Any, path: str) -> Callable[[np.ndarray], np.ndarray]:
    """Loads chosen items of a torchvision dataset that reads image files."""

    def read(chosen: np.ndarray) -> np.ndarray:
        try:
            return np.stack([data[i][0].numpy() for i in chosen]) / np.float32(255)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: images must be readable and of one size ({error})") from error

    return read


def _circle(params: SampleParams) -> Pool:
    """The paper's toy: 18 points evenly spaced on the unit circle, three arcs of six as classes; or one half of an even split."""
    angle = 2 * np.pi * np.arange(18) / 18
    part = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}.get(params.path)
    if part is None:
        raise InputError(f"source circle has the parts all, even and odd, not path={params.path!r}")
    return _pool(np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)[part], (np.arange(18) // 6)[part])


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images` [n, height, width] or [n, channels, height, width], uint8 or float in [0, 1], and integer `labels` [n].

    Returns float32 images, where one channel becomes [height, width], and labels. Raises `InputError` if the file is not so.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not an npz file with arrays `images` and `labels` ({error})") from error
    if labels.shape != images.shape[:1] or images.ndim not in (3, 4) or not images.size:
        raise InputError(f"{path}: labels {labels.shape} do not match images {images.shape}; one integer label per image is needed")
    if images.dtype == np.uint8:
        images = images / np.float32(255)
    if not (
        np.issubdtype(images.dtype, np.floating) and images.min() >= 0 and images.max() <= 1 and np.issubdtype(labels.dtype, np.integer)
    ):
        raise InputError(f"{path}: images must be uint8, or float in [0, 1], and labels integers")
    return (images[:, 0] if images.shape[1:-2] == (1,) else images).astype(np.float32), labels


def _npz(params: SampleParams) -> Pool:
    return _pool(*read_npz(Path(params.path)))


def _torchvision(params: SampleParams) -> Pool:
    """The original 60,000 training images of MNIST, fetched into `path` by torchvision where they are not there."""
    from torchvision.datasets import MNIST

    try:
        data = MNIST(params.path, train=True, download=True)
    except Exception as error:  # torchvision raises half a dozen for files that are not whole
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{params.path}: no MNIST there and none could be fetched ({reason}); place its files in {params.path}/MNIST/raw"
        ) from error
    return _pool(data.data.numpy() / np.float32(255), data.targets.numpy())


def _faces(params: SampleParams) -> Pool:
    """scikit-image's `lfw_subset`: 25×25 grey, 100 faces (class 1) and 100 patches without a face (class 0)."""
    return _pool(lfw_subset().astype(np.float32), np.repeat([1, 0], 100))


def _celeba(params: SampleParams) -> Pool:
    """CelebA in torchvision's layout under `path`, classes 0 and 1 of one attribute, centre-cropped, 32×32, colour.

    The crop is the largest centred square of the aligned 178×218 images.
    """
    from torchvision.datasets import CelebA
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    transform = Compose([CenterCrop(178), Resize((CELEBA_SIZE, CELEBA_SIZE), antialias=True), PILToTensor()])
    try:
        fetch = not Path(params.path, "celeba/img_align_celeba").exists()
        data = CelebA(params.path, split="train", target_type="attr", transform=transform, download=fetch)
    except Exception as error:  # gdown's have no class in common
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{params.path}/celeba: no whole copy of CelebA there ({reason}); place img_align_celeba/, list_attr_celeba.txt, "
            "identity_CelebA.txt, list_bbox_celeba.txt, list_landmarks_align_celeba.txt and list_eval_partition.txt there, or "
            "`pip install gdown` to fetch them"
        ) from error
    if params.attribute not in (known := [name for name in data.attr_names if name]):  # the header ends in a space
        raise InputError(f"CelebA has no attribute {params.attribute!r}; it has {', '.join(known)}")
    return Pool(data.attr[:, data.attr_names.index(params.attribute)].numpy(), _reader(data, params.path))


def _folder(params: SampleParams) -> Pool:
    """One sub-folder per class, sorted by name, of images of one size; grey images become [height, width]."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    try:
        data = ImageFolder(params.path, transform=PILToTensor())
    except (OSError, ValueError) as error:
        raise InputError(f"{params.path}: not a folder with one folder of images per class ({error})") from error

    read = _reader(data, params.path)

    def load(chosen: np.ndarray) -> np.ndarray:
        images = read(chosen)
        return images[:, 0] if (images == images[:, :1]).all() else images

    return Pool(np.array(data.targets), load)


SOURCES: dict[str, Callable[[SampleParams], Pool]] = {
    "circle": _circle,
    "mnist": _npz,
    "npz": _npz,
    "torchvision": _torchvision,
    "faces": _faces,
    "celeba": _celeba,
    "folder": _folder,
}


def sample(params: SampleParams, seed: int) -> dict[str, Tensor]:
    """Balanced subset of a source: `{role}_x` float32 [n, *shape] and `{role}_y` int64 [n] for every role.

    `train` has `per_class` images of each class, drawn without replacement; `control` as many others and `reference` at most
    2,000 others, where the source has any left (else they are empty). Every class is drawn from its own stream of `seed`, so a
    class's images do not depend on which other classes are asked for. Raises `InputError` if a class has too few images, none is
    left as a control, or images are too small to be compared or neither grey nor of three channels.
    """
    if len(params.classes) < 2 or len(set(params.classes)) < len(params.classes):
        raise InputError(f"classes={params.classes} must name at least two classes, and each once")
    pool = SOURCES[params.source](params)
    chosen: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    for label in params.classes:
        found = np.flatnonzero(pool.y == label)
        if len(found) < params.per_class:
            raise InputError(f"source {params.source} has {len(found)} images of class {label}, fewer than per_class={params.per_class}")
        order = np.random.default_rng([seed, label]).permutation(found)
        bounds = [params.per_class, 2 * params.per_class, 2 * params.per_class + REFERENCE // len(params.classes)]
        for role, part in zip(ROLES, np.split(order, bounds), strict=False):
            chosen[role].append(part)
    for role in ROLES[1:]:  # balanced, or absent
        size = min(len(part) for part in chosen[role])
        chosen[role] = [part[:size] for part in chosen[role]]
    images = pool.load(np.concatenate([index for parts in chosen.values() for index in parts]))
    drawn = {}
    for role, parts in chosen.items():
        counts = [len(part) for part in parts]
        own, images = np.split(images, [sum(counts)])
        drawn[f"{role}_x"] = torch.from_numpy(np.ascontiguousarray(own)) if len(own) else torch.empty(0)
        drawn[f"{role}_y"] = torch.from_numpy(np.repeat(params.classes, counts)).long()
    shape, source = drawn["train_x"].shape[1:], f"source {params.source}"
    if len(shape) > 1 and min(shape[-2:]) < SMALLEST:
        raise InputError(f"{source} has images of {shape[-2]}×{shape[-1]} pixels; scores by SSIM need {SMALLEST}×{SMALLEST} at least")
    if len(shape) == 3 and shape[0] != 3:
        raise InputError(f"{source} has images of {shape[0]} channels; grey ones have one, colour ones three")
    if len(shape) > 1 and params.per_class < 2:
        raise InputError(f"per_class={params.per_class} is too few: images of a class are compared, which takes 2 at least")
    if len(shape) > 1 and not len(drawn["control_x"]):
        raise InputError(f"{source} has no image of some class left as a control: per_class={params.per_class} is too many")
    return drawn
