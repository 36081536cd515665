"""Training of a generator on the weights of one or several classifiers (Eqs. 5–7 and 12)."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from gbc.artifacts import load_network, save_json, save_network, save_table
from gbc.classifier import Classifier
from gbc.generator import Generator, Multipliers
from gbc.homogeneity import Homogeneity, load_homogeneity
from gbc.kkt import duality, margin_gradient, smallest_margin, stationarity, target
from gbc.muon import Muon
from gbc.params import InputError, Params, TrainParams, device

HISTORY_ROWS = 200  # of the loss curve, about
FINAL_RATE = 0.02  # of the learning rate, at the end of its cosine


def total_variation(x: Float[Tensor, "batch *shape"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbouring pixels, down plus across; zero for points."""
    if x.ndim < 3:
        return x.new_zeros(())
    return x.diff(dim=-2).abs().mean() + x.diff(dim=-1).abs().mean()


class Teacher:
    """One classifier as the generator's loss sees it: fixed weights, Λ̄ζ, and the statistics that batch normalisation keeps.

    The running statistics are those of the training batch. They are part of the weights file; using them is an extension of the paper.
    """

    def __init__(self, network: Classifier, homogeneity: Homogeneity, gate: float):
        self.network = network.freeze()
        network.set_gate(gate)
        self.labels = torch.tensor(network.labels, device=next(network.parameters()).device)
        self.zeta = list(network.parameters())
        self.goal = list(target(network, homogeneity).values())
        self.norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        self.inputs: list[Tensor] = []  # of every batch normalisation, from the last forward pass
        for module in self.norms:
            module.register_forward_pre_hook(lambda _, arguments: self.inputs.append(arguments[0]))

    def logits(self, x: Tensor) -> Float[Tensor, "batch classes"]:
        """Φ(x), remembering what enters every batch normalisation."""
        self.inputs.clear()
        return self.network(x)

    def statistics_mismatch(self) -> Float[Tensor, ""]:
        """Mean squared difference of the batch's mean and deviation from the running ones, in running deviations; summed over layers."""
        total = self.goal[0].new_zeros(())
        for module, z in zip(self.norms, self.inputs, strict=True):
            variance, mean = torch.var_mean(z, [0, *range(2, z.ndim)])
            assert module.running_mean is not None
            assert module.running_var is not None
            shift = (mean - module.running_mean).square() / module.running_var
            stretch = ((variance / module.running_var).clamp_min(1e-8).sqrt() - 1).square()
            total = total + shift.mean() + stretch.mean()
        return total


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
    teacher: Teacher,
    x: Float[Tensor, "batch *shape"],
    y: Int[Tensor, " batch"],
    mu: Float[Tensor, "batch classes"],
    alpha: Float[Tensor, ""],
    delta: float,
    floor: float,
) -> dict[str, Tensor]:
    """Every term of the loss for one classifier, unweighted.

    Duality is in units of the margin asked for, e^{−α}, and `delta` is its share; the unit carries no gradient, or α could shrink
    the loss by shrinking the unit's inverse. `floor` keeps the runner-up's multipliers, the only ones of the paper's
    complementary slackness, from dying.
    """
    own = torch.searchsorted(teacher.labels, y)
    logits = teacher.logits(x)
    runner_up = logits.scatter(1, own[:, None], -torch.inf).argmax(1, keepdim=True)
    mu = mu.scatter(1, runner_up, mu.gather(1, runner_up).clamp_min(floor))
    unit = torch.exp(-alpha).detach()
    return {
        "stationarity": stationarity(teacher.goal, margin_gradient(logits, own, mu, teacher.zeta, create_graph=True)),
        "duality": duality(smallest_margin(logits, own) / unit, alpha + unit.log(), delta).mean(),
        "total_variation": total_variation(x),
        "statistics": teacher.statistics_mismatch(),
    }


@torch.no_grad()
def initial_alpha(g: Generator, teacher: Teacher, task: TrainParams, t: int, rng: torch.Generator) -> Float[Tensor, ""]:
    """α with e^{−α} the mean size of the untrained generator's margins: the classifier's own scale."""
    anchor, y = (part.to(teacher.labels.device) for part in draw_codes(task.anchors, task.batch, teacher.network.labels, rng))
    x = g(g.perturb(anchor, rng), y, torch.full_like(y, t))
    return -smallest_margin(teacher.logits(x), torch.searchsorted(teacher.labels, y)).abs().mean().log()


