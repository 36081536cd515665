"""Studies over several seeds: what every term of a generator's loss is worth, how size matters, and what the whole pipeline scores."""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from torch import Tensor

from gbc.artifacts import load_json, load_table, save_json, save_table
from gbc.classifier import Classifier
from gbc.datasets import sample
from gbc.evaluation import evaluate
from gbc.generator import Generator, Mixture, Pixels
from gbc.homogeneity import Homogeneity, estimate
from gbc.params import InputError, Params, TrainParams, device, entry
from gbc.pretraining import pretrain
from gbc.training import PIXEL_RATE, Trained, train

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
PROBE = 20  # steps that tell how long one takes
SIZES = [(10, 1.0), (20, 1.0), (50, 1.0), (100, 1.0), (20, 0.25), (20, 0.5), (20, 2.0)]  # images per class, relative width
SEEDS = 3
APART = ("seed", "device")  # parameters that may differ between runs whose scores are averaged
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


class Subject(NamedTuple):
    """A classifier that a generator is to be born from, its Λ, and the dataset that scores what is born."""

    data: Mapping[str, Tensor]
    classifier: Classifier
    homogeneity: Homogeneity


def subject(params: Params, source: str) -> Subject:
    """Draw the dataset of classifier `source`, train it, estimate its Λ; all with `params.seed`."""
    data = sample(params.sample[source], params.seed)
    torch.set_float32_matmul_precision("highest")
    classifier, _, _ = pretrain(params.pretrain[source], data, params.seed, device(params))
    rng = torch.Generator().manual_seed(params.seed)
    return Subject(data, classifier, estimate(classifier.train(), classifier.input_shape, params.estimate_lambda, rng))


def born(params: Params, task: TrainParams, parent: Subject, kind: type[Generator] = Generator) -> Trained:
    """Train a generator on a copy of the classifier."""
    torch.set_float32_matmul_precision(task.matmul_precision)
    return train(params, task, [copy.deepcopy(parent.classifier)], [parent.homogeneity], device(params), kind)


def scored(params: Params, trained: Trained, parent: Subject, variant: str) -> dict[str, Any]:
    """The row of a study."""
    torch.set_float32_matmul_precision("highest")
    network = copy.deepcopy(parent.classifier).cpu()
    metrics, _, _ = evaluate(Mixture.of([trained.generator.cpu()]), [network], [parent.data], [[]], params.evaluate.samples, params.seed)
    last = trained.history.iloc[-1]
    return (
        {"variant": variant, "seed": params.seed, "steps": int(last["step"]) + 1, "seconds": trained.seconds}
        | {key: metrics[key] for key in SCORES}
        | {"kkt_residual": last["stationarity"]}
    )


def ablate(params: Params, name: str, known: set[str]) -> Iterator[dict[str, Any]]:
    """A row of scores for every variant of generator `name` that is not `known`.

    Variants that would repeat another are left out. Pixels get about as many seconds as the generator with all terms.
    """
    task = params.train_single[name]
    variants = {variant: dataclasses.replace(task, **changes) for variant, changes in VARIANTS.items()}
    tasks = list(variants.values())
    variants = {variant: changed for k, (variant, changed) in enumerate(variants.items()) if changed not in tasks[:k]}
    if variants.keys() | {PIXELS} <= known:
        return
    parent = subject(params, task.classifiers[0])
    for variant, changed in variants.items():
        if variant not in known:
            yield scored(params, born(params, changed, parent), parent, variant)
    if PIXELS not in known:
        quick = dataclasses.replace(params, generator=dataclasses.replace(params.generator, learning_rate=PIXEL_RATE))
        probe, short = dataclasses.replace(quick, steps=PROBE), dataclasses.replace(task, length=1.0)
        steps = params.steps * born(probe, short, parent).seconds / born(probe, short, parent, Pixels).seconds
        yield scored(params, born(dataclasses.replace(quick, steps=round(steps)), task, parent, Pixels), parent, PIXELS)


def scale(params: Params, name: str, known: set[str]) -> Iterator[dict[str, Any]]:
    """A row of scores for every size that is not `known`: images per class N / classes, or the classifier's hidden widths.

    Batch and anchors keep pace with the images. Each row adds the number of images N, and p/(dN), weights per pixel of them.
    """
    task = params.train_single[name]
    source = task.classifiers[0]
    drawn, net = params.sample[source], params.pretrain[source]
    for images, factor in SIZES:
        variant = f"{images} per class, width × {factor:g}"
        if variant in known:
            continue
        hidden = [max(1, round(factor * width)) for width in net.hidden]
        sized = dataclasses.replace(
            params,
            sample={source: dataclasses.replace(drawn, per_class=images)},
            pretrain={source: dataclasses.replace(net, hidden=hidden)},
        )
        parent = subject(sized, source)
        total = images * len(drawn.classes)
        trained = born(sized, dataclasses.replace(task, anchors=images, batch=total), parent)
        weights = sum(part.numel() for part in parent.classifier.parameters())
        size = {"images": total, "weights_per_pixel": weights / (total * math.prod(parent.classifier.input_shape)), "width": factor}
        yield scored(sized, trained, parent, variant) | size


