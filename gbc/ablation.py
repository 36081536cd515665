"""What every term of the loss is worth: one task trained again with each switched off, on classifiers of several seeds."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gbc.datasets import sample
from gbc.evaluation import evaluate
from gbc.generator import Generator
from gbc.homogeneity import estimate
from gbc.params import InputError, Params, TrainParams, device
from gbc.pretraining import pretrain
from gbc.training import Trained, train

VARIANTS: dict[str, dict[str, Any]] = {
    "all terms": {},
    "stationarity off": {"stationarity": 0.0},
    "duality off": {"duality": 0.0},
    "statistics off": {"statistics": 0.0},
    "collapse off": {"collapse": 0.0},
    "total variation off": {"total_variation": 0.0},
    "smooth gate off": {"gate": 0.0},
    "learned multipliers": {"multiplier": "relu"},
    "duality and total variation alone": {"stationarity": 0.0, "statistics": 0.0, "collapse": 0.0},
}
PIXELS = "pixels instead of g"
PIXEL_RATE, PROBE = 0.05, 20  # learning rate of pixels, and of h beside them; steps that tell how long one takes
SCORES = [
    "precision_ratio",
    "recall_ratio",
    "train_control_auc",
    "leak_60",
    "diversity_ratio",
    "duplicates",
    "accuracy_on_generated",
    "student_accuracy",
]


class Pixels(Generator):
    """No network: one free image for every anchor of every label, the sigmoid of its parameters (Haim et al. 2022, Buzaglo et al. 2023)."""

    def initialise(self, rng: torch.Generator) -> "Pixels":
        """Images of grey noise."""
        self.layers = nn.Sequential()
        self.raw = nn.Parameter(torch.randn(len(self.labels) * self.anchors, *self.output_shape, generator=rng))
        return self

    def forward(self, epsilon: Float[Tensor, "batch 1"], y: Int[Tensor, " batch"], t: Int[Tensor, " batch"]) -> Tensor:
        """The images of these numbers."""
        return self.raw[epsilon[:, 0].long()].sigmoid()

    def perturb(self, anchor: Int[Tensor, " batch"], y: Int[Tensor, " batch"], rng: torch.Generator) -> Float[Tensor, "batch 1"]:
        """The number of every image: there is no noise."""
        return (torch.searchsorted(self.labels, y) * self.anchors + anchor)[:, None].to(self.raw)

    @torch.no_grad()
    def bank(self) -> tuple[Tensor, Int[Tensor, " bank"]]:
        """All images and their labels."""
        return self.raw.sigmoid(), self.labels.repeat_interleave(self.anchors)


def ablate(params: Params, name: str, seed: int, known: set[str]) -> Iterator[dict[str, Any]]:
    """A row of scores for every variant of task `name` that is not `known`: dataset, classifier and generator are drawn with `seed`.

    Variants that would repeat another are left out. Pixels get about as many seconds as the
    generator with all terms. Raises `InputError` if the task makes points.
    """
    params = dataclasses.replace(params, seed=seed)
    task, place = params.train_single[name], device(params)
    source = task.classifiers[0]
    if params.sample[source].source == "circle":
        raise InputError(f"{name} makes points; an ablation scores images")
    variants = {variant: dataclasses.replace(task, **changes) for variant, changes in VARIANTS.items()}
    settings = list(variants.values())
    variants = {variant: changed for k, (variant, changed) in enumerate(variants.items()) if changed not in settings[:k]}
    missing = [variant for variant in variants if variant not in known]
    missing += [] if PIXELS in known else [PIXELS]
    if not missing:
        return
    data = sample(params.sample[source], seed)
    torch.set_float32_matmul_precision("highest")
    classifier, _, _ = pretrain(params.pretrain[source], data, seed, place)
    homogeneity = estimate(classifier, classifier.input_shape, params.estimate_lambda, torch.Generator().manual_seed(seed))

    def run(settings: Params, changed: TrainParams, kind: type[Generator]) -> Trained:
        torch.set_float32_matmul_precision(changed.matmul_precision)
        return train(settings, changed, [copy.deepcopy(classifier)], [homogeneity], place, kind)

    for variant in missing:
        if variant == PIXELS:
            quick = dataclasses.replace(params, generator=dataclasses.replace(params.generator, learning_rate=PIXEL_RATE))
            probe = dataclasses.replace(quick, steps=round(PROBE / task.length))
            steps = params.steps * run(probe, task, Generator).seconds / run(probe, task, Pixels).seconds
            trained = run(dataclasses.replace(quick, steps=round(steps)), task, Pixels)
        else:
            trained = run(params, variants[variant], Generator)
        torch.set_float32_matmul_precision("highest")
        metrics, _, _ = evaluate(trained.generator.cpu(), [copy.deepcopy(classifier).cpu()], [data], [[]], params.evaluate.samples, seed)
        last = trained.history.iloc[-1]
        yield (
            {"variant": variant, "seed": seed, "steps": int(last["step"]) + 1, "seconds": trained.seconds}
            | {key: metrics[key] for key in SCORES}
            | {"kkt_residual": last["stationarity"]}
        )
