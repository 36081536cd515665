"""Benchmarks: `python -m tests.benchmarks.<name> --json`. Ratios of things measured in turn in one process."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gbc.classifier import Classifier
from gbc.homogeneity import Homogeneity
from gbc.params import TrainParams, load_params


def random_network(architecture: str, hidden: Sequence[int]) -> tuple[Classifier, Homogeneity]:
    """A classifier of digits, and a Λ that keeps every parameter.

    Its weights are random and small, as trained ones are: the smooth gate of large inputs is denormal, and slow.
    """
    network = Classifier(architecture, (28, 28), tuple(hidden), tuple(range(10)))
    network.initialise(torch.Generator().manual_seed(0), 0.05, 0.3)
    return network, Homogeneity({name: 1 / 3 for name, _ in network.named_parameters()}, {}, 0, 0.0)


def untrained() -> tuple[TrainParams, Classifier, Homogeneity]:
    """The committed parameters of `mnist_plain`'s generator, and a random classifier of the committed size."""
    params = load_params([])
    pretrain = params.pretrain["mnist_plain"]
    task = dataclasses.replace(params.train_single["mnist_plain"], length=1.0, polish=0.0)
    return task, *random_network(pretrain.architecture, pretrain.hidden)


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every function: one warm-up each, then `rounds` turns of all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors that `function` held at one time, beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        most = max(most, held)
    return most


def show(result: dict[str, Any]) -> None:
    """Print the result: one JSON object, on one line with --json, else a line for each number."""
    result = {"threads": torch.get_num_threads(), "torch": torch.__version__} | result
    print(json.dumps(result, indent=None if "--json" in sys.argv else 2))
