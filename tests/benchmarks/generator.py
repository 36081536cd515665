"""One step of training `mnist_plain`'s generator on a random classifier of its size, split into its parts.

`overhead_ratio`: the seconds of everything but the step's residual (g, h, the other terms, the optimisers), by those of the residual and
its gradient with respect to images and multipliers.
"""

import dataclasses
import sys

import torch

from gbc.params import load_params
from gbc.step import step_of
from gbc.training import train
from tests.benchmarks import interleaved, show, untrained

STEPS, ROUNDS = 20, 5


def main(name: str) -> None:
    """Print the result."""
    task, network, homogeneity = untrained(name)
    params = dataclasses.replace(load_params([]), steps=STEPS)
    torch.set_float32_matmul_precision(task.matmul_precision)
    x, mu = torch.rand(task.batch, 28, 28).requires_grad_(), torch.rand(task.batch, 10).requires_grad_()
    own = torch.arange(task.batch) % 10
    step = step_of(network, homogeneity, task.gate or None)

    def residual() -> None:
        step.logits(x)
        step.stationarity(own, mu).backward(inputs=[x, mu])

    seconds = interleaved({"step": lambda: train(params, task, [network], [homogeneity], torch.device("cpu")), "kkt": residual}, ROUNDS)
    whole = seconds["step"] / STEPS
    show({"overhead_ratio": (whole - seconds["kkt"]) / seconds["kkt"], "seconds_step": whole, "seconds_kkt": seconds["kkt"]})


if __name__ == "__main__":
    main(next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "mnist_plain"))
