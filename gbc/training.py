"""Training of a generator on the weights of one or several classifiers (Eqs. 5–7 and 12)."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gbc.artifacts import load_network, save_json, save_network, save_table, save_tensors
from gbc.classifier import Classifier
from gbc.closed_form import step_of
from gbc.distributed import average_gradients, loss_totals, mean, processes, rank, ranks, share
from gbc.generator import Generator, Mixture, Multipliers, to_uint8
from gbc.homogeneity import Homogeneity, load_homogeneity
from gbc.kkt import duality, smallest_margin
from gbc.muon import Muon
from gbc.params import InputError, Params, TrainParams, device
from gbc.progress import Live, progress
from gbc.step import Step

HISTORY_ROWS = 200  # of the loss curve, about
SHOTS, SHOWN = 8, 20  # of the film: its pictures after the first, ever further apart, and the samples in each
FINAL_RATE = 0.02  # of the learning rate, at the end of its cosine


def total_variation(x: Float[Tensor, "batch *shape"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbouring pixels, down plus across; zero for points."""
    if x.ndim < 3:
        return x.new_zeros(())
    return x.diff(dim=-2).abs().mean() + x.diff(dim=-1).abs().mean()


def cosine(step: int, steps: int) -> float:
    """What the learning rate and the weight of total variation are multiplied by: 1 at the start, FINAL_RATE at the end."""
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * step / steps)) / 2


