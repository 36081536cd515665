"""Seconds to the residual that the published form of the step reaches in its whole budget: ours against it.

Both train one member of the committed `mnist_10` on the committed classifier, from the same seed and with the same loss, the paper's
with statistics: learned multipliers, no collapse term. The published form takes autograd's double backward into weights that require
gradients, Adam, and float32; ours the closed form, Muon for the matrices of g and h, and the committed precision. Each follows its own
learning-rate cosine over its own number of steps. Needs data/classifiers/mnist_10 and data/lambda/mnist_10 (`dvc pull`), and
data/samples/mnist_10.safetensors for the AUC.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gbc import training
from gbc.artifacts import load_network, load_tensors
from gbc.classifier import Classifier
from gbc.evaluation import evaluate
from gbc.generator import Mixture
from gbc.homogeneity import load_homogeneity
from gbc.params import TrainParams, load_params
from gbc.step import DoubleBackward
from tests.benchmarks import show

NAME, PUBLISHED, OURS, SEEDS = "mnist_10", 1800, 1000, (0, 1, 2)
BACKWARD = Tensor.backward


def run(task: TrainParams, steps: int, seed: int) -> tuple[Any, float, float]:
    """Curve of the residual, seconds, and train_control_auc of a training of so many steps."""
    params = dataclasses.replace(load_params([]), seed=seed, steps=steps)
    network = load_network(Path(f"data/classifiers/{NAME}"), Classifier)
    homogeneity = load_homogeneity(Path(f"data/lambda/{NAME}/lambda.json"))
    torch.set_float32_matmul_precision(task.matmul_precision)
    generator, history, _, seconds = training.train(params, task, [network], [homogeneity], torch.device("cpu"))
    torch.set_float32_matmul_precision("highest")
    data = load_tensors(Path(f"data/samples/{NAME}.safetensors"))
    scorer = load_network(Path(f"data/classifiers/{NAME}"), Classifier)
    metrics, _, _ = evaluate(Mixture.of([generator]), [scorer], [data], [[]], 2000, seed)
    return history, seconds, metrics["train_control_auc"]


def main() -> None:
    """Print the result."""
    task = dataclasses.replace(load_params([]).train_single[NAME], length=1.0, polish=0.0, multiplier="relu", collapse=0.0)
    plain = dataclasses.replace(task, matrix_learning_rate=0.0, matmul_precision="highest")
    ratios, rows = [], []
    for seed in SEEDS:
        with (
            mock.patch.object(training, "step_of", DoubleBackward),
            mock.patch.object(Tensor, "backward", lambda loss, inputs=None: BACKWARD(loss)),  # into the weights too
        ):
            theirs, whole, their_auc = run(plain, PUBLISHED, seed)
        goal = theirs["stationarity"].iloc[-1]
        ours, seconds, our_auc = run(task, OURS, seed)
        reached = [curve[curve["stationarity"] <= goal]["step"] for curve in (theirs, ours)]
        times = [(steps.iloc[0] + 1) * one for steps, one in zip(reached, (whole / PUBLISHED, seconds / OURS), strict=True) if len(steps)]
        ratios.append(times[0] / times[1] if len(times) == 2 else 0.0)
        rows.append({"residual": goal, "our_residual": ours["stationarity"].iloc[-1], "auc": their_auc, "our_auc": our_auc})
        rows[-1] |= {"seconds": whole, "our_seconds": seconds, "ratio": ratios[-1]}
    show({"time_to_residual_ratio": statistics.median(ratios), "seeds": rows})


if __name__ == "__main__":
    main()
