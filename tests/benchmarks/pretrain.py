"""Steps to log-loss −100 on the committed `mnist_biased`: plain gradient descent at its best fixed step size, and ours.

Plain descent is run at several fixed step sizes for as many steps as ours needs in all, at least 1,000. A homogeneous network's
loss falls like a power of time there, log L ≈ a − b·log t; b is fitted to the second half of each run, from whose end the best size
is extrapolated to −100. b is taken to be at least 1, its value in theory (up to a logarithm), which is in plain descent's favour.
"""

import dataclasses
import math
import time

import numpy as np
import torch

from gbc.classifier import Classifier
from gbc.datasets import sample
from gbc.params import load_params
from gbc.pretraining import descend, log_loss
from tests.benchmarks import show

GOAL, SIZES, LEAST = -100.0, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), 1000


def main() -> None:
    """Print the result."""
    params = load_params([])
    task = dataclasses.replace(params.pretrain["mnist_biased"], stop_log_loss=GOAL)
    data = sample(params.sample["mnist_biased"], params.seed)
    x, y = data["train_x"], data["train_y"]

    def network() -> Classifier:
        net = Classifier(task.architecture, (28, 28), tuple(task.hidden), tuple(range(10)))
        net.initialise(torch.Generator().manual_seed(0), task.first_scale, task.rest_scale)
        return net.train()

    began = time.perf_counter()
    last = list(descend(network(), x, y, task))[-1]
    seconds, ours = time.perf_counter() - began, last.step + 1
    needed = {}
    for size in SIZES:
        net, curve = network(), []
        for _ in range(max(LEAST, ours)):
            log = log_loss(net(x), y)
            curve.append(log.item())
            if not math.isfinite(curve[-1]):
                break
            for p, slope in zip(net.parameters(), torch.autograd.grad(log.exp() / len(x), list(net.parameters())), strict=True):
                p.data.sub_(slope, alpha=size)
        half = np.arange(len(curve) // 2, len(curve))
        if math.isfinite(curve[-1]):
            power = max(1.0, -np.polyfit(np.log(half + 1), np.array(curve)[half], 1)[0])
            needed[size] = (curve[-1] - GOAL) / power / math.log(10) + math.log10(len(curve))  # logarithm to base 10 of the steps
    size, steps = min(needed.items(), key=lambda item: item[1])
    show(
        {
            "step_ratio": 10 ** (steps - math.log10(ours)),
            "seconds": seconds,
            "steps": ours,
            "log_loss": last.log_loss,
            "plain_log10_steps": steps,
            "plain_step_size": size,
        }
    )


if __name__ == "__main__":
    main()
