"""One step of training a generator on a random classifier, split into its parts.

`overhead_ratio`: the seconds of everything but the step's residual (g, h, the other terms, the optimisers), by those of the residual and
its gradient with respect to images and multipliers; for the committed `mnist_plain` with a classifier of the committed size, and, under
`wide`, for what `kkt_step` times: 784-3000-100-10, 600 samples, float32.
"""

import dataclasses

import torch

from gbc import training
from gbc.classifier import Classifier
from gbc.closed_form import step_of
from gbc.homogeneity import Homogeneity
from gbc.params import TrainParams, load_params
from tests.benchmarks import interleaved, random_network, show, untrained

STEPS, ROUNDS = 20, 5


def measure(task: TrainParams, network: Classifier, homogeneity: Homogeneity) -> dict[str, float]:
    """The overhead, and the seconds that it is made of."""
    params = dataclasses.replace(load_params([]), steps=STEPS)
    training.HISTORY_ROWS = 1  # as rarely as in a long training
    torch.set_float32_matmul_precision(task.matmul_precision)
    x, mu = torch.rand(task.batch, 28, 28).requires_grad_(), torch.rand(task.batch, 10).requires_grad_()
    own = torch.arange(task.batch) % 10
    step = step_of(network, homogeneity, task.gate or None)

    def residual() -> None:
        step.logits(x)
        step.stationarity(own, mu).backward(inputs=[x, mu])

    def whole_steps() -> None:
        training.train(params, task, [network], [homogeneity], torch.device("cpu"))

    seconds = interleaved({"step": whole_steps, "kkt": residual}, ROUNDS)
    whole = seconds["step"] / STEPS
    return {"overhead_ratio": (whole - seconds["kkt"]) / seconds["kkt"], "seconds_step": whole, "seconds_kkt": seconds["kkt"]}


def main() -> None:
    """Print the result."""
    task, network, homogeneity = untrained()
    wide = dataclasses.replace(task, batch=600, matmul_precision="highest")
    show(measure(task, network, homogeneity) | {"wide": measure(wide, *random_network("homogeneous", [3000, 100]))})


if __name__ == "__main__":
    main()
