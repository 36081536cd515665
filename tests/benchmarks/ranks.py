"""Seconds of so many steps of `mnist_plain`, on a random classifier of its size: `torchrun -m tests.benchmarks.ranks <steps>`."""

import dataclasses
import sys

import torch

from gbc.classifier import Classifier
from gbc.distributed import processes, rank
from gbc.homogeneity import Homogeneity
from gbc.params import load_params
from gbc.training import train

NAME = "mnist_plain"


def seconds(steps: int) -> float:
    """What training took, all processes together."""
    params = dataclasses.replace(load_params([]), steps=steps)
    pretrain, task = params.pretrain[NAME], dataclasses.replace(params.train_single[NAME], length=1.0)
    network = Classifier(pretrain.architecture, (28, 28), tuple(pretrain.hidden), tuple(range(10)))
    network.initialise(torch.Generator().manual_seed(0), pretrain.first_scale, pretrain.rest_scale)
    homogeneity = Homogeneity({key: 1 / 3 for key, _ in network.named_parameters()}, {}, 0, 0.0)
    with processes(torch.device("cpu")) as device:
        _, _, taken = train(params, task, [network], [homogeneity], device)
        if rank() == 0:
            print(taken)
    return taken


if __name__ == "__main__":
    seconds(int(sys.argv[1]))
