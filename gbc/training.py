"""Training of a generator on the weights of one or several classifiers (Eqs. 5–7 and 12)."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gbc.artifacts import load_network, save_json, save_network, save_table, save_tensors
from gbc.classifier import Classifier
from gbc.closed_form import step_of
from gbc.distributed import average_gradients, loss_totals, mean, processes, rank, ranks, share
from gbc.generator import Generator, Mixture, Multipliers, Pixels, Waves, to_uint8
from gbc.homogeneity import Homogeneity, load_homogeneity
from gbc.kkt import duality, smallest_margin
from gbc.muon import Muon
from gbc.params import InputError, Params, TrainParams, device
from gbc.progress import Live, progress
from gbc.step import Step

HISTORY_ROWS = 200  # of the loss curve, about
SHOTS, SHOWN = 8, 20  # of the film: its pictures after the first, ever further apart, and the samples in each
FINAL_RATE = 0.02  # of the learning rate, at the end of its cosine
PIXEL_RATE = 0.2  # of Adam for free images, before the sigmoid: for pixels, and on average for waves
FIT_STEPS = 600  # of g to images that were polished; many more and it takes their noise too


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
    images: int,
    delta: float,
    floor: float,
    collapse: bool,
) -> dict[str, Tensor]:
    """The terms of the loss for one classifier of so many `images`, unweighted; `collapse`, which needs messages of its own, if asked for.

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
        "statistics": step.statistics_mismatch(images),
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


class Optimisers:
    """Adam, and Muon for the matrices of fully connected layers if their rate is above 0; all rates fall along one cosine."""

    def __init__(self, networks: Sequence[tuple[nn.Module, float]], matrix_rate: float, count: int, alpha: Sequence[dict[str, Any]] = ()):
        linears = [module for network, _ in networks for module in network.modules() if isinstance(module, nn.Linear)]
        matrices = [module.weight for module in linears if matrix_rate]
        others = [[p for p in network.parameters() if all(p is not matrix for matrix in matrices)] for network, _ in networks]
        groups = [{"params": part, "lr": rate} for part, (_, rate) in zip(others, networks, strict=True) if part] + [*alpha]
        self.trained = [*matrices, *(p for group in groups for p in group["params"])]
        self.optimisers: list[torch.optim.Optimizer] = [torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)]
        if matrices:
            self.optimisers.append(Muon(matrices, lr=matrix_rate))
        self.decays = [torch.optim.lr_scheduler.LambdaLR(one, lambda done: cosine(done, count)) for one in self.optimisers]

    def step(self, loss: Tensor) -> None:
        """One step down `loss`, the whole of which every process has, or the mean of its own samples."""
        for parameter in self.trained:
            parameter.grad = None
        loss.backward(inputs=self.trained)
        average_gradients(self.trained)
        for optimiser, decay in zip(self.optimisers, self.decays, strict=True):
            optimiser.step()
            decay.step()


