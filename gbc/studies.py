"""Studies over several seeds: what g and every term of its loss are worth, how size matters, and what the whole pipeline scores."""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from torch import Tensor

from gbc.artifacts import load_json, load_table, save_json, save_table
from gbc.classifier import Classifier
from gbc.datasets import sample
from gbc.evaluation import evaluate, final_residual
from gbc.generator import Generator, Mixture, Pixels
from gbc.homogeneity import Homogeneity, estimate
from gbc.params import InputError, Params, TrainParams, device, entry
from gbc.pretraining import pretrain
from gbc.training import FIT_STEPS, Trained, train

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


Study = Callable[[Params, TrainParams, set[str]], Iterator[dict[str, Any]]]  # rows of a task that are not known


class Subject(NamedTuple):
    """A classifier that a generator is to be born from, its Λ, and the dataset that scores what is born."""

    data: Mapping[str, Tensor]
    classifier: Classifier
    homogeneity: Homogeneity


def alone(task: TrainParams) -> TrainParams:
    """One member of the task, as its loss leaves it: without polish."""
    return dataclasses.replace(task, members=1, polish=0.0)


def subject(params: Params, source: str) -> Subject:
    """Draw the dataset of classifier `source`, train it, estimate its Λ; all with `params.seed`."""
    data = sample(params.sample[source], params.seed)
    torch.set_float32_matmul_precision("highest")
    classifier, _, _ = pretrain(params.pretrain[source], data, params.seed, device(params))
    rng = torch.Generator().manual_seed(params.seed)
    return Subject(data, classifier, estimate(classifier.train(), classifier.input_shape, params.estimate_lambda, rng))


def born(params: Params, task: TrainParams, parents: Sequence[Subject], kind: type[Generator] = Generator) -> Trained:
    """Train a generator on copies of the classifiers."""
    torch.set_float32_matmul_precision(task.matmul_precision)
    classifiers = [copy.deepcopy(parent.classifier) for parent in parents]
    return train(params, task, classifiers, [parent.homogeneity for parent in parents], device(params), kind)


def pixels(params: Params, task: TrainParams, parents: Sequence[Subject]) -> list[Trained]:
    """Free images under the same loss, as many draws of them as the task has members, in about as many seconds as these take.

    Polish is of pixels already; a step of its fit, which needs no classifier, counts as one of g.
    """
    probe, short = dataclasses.replace(params, steps=PROBE), dataclasses.replace(task, length=1.0, polish=0.0)
    born(probe, short, parents)  # a process's first steps are slower
    rate = born(probe, short, parents).seconds / born(probe, short, parents, Pixels).seconds
    steps = rate * params.training_steps(task.length)
    if task.polish:
        steps += rate * FIT_STEPS + params.training_steps(task.polish)
    seeds = range(params.seed * task.members, (params.seed + 1) * task.members)  # as members have them
    return [born(dataclasses.replace(params, steps=round(steps), seed=seed), short, parents, Pixels) for seed in seeds]


def scored(params: Params, trained: Sequence[Trained], parents: Sequence[Subject], variant: str) -> dict[str, Any]:
    """The row of a study: of the mixture of what was trained, and the steps of one."""
    torch.set_float32_matmul_precision("highest")
    mixture = Mixture.of([one.generator.cpu() for one in trained])
    networks = [copy.deepcopy(parent.classifier).cpu() for parent in parents]
    data = [parent.data for parent in parents]
    metrics, _, _ = evaluate(mixture, networks, data, [[]] * len(parents), params.evaluate.samples, params.seed)
    return (
        {"variant": variant, "seed": params.seed, "steps": int(trained[0].history["step"].iloc[-1]) + 1}
        | {"seconds": sum(one.seconds for one in trained)}
        | {key: metrics[key] for key in SCORES}
        | {"kkt_residual": final_residual(pd.concat([one.history.assign(member=k) for k, one in enumerate(trained)]))}
    )


def rival(params: Params, task: TrainParams, known: set[str]) -> Iterator[dict[str, Any]]:
    """The row of `pixels` in the place of the task's generator, unless it is `known`."""
    if PIXELS not in known:
        parents = [subject(params, source) for source in task.classifiers]
        yield scored(params, pixels(params, task, parents), parents, PIXELS)


def ablate(params: Params, task: TrainParams, known: set[str]) -> Iterator[dict[str, Any]]:
    """A row of scores for every variant of the task that is not `known`, `pixels` among them.

    Variants that would repeat another are left out.
    """
    variants = {variant: dataclasses.replace(task, **changes) for variant, changes in VARIANTS.items()}
    tasks = list(variants.values())
    variants = {variant: changed for k, (variant, changed) in enumerate(variants.items()) if changed not in tasks[:k]}
    if variants.keys() | {PIXELS} <= known:
        return
    parents = [subject(params, source) for source in task.classifiers]
    for variant, changed in variants.items():
        if variant not in known:
            yield scored(params, [born(params, changed, parents)], parents, variant)
    if PIXELS not in known:
        yield scored(params, pixels(params, task, parents), parents, PIXELS)


def scale(params: Params, task: TrainParams, known: set[str]) -> Iterator[dict[str, Any]]:
    """A row of scores for every size that is not `known`: images per class N / classes, or the one classifier's hidden widths.

    Batch and anchors keep pace with the images. Each row adds the number of images N, and p/(dN), weights per pixel of them.
    """
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
        trained = born(sized, dataclasses.replace(task, anchors=images, batch=total), [parent])
        weights = sum(part.numel() for part in parent.classifier.parameters())
        size = {"images": total, "weights_per_pixel": weights / (total * math.prod(parent.classifier.input_shape)), "width": factor}
        yield scored(sized, [trained], [parent], variant) | size


def collect(path: Path, study: Study, params: Params, task: TrainParams, constants: Mapping[str, Any]) -> None:
    """Add the rows of a study of a task to a table, over `SEEDS` seeds from `params.seed` on; those that are there are kept.

    The parameters stand beside the table, in <path>.json, with the `constants` of the code that its rows depend on. Raises `InputError` if
    the task makes points, or the table has others.
    """
    parts: dict[str, Any] = {"generator": params.generator, "train": task}
    for source in task.classifiers:
        if entry(params.sample, source).source == "circle":
            raise InputError(f"classifier {source} takes points; a study scores images")
        parts |= {f"sample.{source}": params.sample[source], f"pretrain.{source}": entry(params.pretrain, source)}
    setting = {"beta": params.beta, "steps": params.steps, "samples": params.evaluate.samples, **constants}
    setting |= {f"{part}.{key}": value for part, values in parts.items() for key, value in dataclasses.asdict(values).items()}
    rows = load_table(path).to_dict("records") if path.is_file() else []
    made = load_json(path.with_suffix(".json")) if rows else setting
    if changed := [key for key in setting if made.get(key) != setting[key]]:
        key = changed[0]
        raise InputError(f"{path} was made with {key}={made.get(key)}, not {setting[key]}; keep to it, or delete the table")
    save_json(path.with_suffix(".json"), setting)
    for seed in range(params.seed, params.seed + SEEDS):
        for row in study(dataclasses.replace(params, seed=seed), task, {row["variant"] for row in rows if row["seed"] == seed}):
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
