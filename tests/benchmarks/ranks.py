"""Seconds of so many steps of `mnist_plain`, on a random classifier of its size: `torchrun -m tests.benchmarks.ranks <steps>`."""

import dataclasses
import sys

import torch

from gbc import training
from gbc.distributed import processes, rank
from gbc.params import load_params
from tests.benchmarks import untrained


def seconds(steps: int) -> float:
    """What training took, all processes together."""
    task, network, homogeneity = untrained()
    training.HISTORY_ROWS = 1  # as rarely as in a long training
    params = dataclasses.replace(load_params([]), steps=steps)
    with processes(torch.device("cpu")) as device:
        taken = training.train(params, task, [network], [homogeneity], device).seconds
        if rank() == 0:
            print(taken)
    return taken


if __name__ == "__main__":
    seconds(int(sys.argv[1]))