class Descent:
    """Descent of h, every α and whatever makes the samples on Σ_t stationarity + β·duality (Eqs. 7, 12) plus the task's weighted terms."""

    def __init__(self, params: Params, task: TrainParams, steps: Sequence[Step], h: Multipliers, alpha: Tensor, rng: torch.Generator):
        self.params, self.task, self.steps, self.h, self.alpha, self.rng = params, task, steps, h, alpha, rng
        labels = [step.network.labels for step in steps]
        self.sizes = [task.batch // len(known) * len(known) for known in labels]  # samples for every classifier
        self.index = torch.arange(len(labels)).repeat_interleave(torch.tensor(self.sizes)).to(alpha.device)  # and the classifier of each
        self.rows: list[dict[str, float]] = []  # of the loss curve
        self.done = 0  # steps

    def codes(self) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Anchors and labels of one batch, in which every classifier has its part."""
        parts = [draw_codes(self.task.anchors, self.task.batch, step.network.labels, self.rng) for step in self.steps]
        anchor, y = (torch.cat(part).to(self.alpha.device) for part in zip(*parts, strict=True))
        return anchor, y

    def samples(self, g: Generator, anchor: Tensor, y: Tensor) -> Tensor:
        """This process's samples for the codes of one batch."""
        return g(share(g.perturb(anchor, y, self.rng)), share(y), share(self.index))

    def loss(self, g: Generator, fade: float, logged: bool) -> Tensor:
        """Of a batch of `g`, whose total variation weighs `fade` of its weight; a row of the curve if `logged`."""
        task, loss = self.task, torch.zeros((), device=self.alpha.device)
        weights = {
            "stationarity": task.stationarity,
            "duality": self.params.beta * task.duality,
            "total_variation": fade * task.total_variation,
            "statistics": task.statistics,
            "collapse": task.collapse,
        }
        # One batch for all classifiers: alone, each has a constant index, which g's batch normalisation would subtract.
        anchor, y_all = self.codes()
        parts = [size // ranks() for size in self.sizes]
        samples = self.samples(g, anchor, y_all).split(parts)
        for t, (step, x, y) in enumerate(zip(self.steps, samples, share(y_all).split(parts), strict=True)):
            images = (task.images or task.anchors) * len(step.labels)
            delta, collapse = self.params.generator.delta, logged or task.collapse > 0
            terms = loss_terms(step, x, y, self.h(x, y, t), self.alpha[t], images, delta, task.multiplier_floor, collapse)
            loss = loss + sum(weight * terms[name] for name, weight in weights.items() if weight)
            loss = loss + self.params.beta * task.margin_reward * self.alpha[t]
            if logged:
                values = {"step": self.done, "classifier": t, "alpha": self.alpha[t].item()}
                self.rows.append(values | {k: v.item() for k, v in terms.items()})
        return loss

    def run(self, g: Generator, count: int, rate: float, look: Callable[[Generator], None]) -> None:
        """`count` steps, of `rate` for what of g Muon does not train; `look` is shown g before each and after the last."""
        shared, every = self.params.generator, max(1, count // HISTORY_ROWS)
        alpha = [{"params": [self.alpha], "lr": shared.alpha_learning_rate}]
        optimisers = Optimisers([(g, rate), (self.h, shared.learning_rate)], self.task.matrix_learning_rate, count, alpha)
        with progress(count, type(g).__name__.lower()) as bar:
            for done in range(count):
                look(g)
                logged = done % every == 0 or done == count - 1
                optimisers.step(self.loss(g, cosine(done, count), logged))
                if logged:
                    bar.set_postfix({k: f"{self.rows[-1][k]:.3g}" for k in ("stationarity", "duality", "alpha")}, refresh=False)
                self.done += 1
                bar.update()
        look(g)

    def polish(self, g: Generator, count: int, look: Callable[[Generator], None]) -> None:
        """Free the samples of `g` at its anchors, descend on their waves for `count` steps, and fit g to where they went.

        The images that g makes are bound to one another by its weights; free ones come nearer to the equations. And g, fitted for a short
        while, takes from them the noise that they bring, as an untrained network does (Ulyanov et al. 2018).
        """
        images = Waves.of(g)
        self.run(images, count, PIXEL_RATE, look)
        g.train()
        optimisers = Optimisers([(g, self.params.generator.learning_rate)], self.task.matrix_learning_rate, FIT_STEPS)
        for _ in range(FIT_STEPS):
            codes = self.codes()
            optimisers.step((self.samples(g, *codes) - self.samples(images, *codes).detach()).square().mean())
        self.loss(g, 0.0, logged=True)


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

    `kind` is g's class; `live` is shown how it goes. Raises `InputError` if the classifiers take inputs of different shapes, `batch` is
    below their number of labels or cannot be shared evenly between the processes, or points are to be polished.
    """
    shape = classifiers[0].input_shape
    if any(classifier.input_shape != shape for classifier in classifiers):
        raise InputError(f"classifiers {', '.join(task.classifiers)} take inputs of different shapes: one generator cannot serve them")
    if task.batch < (classes := max(len(classifier.labels) for classifier in classifiers)):
        raise InputError(f"batch={task.batch} has no sample for each of {classes} labels; set at least {classes}, or several times as many")
    if any(task.batch // len(classifier.labels) * len(classifier.labels) % ranks() for classifier in classifiers):
        raise InputError(f"batch={task.batch} cannot be shared evenly between {ranks()} processes")
    if task.polish and len(shape) == 1:
        raise InputError(f"polish={task.polish} is for images, and classifiers {', '.join(task.classifiers)} take points; set it to 0")
    rng = torch.Generator().manual_seed(params.seed)
    shared, count = params.generator, params.training_steps(task.length)
    known = tuple(classifier.labels for classifier in classifiers)
    g = kind(known, shape, shared.noise, task.anchors, shared.spread, shared.width, shared.channels).initialise(rng).to(device)
    h = Multipliers(known, shape, shared.width, task.multiplier).initialise(rng).to(device)
    steps = [step_of(c.to(device), homogeneity, task.gate or None) for c, homogeneity in zip(classifiers, homogeneities, strict=True)]
    alpha = torch.stack([initial_alpha(g, step, task, t, rng) for t, step in enumerate(steps)]).requires_grad_()
    descent = Descent(params, task, steps, h, alpha, rng)
    polish = params.training_steps(task.polish) if task.polish else 0
    shots, film = {(count + polish) * k * k // SHOTS**2 for k in range(SHOTS)}, {}

    def look(now: Generator) -> None:
        if descent.done in shots:
            film[descent.done] = shot(now, params.seed)
        if live and descent.rows and live.due():
            live.draw(descent.rows, shot(now, params.seed))

    began = time.perf_counter()
    descent.run(g, count, PIXEL_RATE if kind is Pixels else shared.learning_rate, look)
    if polish:
        descent.polish(g, polish, look)
    seconds = time.perf_counter() - began
    film[descent.done] = shot(g, params.seed)
    g.weigh(h)  # after the film, whose codes are always the same
    return Trained(g, pd.DataFrame(descent.rows), film, seconds)


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
