"""Benchmarks: `python -m tests.benchmarks.<name> --json`. Ratios of things measured in turn in one process."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gbc.classifier import Classifier
from gbc.homogeneity import Homogeneity
from gbc.params import TrainParams, load_params


def untrained(name: str) -> tuple[TrainParams, Classifier, Homogeneity]:
    """The committed parameters of a generator born from one classifier, and a classifier of the committed size with random weights."""
    params = load_params([])
    task, pretrain = dataclasses.replace(params.train_single[name], length=1.0), params.pretrain[name]
    network = Classifier(pretrain.architecture, (28, 28), tuple(pretrain.hidden), tuple(params.sample[name].classes))
    network.initialise(torch.Generator().manual_seed(0), pretrain.first_scale, pretrain.rest_scale)
    return task, network, Homogeneity({key: 1 / 3 for key, _ in network.named_parameters()}, {}, 0, 0.0)


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
    """Print the result: one JSON object with --json, else a line for each number."""
    result = {"threads": torch.get_num_threads(), "torch": torch.__version__} | result
    print(json.dumps(result) if "--json" in sys.argv else json.dumps(result, indent=2))