def train(
    params: Params, task: TrainParams, classifiers: Sequence[Classifier], homogeneities: Sequence[Homogeneity], device: torch.device
) -> tuple[Generator, pd.DataFrame, float]:
    """Train g, h and one α per classifier so that the generated distribution satisfies the classifiers' KKT conditions.

    Minimises Σ_t stationarity + β·duality (Eqs. 7 and 12) plus the task's weighted terms. Returns the generator, the curve of every
    term and the seconds it took. Raises `InputError` if the classifiers take inputs of different shapes, or `batch` is below
    their number of labels.
    """
    shape = classifiers[0].input_shape
    if any(classifier.input_shape != shape for classifier in classifiers):
        raise InputError(f"classifiers {', '.join(task.classifiers)} take inputs of different shapes: one generator cannot serve them")
    if task.batch < (classes := max(len(classifier.labels) for classifier in classifiers)):
        raise InputError(f"batch={task.batch} has no sample for each of {classes} labels; set at least {classes}, or several times as many")
    rng = torch.Generator().manual_seed(params.seed)
    shared, steps = params.generator, max(1, round(params.steps * task.length))
    known = tuple(classifier.labels for classifier in classifiers)
    g = Generator(known, shape, shared.noise, task.anchors, shared.spread, shared.width, shared.channels).initialise(rng)
    h = Multipliers(known, shape, shared.width, task.multiplier).initialise(rng)
    g, h = g.to(device), h.to(device)
    teachers = [Teacher(c.to(device), homogeneity, shared.gate) for c, homogeneity in zip(classifiers, homogeneities, strict=True)]
    alpha = torch.stack([initial_alpha(g, teacher, task, t, rng) for t, teacher in enumerate(teachers)]).requires_grad_()
    matrices = [module.weight for module in g.modules() if isinstance(module, nn.Linear) and task.matrix_learning_rate]
    others = [p for p in [*g.parameters(), *h.parameters()] if all(p is not matrix for matrix in matrices)]
    trained = [*matrices, *others, alpha]
    groups = [{"params": others, "lr": shared.learning_rate}, {"params": [alpha], "lr": shared.alpha_learning_rate}]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.Adam(groups, betas=(0.9, 0.99))]
    if matrices:
        optimisers.append(Muon(matrices, lr=task.matrix_learning_rate))
    decays = [torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, steps)) for optimiser in optimisers]
    rows: list[dict[str, float]] = []
    began = time.perf_counter()
    every = max(1, steps // HISTORY_ROWS)
    with tqdm(total=steps, desc="generator", mininterval=1) as bar:
        for step in range(steps):
            loss = torch.zeros((), device=device)
            codes = [draw_codes(task.anchors, task.batch, labels, rng) for labels in known]
            sizes = [len(y) for _, y in codes]
            anchor, y_all = (torch.cat(parts).to(device) for parts in zip(*codes, strict=True))
            index = torch.arange(len(known)).repeat_interleave(torch.tensor(sizes)).to(device)
            # One batch for all classifiers: alone, each has a constant index, which g's batch normalisation would subtract.
            samples = g(g.perturb(anchor, rng), y_all, index)
            for t, (teacher, x, y) in enumerate(zip(teachers, samples.split(sizes), y_all.split(sizes), strict=True)):
                terms = loss_terms(teacher, x, y, h(x, y, t), alpha[t], shared.delta, task.multiplier_floor)
                loss = loss + task.stationarity * terms["stationarity"] + params.beta * (terms["duality"] + task.margin_reward * alpha[t])
                loss = loss + cosine(step, steps) * task.total_variation * terms["total_variation"] + task.statistics * terms["statistics"]
                if step % every == 0 or step == steps - 1:
                    rows.append({"step": step, "classifier": t, "alpha": alpha[t].item()} | {k: v.item() for k, v in terms.items()})
                    bar.set_postfix({k: f"{rows[-1][k]:.3g}" for k in ("stationarity", "duality", "alpha")})
            for parameter in trained:
                parameter.grad = None
            loss.backward(inputs=trained)
            for optimiser, decay in zip(optimisers, decays, strict=True):
                optimiser.step()
                decay.step()
            bar.update()
    return g, pd.DataFrame(rows), time.perf_counter() - began


def train_and_save(params: Params, task: TrainParams, name: str) -> None:
    """data/classifiers/ and data/lambda/ of the task's classifiers → data/generators/<name>/ and data/histories/<name>/."""
    classifiers = [load_network(Path(f"data/classifiers/{classifier}"), Classifier) for classifier in task.classifiers]
    homogeneities = [load_homogeneity(Path(f"data/lambda/{classifier}/lambda.json")) for classifier in task.classifiers]
    generator, history, seconds = train(params, task, classifiers, homogeneities, device(params))
    save_network(Path(f"data/generators/{name}"), generator)
    save_table(Path(f"data/histories/{name}/history.csv"), history)
    save_json(Path(f"data/histories/{name}/seconds.json"), round(seconds, 1))
