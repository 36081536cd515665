"""Training on random classifiers, in float64, under `torchrun -m tests.ranks <folder> <architecture>-<steps> …`; rank 0 writes."""

import dataclasses
import sys
from pathlib import Path

import torch

from gbc import closed_form, distributed
from gbc.artifacts import save_tensors
from gbc.classifier import Classifier
from gbc.distributed import processes, rank
from gbc.homogeneity import Homogeneity
from gbc.params import GeneratorParams, TrainParams, load_params
from gbc.training import train

SHARED = GeneratorParams(
    noise=8,
    spread=0.1,
    width=32,
    channels=8,
    learning_rate=1e-3,
    alpha_learning_rate=1e-3,
    delta=0.05,
)
TASK = TrainParams(
    classifiers=["first", "second"],
    anchors=8,
    batch=24,
    length=1.0,
    matrix_learning_rate=0.002,
    stationarity=1.0,
    duality=1.0,
    gate=50.0,
    total_variation=1.0,
    statistics=10.0,
    collapse=3.0,
    margin_reward=0.3,
    multiplier="softplus",
    multiplier_floor=0.3,
    matmul_precision="highest",
)


def classifier(architecture: str, seed: int) -> Classifier:
    """Random weights, and running statistics other than the initial ones."""
    hidden = {"residual": (3,), "convolutional": (3,), "biased": (12, 10)}.get(architecture, (40, 30))
    network = Classifier(architecture, (8, 8), hidden, (0, 1, 2))
    rng = torch.Generator().manual_seed(seed)
    network.initialise(rng, 1.0, 1.0)
    network.settle(torch.rand(30, 8, 8, generator=rng))
    return network


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    closed_form.BLOCK = 192  # numbers: several blocks of neurons
    distributed.SMALL, distributed.WINDOW = 300, 2**14  # some sums are of more
    networks = {name: [classifier(name.split("-")[0], seed) for seed in (0, 1)] for name in sys.argv[2:]}
    with processes(torch.device("cpu")) as device:
        for name, pair in networks.items():
            homogeneities = [Homogeneity({group: 0.5 for group, _ in network.named_parameters()}, {}, 0, 0.0) for network in pair]
            params = dataclasses.replace(load_params([]), steps=int(name.split("-")[1]), generator=SHARED)
            task = dataclasses.replace(TASK, polish=float(name.endswith("polished")))
            generator, history, _, _ = train(params, task, pair, homogeneities, device)
            if rank() == 0:
                state = generator.state_dict() | {"curve": torch.tensor(history.to_numpy())}
                save_tensors(Path(sys.argv[1]) / f"{name}.safetensors", state)