def draw_codes(
    anchors: int, batch: int, labels: Sequence[int], rng: torch.Generator
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Anchors and labels of one batch: every label equally often, and for each label every anchor as equally often as possible."""
    share = batch // len(labels)
    rounds = -(-share // anchors)
    anchor = [torch.cat([torch.randperm(anchors, generator=rng) for _ in range(rounds)])[:share] for _ in labels]
    return torch.cat(anchor), torch.tensor(labels).repeat_interleave(share)


def loss_terms(
    step: Step,
    x: Float[Tensor, "batch *shape"],
    y: Int[Tensor, " batch"],
    mu: Float[Tensor, "batch classes"],
    alpha: Float[Tensor, ""],
    delta: float,
    floor: float,
    collapse: bool,
) -> dict[str, Tensor]:
    """The terms of the loss for one classifier, unweighted; `collapse`, which needs messages of its own, if asked for.

    Duality is in units of the margin asked for, e^{−α}, and `delta` is its share; the unit carries no gradient, or α could shrink
    the loss by shrinking the unit's inverse. `floor` keeps the runner-up's multipliers, the only ones of the paper's
    complementary slackness, from dying.
    """
    own = torch.searchsorted(step.labels, y)
    logits = step.logits(x)
    runner_up = logits.scatter(1, own[:, None], -torch.inf).argmax(1, keepdim=True)
    mu = mu.scatter(1, runner_up, mu.gather(1, runner_up).clamp_min(floor))
    unit = torch.exp(-alpha).detach()
    penalty = duality(smallest_margin(logits, own) / unit, alpha + unit.log(), delta)
    penalty, variation = (part / ranks() for part in loss_totals([penalty.sum() / len(penalty), total_variation(x)]))
    terms = {
        "stationarity": step.stationarity(own, mu),
        "duality": penalty,
        "total_variation": variation,
        "statistics": step.statistics_mismatch(),
    }
    if collapse:
        terms["collapse"] = step.collapse(own)
    return terms


@torch.no_grad()
def initial_alpha(g: Generator, step: Step, task: TrainParams, t: int, rng: torch.Generator) -> Float[Tensor, ""]:
    """α with e^{−α} the mean size of the untrained generator's margins: the classifier's own scale."""
    anchor, y = (part.to(step.labels.device) for part in draw_codes(task.anchors, task.batch, step.network.labels, rng))
    epsilon, y = share(g.perturb(anchor, y, rng)), share(y)
    margin = smallest_margin(step.logits(g(epsilon, y, torch.full_like(y, t))), torch.searchsorted(step.labels, y))
    return -mean(margin.abs()).log()


class Trained(NamedTuple):
    """What training ends with."""

    generator: Generator
    history: pd.DataFrame  # every term of the loss
    film: dict[int, Tensor]  # by the number of steps made, samples of the same codes
    seconds: float


def shot(g: Generator, seed: int) -> Tensor:
    """Samples of the generator as it is, always of the same codes."""
    samples, _ = g.sample(SHOWN, torch.Generator().manual_seed(seed))
    g.train()
    return samples


def train(
    params: Params,
    task: TrainParams,
    classifiers: Sequence[Classifier],
    homogeneities: Sequence[Homogeneity],
    device: torch.device,
    kind: type[Generator] = Generator,
    live: Live | None = None,
) -> Trained:
    """Train g, h and one α per classifier so that the generated distribution satisfies the classifiers' KKT conditions.

    Minimises Σ_t stationarity + β·duality (Eqs. 7 and 12) plus the task's weighted terms. `kind` is g's class; `live` is shown how it
    goes. Raises `InputError` if the classifiers take inputs of different shapes, or `batch` is below their number of labels.
    """
    shape = classifiers[0].input_shape
    if any(classifier.input_shape != shape for classifier in classifiers):
        raise InputError(f"classifiers {', '.join(task.classifiers)} take inputs of different shapes: one generator cannot serve them")
    if task.batch < (classes := max(len(classifier.labels) for classifier in classifiers)):
        raise InputError(f"batch={task.batch} has no sample for each of {classes} labels; set at least {classes}, or several times as many")
    if any(task.batch // len(classifier.labels) * len(classifier.labels) % ranks() for classifier in classifiers):
        raise InputError(f"batch={task.batch} cannot be shared evenly between {ranks()} processes")
    rng = torch.Generator().manual_seed(params.seed)
    shared, count = params.generator, params.training_steps(task)
    known = tuple(classifier.labels for classifier in classifiers)
    g = kind(known, shape, shared.noise, task.anchors, shared.spread, shared.width, shared.channels).initialise(rng)
    h = Multipliers(known, shape, shared.width, task.multiplier).initialise(rng)
    g, h = g.to(device), h.to(device)
    steps = [step_of(c.to(device), homogeneity, task.gate or None) for c, homogeneity in zip(classifiers, homogeneities, strict=True)]
    alpha = torch.stack([initial_alpha(g, step, task, t, rng) for t, step in enumerate(steps)]).requires_grad_()
    linears = [module for module in [*g.modules(), *h.modules()] if isinstance(module, nn.Linear)]
    matrices = [module.weight for module in linears if task.matrix_learning_rate]
    others = [p for p in [*g.parameters(), *h.parameters()] if all(p is not matrix for matrix in matrices)]
    trained = [*matrices, *others, alpha]
    groups = [{"params": others, "lr": shared.learning_rate}, {"params": [alpha], "lr": shared.alpha_learning_rate}]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)]
    if matrices:
        optimisers.append(Muon(matrices, lr=task.matrix_learning_rate))
    decays = [torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: cosine(done, count)) for optimiser in optimisers]
    rows: list[dict[str, float]] = []
    shots, film = {count * k * k // SHOTS**2 for k in range(SHOTS)}, {}
    began = time.perf_counter()
    every = max(1, count // HISTORY_ROWS)
    with progress(count, "generator") as bar:
        for done in range(count):
            if done in shots:
                film[done] = shot(g, params.seed)
            loss, logged = torch.zeros((), device=device), done % every == 0 or done == count - 1
            codes = [draw_codes(task.anchors, task.batch, labels, rng) for labels in known]
            sizes = [len(y) for _, y in codes]
            anchor, y_all = (torch.cat(parts).to(device) for parts in zip(*codes, strict=True))
            index = torch.arange(len(known)).repeat_interleave(torch.tensor(sizes)).to(device)
            # One batch for all classifiers: alone, each has a constant index, which g's batch normalisation would subtract.
            samples = g(share(g.perturb(anchor, y_all, rng)), share(y_all), share(index))
            parts = [size // ranks() for size in sizes]
            for t, (step, x, y) in enumerate(zip(steps, samples.split(parts), share(y_all).split(parts), strict=True)):
                terms = loss_terms(step, x, y, h(x, y, t), alpha[t], shared.delta, task.multiplier_floor, logged or task.collapse > 0)
                weights = {
                    "stationarity": task.stationarity,
                    "duality": params.beta * task.duality,
                    "total_variation": cosine(done, count) * task.total_variation,
                    "statistics": task.statistics,
                    "collapse": task.collapse,
                }
                loss = loss + sum(weight * terms[name] for name, weight in weights.items() if weight)
                loss = loss + params.beta * task.margin_reward * alpha[t]
                if logged:
                    rows.append({"step": done, "classifier": t, "alpha": alpha[t].item()} | {k: v.item() for k, v in terms.items()})
                    bar.set_postfix({k: f"{rows[-1][k]:.3g}" for k in ("stationarity", "duality", "alpha")}, refresh=False)
            for parameter in trained:
                parameter.grad = None
            loss.backward(inputs=trained)
            average_gradients(trained)
            for optimiser, decay in zip(optimisers, decays, strict=True):
                optimiser.step()
                decay.step()
            bar.update()
            if live and live.due():
                live.draw(rows, shot(g, params.seed))
    return Trained(g, pd.DataFrame(rows), film | {count: shot(g, params.seed)}, time.perf_counter() - began)


def train_and_save(params: Params, task: TrainParams, name: str) -> None:
    """data/classifiers/ and data/lambda/ of the task's classifiers → data/generators/<name>/ and data/histories/<name>/.

    One member of the mixture is trained after another, each with a seed of its own: members of different `seed` share none. Meanwhile
    data/live/<name>.png and .csv show how it goes with the present one. The film is the first's.
    """
    homogeneities = [load_homogeneity(Path(f"data/lambda/{classifier}/lambda.json")) for classifier in task.classifiers]
    torch.set_float32_matmul_precision(task.matmul_precision)
    births: list[Trained] = []
    with processes(device(params)) as place:
        for member in range(task.members):
            # Anew for every member, for training puts its gate into them.
            classifiers = [load_network(Path(f"data/classifiers/{classifier}"), Classifier) for classifier in task.classifiers]
            own = dataclasses.replace(params, seed=params.seed * task.members + member)
            births.append(train(own, task, classifiers, homogeneities, place, live=Live(Path(f"data/live/{name}"))))
        if rank() == 0:
            history = Path(f"data/histories/{name}")
            save_network(Path(f"data/generators/{name}"), Mixture.of([birth.generator for birth in births]))
            table = pd.concat([birth.history.assign(member=member) for member, birth in enumerate(births)])
            save_table(history / "history.csv", table)
            save_json(history / "seconds.json", round(sum(birth.seconds for birth in births), 1))
            film = births[0].film
            steps, samples = torch.tensor(list(film)), torch.stack(list(film.values()))
            save_tensors(history / "film.safetensors", {"film_step": steps, "film": to_uint8(samples).cpu()})