def collect(path: Path, study: Callable[[Params, str, set[str]], Iterator[dict[str, Any]]], params: Params, name: str) -> None:
    """Add the rows of a study of generator `name` to a table, over `SEEDS` seeds from `params.seed` on; those that are there are kept.

    The parameters stand beside the table, in <path>.json. Raises `InputError` if the task makes points, or the table has other parameters.
    """
    # For every row one generator, as its loss leaves it.
    task = dataclasses.replace(entry(params.train_single, name), members=1, polish=0.0)
    source = task.classifiers[0]
    if params.sample[source].source == "circle":
        raise InputError(f"{name} makes points; a study scores images")
    parts = {"generator": params.generator, "sample": params.sample[source], "pretrain": params.pretrain[source], "train_single": task}
    setting = {"beta": params.beta, "steps": params.steps, "samples": params.evaluate.samples}
    setting |= {f"{part}.{key}": value for part, values in parts.items() for key, value in dataclasses.asdict(values).items()}
    rows = load_table(path).to_dict("records") if path.is_file() else []
    made = load_json(path.with_suffix(".json")) if rows else setting
    if changed := [key for key in setting if made.get(key) != setting[key]]:
        key = changed[0]
        raise InputError(f"{path} was made with {key}={made.get(key)}, not {setting[key]}; keep to it, or delete the table")
    save_json(path.with_suffix(".json"), setting)
    params = dataclasses.replace(params, train_single=params.train_single | {name: task})
    for seed in range(params.seed, params.seed + SEEDS):
        for row in study(dataclasses.replace(params, seed=seed), name, {row["variant"] for row in rows if row["seed"] == seed}):
            rows.append(row)
            save_table(path, pd.DataFrame(rows))


def settings(lock: Mapping[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """Parameters of every stage that `path` comes from, by stage, as dvc.lock records them; empty if no stage makes `path`."""
    found: dict[str, dict[str, Any]] = {}
    for name, stage in lock["stages"].items():
        if any(out["path"] == path for out in stage.get("outs", [])):
            found[name] = stage["params"]["params.yaml"]
            for dependency in stage["deps"]:
                found |= settings(lock, dependency["path"])
    return found


def mark(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of stages' `settings`, but for what may differ between runs whose scores are averaged."""
    shared = {stage: {key: value for key, value in values.items() if key not in APART} for stage, values in found.items()}
    return f"md5-{hashlib.md5(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]}"


def add_run(path: Path, revision: str) -> list[str]:
    """Add scores of a pipeline's run, a git revision or a DVC experiment, to a table; returns the names of the generators added.

    A generator is added if every stage that it comes from had the same seed, and but for that the parameters that dvc.lock has here. Rows
    of other parameters than those go. The code is not compared: after a change of it, delete the table. Raises `InputError` if there is no
    dvc.lock, or the revision is unknown or has no such generator.
    """
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        ours, theirs = (yaml.safe_load(dvc.api.read("dvc.lock", rev=commit)) for commit in (None, revision))
        scores = json.loads(dvc.api.read("reports/metrics.json", rev=revision))
    except (DvcException, OSError) as error:
        raise InputError(f"{revision}: {error}") from error
    rows = []
    for name, values in scores.items():
        here, there = (settings(lock, f"data/evaluations/{name}") for lock in (ours, theirs))
        seeds = {of_stage["seed"] for of_stage in there.values()}
        if mark(there) == mark(here) and len(seeds) == 1:
            kept = {key: value for key, value in values.items() if key != "baselines"}
            rows.append({"variant": name, "seed": seeds.pop(), "params": mark(here)} | kept)
    if not rows:
        raise InputError(f"{revision} has no generator of one seed with the parameters that dvc.lock has here; run dvc repro in both")
    table = pd.DataFrame(rows)
    if path.is_file():
        known = load_table(path)
        marks = {name: mark(settings(ours, f"data/evaluations/{name}")) for name in known["variant"]}
        known = known.loc[known["params"] == known["variant"].map(marks.get)]
        replaced = known.set_index(["variant", "seed"]).index.isin(table.set_index(["variant", "seed"]).index)
        table = pd.concat([known.loc[~replaced], table])
    save_table(path, table)
    return [row["variant"] for row in rows]
