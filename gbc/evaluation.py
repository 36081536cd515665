"""How good is a generator, and what does it give away? Every score beside its controls and baselines."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from gbc.classifier import Classifier
from gbc.generator import Generator, Mixture, to_uint8
from gbc.params import InputError
from gbc.similarity import AGREED, agreement, ssim, surest

NEAR = 0.15  # distance at which a toy sample counts as at a training point; neighbours on the circle are 0.35 apart
STUDENT_STEPS, STUDENT_WIDTH = 300, 256
BANK = ["precision_ratio", "recall_ratio", "train_control_auc", "leak_60"]  # scores of the fixed codes: every anchor, without noise
PICTURES = 60  # generated images kept for the figure
NEAR_IMAGE = 0.7  # SSIM above which a fixed code counts as near a real image
EXTENT, GRID = 1.6, 240  # the toy's landscape covers [-EXTENT, EXTENT]² with GRID² places


@dataclass(frozen=True)
class Images:
    """Images [n, *shape], pixels in [0, 1], and their labels [n]."""

    x: Float[Tensor, "n *shape"]
    y: Int[Tensor, " n"]

    def first(self, count: int) -> Int[Tensor, " kept"]:
        """Indices of the first `count` images of every class."""
        return torch.cat([torch.nonzero(self.y == label)[:count, 0] for label in self.y.unique()])


@dataclass(frozen=True)
class Similarities:
    """SSIM of every image of a set with every training and every control image."""

    train: Float[Tensor, "n train"]
    control: Float[Tensor, "n control"]


def compare(images: Images, train: Images, control: Images) -> Similarities:
    """SSIM of `images` with the training and with the control images."""
    return Similarities(*ssim(images.x, torch.cat([train.x, control.x])).split([len(train.x), len(control.x)], dim=1))


def overlap(one: Float[Tensor, "n *shape"], other: Float[Tensor, "m *shape"]) -> bool:
    """Whether some image is in both, bit for bit."""
    return not {image.numpy().tobytes() for image in one}.isdisjoint(image.numpy().tobytes() for image in other)


def auc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> float:
    """P(positive > negative) for one of each drawn at random, ties counted half."""
    difference = positive[:, None] - negative[None]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def diversity(images: Images, per_class: int = 50) -> float:
    """Mean of 1 − SSIM over pairs of different images of one class, averaged over classes."""
    values = []
    for label in images.y.unique():
        similarity = ssim(images.x[images.y == label][:per_class], images.x[images.y == label][:per_class])
        pairs = ~torch.eye(len(similarity), dtype=torch.bool)
        values.append(1 - similarity[pairs].mean())
    return torch.stack(values).mean().item()


def duplicates(images: Images) -> float:
    """Share of images whose SSIM with an earlier one of their class is above 0.95."""
    again = [(ssim(x, x).tril(-1) > 0.95).any(1) for x in (images.x[images.y == label] for label in images.y.unique())]
    return torch.cat(again).double().mean().item()


def shared_scores(similarities: Similarities) -> dict[str, float]:
    """The four scores that baselines share with generators: precision, recall, and what is given away."""
    train_best, control_best = similarities.train.amax(0), similarities.control.amax(0)
    return {
        "ssim_precision": similarities.train.amax(1).mean().item(),
        "ssim_recall": train_best.mean().item(),
        "train_control_auc": auc(train_best, control_best),
        "leak_60": leak(train_best, control_best, 0.6),
    }


def leak(train_best: Tensor, control_best: Tensor, threshold: float) -> float:
    """Share of training images found above `threshold`, less the share of controls."""
    return ((train_best > threshold).double().mean() - (control_best > threshold).double().mean()).item()


def ratios(generated: Images, ours: Similarities, reference: Images, real: Similarities, train: Images) -> dict[str, float]:
    """Precision and recall of generated images over those of as many reference images, as `score_images` has them."""
    count = min(int((part.y == label).sum()) for part in (generated, reference) for label in train.y.unique())
    fair, perfect = ours.train[generated.first(count)], real.train[reference.first(count)]
    return {
        "precision_ratio": (fair.amax(1).mean() / perfect.amax(1).mean()).item(),
        "recall_ratio": (fair.amax(0).mean() / perfect.amax(0).mean()).item(),
    }


def score_images(generated: Images, ours: Similarities, reference: Images, real: Similarities, train: Images) -> dict[str, float]:
    """All similarity metrics of generated images, whose similarities are `ours`.

    `reference` are real images that neither the classifier nor the controls have seen, with similarities `real`. Scored in the same
    way and number, they are a perfect generator.
    """
    train_best, control_best = ours.train.amax(0), ours.control.amax(0)
    return (
        shared_scores(ours)
        | ratios(generated, ours, reference, real, train)
        | {
            "ssim_matched": ours.train[linear_sum_assignment(ours.train.numpy(), maximize=True)].mean().item(),
            "diversity_ratio": diversity(generated) / diversity(train),
            "duplicates": duplicates(generated),
            "leak_50": leak(train_best, control_best, 0.5),
            "recall_40": (train_best > 0.4).double().mean().item(),
            "recall_50": (train_best > 0.5).double().mean().item(),
        }
    )


def score_points(generated: Float[Tensor, "n 2"], train: Float[Tensor, "points 2"], active: Bool[Tensor, " points"]) -> dict[str, float]:
    """Toy metrics: share of samples within 0.15 of a training point, points that carry a multiplier, and those of them so hit."""
    near = torch.cdist(generated, train) < NEAR
    return {
        "within_015": near.any(1).double().mean().item(),
        "points_hit": int((near.any(0) & active).sum()),
        "points_active": int(active.sum()),
    }


def score_index(fixed: Sequence[Float[Tensor, "_ 2"]], train: Sequence[Float[Tensor, "_ 2"]]) -> dict[str, float]:
    """Of the samples of every classifier index, the share within 0.15 of that classifier's points and of the others'; the worst of each."""
    near = torch.tensor(
        [[(torch.cdist(x, points) < NEAR).any(1).double().mean().item() for points in train] for x in fixed], dtype=torch.float64
    )
    own = torch.eye(len(train), dtype=torch.bool)
    return {"own_015": near[own].min().item(), "others_015": near[~own].max().item()}


def accuracy(classifiers: Sequence[Classifier], x: Tensor, y: Int[Tensor, " n"]) -> float:
    """Share of images that a classifier which knows their label names right, as deployed (eval mode)."""
    right = []
    for network in classifiers:
        labels = torch.tensor(network.labels)
        known = torch.isin(y, labels)
        with torch.no_grad():
            right.append(labels[network.eval()(x[known]).argmax(1)] == y[known])
    return torch.cat(right).double().mean().item()


def student_accuracy(generated: Images, test: Images, seed: int) -> float:
    """Accuracy on `test` of a two-layer network trained on `generated` alone (Adam, full batch)."""
    rng = torch.Generator().manual_seed(seed)
    labels = generated.y.unique()
    student = nn.Sequential(
        nn.Flatten(), nn.Linear(generated.x[0].numel(), STUDENT_WIDTH), nn.ReLU(), nn.Linear(STUDENT_WIDTH, len(labels))
    )
    for layer in student:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=rng)
            nn.init.zeros_(layer.bias)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(STUDENT_STEPS):
        loss = F.cross_entropy(student(generated.x), torch.searchsorted(labels, generated.y))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return (labels[student(test.x).argmax(1)] == test.y).double().mean().item()


def score_agreement(agreed: Bool[Tensor, " n"], bank: Similarities) -> dict[str, float | None]:
    """Share of a mixture's codes that its members agree on; and the shares of those, and of the others, near a training image.

    Held-out images are the control: what is near one of these is a plain image of its class. None where there is no code.
    """
    scores: dict[str, float | None] = {"agreed": agreed.double().mean().item()}
    for name, chosen in (("agreed", agreed), ("others", ~agreed)):
        for role, similarity in (("train", bank.train), ("control", bank.control)):
            near = similarity[chosen].amax(1) > NEAR_IMAGE
            scores[f"{name}_{role}_70"] = near.double().mean().item() if len(near) else None
    return scores


def final_residual(history: pd.DataFrame) -> float:
    """Stationarity at the end of training, mean over members and classifiers."""
    return history.groupby(["member", "classifier"])["stationarity"].last().to_numpy().mean().item()


def class_means(train: Images) -> Images:
    """Every training image replaced by the mean of its class: what precision alone is won by."""
    means = {label: train.x[train.y == label].mean(0) for label in train.y.unique().tolist()}
    return Images(torch.stack([means[label] for label in train.y.tolist()]), train.y)


def baselines(generator: Mixture, train: Images, control: Images, count: int, seed: int) -> dict[str, dict[str, float]]:
    """`shared_scores` of what a generator is measured by: the training images, their class means, and itself untrained, `count` samples."""
    rng = torch.Generator().manual_seed(seed)
    untrained = Generator(*(getattr(generator, key) for key in Generator.architecture_keys)).initialise(rng)
    images = {
        "training": train,
        "class_mean": class_means(train),
        "untrained": Images(*untrained.sample(count, torch.Generator().manual_seed(seed))),
    }
    return {name: shared_scores(compare(part, train, control)) for name, part in images.items()}


def evaluate_images(
    generated: Images, generator: Mixture, classifiers: Sequence[Classifier], data: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Any], pd.DataFrame, dict[str, Tensor]]:
    """Metrics of what `generator` generated, the table of best SSIMs behind them, and pictures.

    The pictures are the first images of each class and the nearest training image of each; of several members also what the first
    agrees on with another, of each class the surest.

    `data` holds the training, control and reference images of all classifiers together. Where the source had no reference
    images, the held-out baseline has no `train_control_auc` and no `leak_60`.
    """
    train, control, reference = (Images(data[f"{role}_x"], data[f"{role}_y"]) for role in ("train", "control", "reference"))
    if len(generated.x) < 2 * len(train.y.unique()):
        raise InputError(f"evaluate.samples={len(generated.x)} is too few: {2 * len(train.y.unique())} would be 2 of each class")
    apart = bool(torch.isin(train.y, reference.y).all())
    if not apart:  # a source had no more images: the controls play the perfect generator, and cannot be their own controls
        reference = control
    ours, real = compare(generated, train, control), compare(reference, train, control)
    bank = Images(*generator.bank())
    near_bank = compare(bank, train, control)
    fixed = shared_scores(near_bank) | ratios(bank, near_bank, reference, real, train)
    metrics: dict[str, Any] = score_images(generated, ours, reference, real, train) | {
        **{f"{key}_bank": fixed[key] for key in BANK},
        "teacher_accuracy": accuracy(classifiers, reference.x, reference.y),
        "student_accuracy": student_accuracy(generated, reference, seed),
        "baselines": baselines(generator, train, control, len(generated.x), seed)
        | {"held_out": shared_scores(real) | ({} if apart else {"train_control_auc": None, "leak_60": None})},
    }
    best = {"train": ours.train.amax(0), "control": ours.control.amax(0), "generated": ours.train.amax(1)}
    table = pd.concat([pd.DataFrame({"images": role, "ssim": values.numpy()}) for role, values in best.items()])
    each = max(1, min(PICTURES, len(generated.x)) // len(train.y.unique()))
    shown = generated.first(each)
    nearest = ours.train[shown].argmax(1)
    pictures = {"generated": to_uint8(generated.x[shown]), "nearest": to_uint8(train.x[nearest])}
    if generator.members > 1:
        heard = generator.heard()
        agreed = agreement(bank.x, bank.y, heard, generator.members)
        metrics |= score_agreement(agreed[heard] > AGREED, Similarities(near_bank.train[heard], near_bank.control[heard]))
        order = surest(agreed, generator.members)
        order = torch.cat([order[bank.y[order] == label][:each] for label in train.y.unique()])
        pictures |= {"agreed": to_uint8(bank.x[order]), "agreed_nearest": to_uint8(train.x[near_bank.train[order].argmax(1)])}
    return metrics, table, pictures


def evaluate_points(
    generated: Images,
    generator: Mixture,
    classifiers: Sequence[Classifier],
    samples: Sequence[Mapping[str, Tensor]],
    active: Bool[Tensor, " points"],
    seed: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Toy metrics, and what the toy's figures show: training points, the classifiers' landscapes, samples free and by classifier."""
    if len(generated.x) < len(classifiers):
        raise InputError(f"evaluate.samples={len(generated.x)} is too few: {len(classifiers)} would be one of each classifier")
    train_x, train_y = (torch.cat([part[role] for part in samples]) for role in ("train_x", "train_y"))
    ticks = torch.linspace(-EXTENT, EXTENT, GRID)
    plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).reshape(-1, 2)
    pictures = {
        "extent": torch.tensor(EXTENT),
        "train_x": train_x,
        "train_y": train_y,
        "active": active,
        "samples_x": generated.x,
        "samples_y": generated.y,
    }
    for t, network in enumerate(classifiers):
        with torch.no_grad():
            pictures[f"landscape_{t}"] = network.eval()(plane).argmax(1).reshape(GRID, GRID).to(torch.uint8)
        fixed = generator.sample(len(generated.x) // len(classifiers), torch.Generator().manual_seed(seed), t)
        pictures[f"fixed_{t}_x"], pictures[f"fixed_{t}_y"] = fixed
    metrics = score_points(generated.x, train_x, active)
    if len(samples) > 1:
        metrics |= score_index([pictures[f"fixed_{t}_x"] for t in range(len(samples))], [part["train_x"] for part in samples])
    return metrics, pictures


def evaluate(
    generator: Mixture,
    classifiers: Sequence[Classifier],
    samples: Sequence[Mapping[str, Tensor]],
    active: Sequence[list[bool]],
    count: int,
    seed: int,
) -> tuple[dict[str, Any], pd.DataFrame, dict[str, Tensor]]:
    """Score a generator on `count` samples from fresh noise against its classifiers' datasets, and `active` training points.

    Returns metrics, the table of best SSIMs (empty for points) and pictures. Raises `InputError` if samples are not finite, images are
    fewer than two of each class, points fewer than the classifiers, or one classifier's held-out images are another's training images.
    """
    generated = Images(*generator.sample(count, torch.Generator().manual_seed(seed)))
    shared = {"accuracy_on_generated": accuracy(classifiers, generated.x, generated.y)}
    if len(generator.output_shape) == 1:
        metrics, pictures = evaluate_points(generated, generator, classifiers, samples, torch.tensor(sum(active, [])), seed)
        return metrics | shared, pd.DataFrame({"images": [], "ssim": []}), pictures
    for one, other in itertools.permutations(samples, 2):
        if any(overlap(one["train_x"], other[f"{role}_x"]) for role in ("control", "reference")):
            raise InputError("training images of one classifier are held out for another; give them classes apart, or the same per_class")
    data = {role: torch.cat([part[role] for part in samples]) for role in samples[0]}
    metrics, table, pictures = evaluate_images(generated, generator, classifiers, data, seed)
    return metrics | shared, table, pictures
