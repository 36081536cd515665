"""Full-batch descent of a classifier: into the maximum-margin regime, or to the stationary point that weight decay has."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gbc.artifacts import InputError
from gbc.classifier import Classifier
from gbc.homogeneity import estimate
from gbc.kkt import Oracle, oracle, smallest_margin
from gbc.params import LambdaParams, PretrainParams

GROW, SHRINK = 1.05, 0.5  # of the step size, after an accepted step and after one that raised the loss
SLACK = 1e-3  # relative rise of the loss that is still accepted, so that rounding does not stop the descent
MEMORY, ROUND = 20, 10  # of L-BFGS: pairs that it remembers, iterations between two rows of the curve
CURVE_ROWS = 200  # of the curve, about
FIRST_CHECKPOINT = 128  # step of the first oracle along the curve; the next ones are at every doubling
CURVE_ITERATIONS = 60  # of the oracle along the curve; it is run to its end once, at the end of the descent
ACTIVE = 1e-3  # a multiplier counts as positive above this share of the largest
ORACLE_INPUTS = LambdaParams(inputs=8, batch=16)


@dataclass(frozen=True)
class Progress:
    """State of the descent after one step."""

    step: int
    log_loss: float
    smallest_margin: float


def log_loss(logits: Float[Tensor, "batch classes"], y: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Logarithm of Σ_i cross-entropy(x_i), exact far below the smallest float: a log-loss of −1000 is as good as one of −1."""
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    z = others.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]  # the cross-entropy is log(1 + e^z)
    log_cross_entropy = torch.where(z < -15, z - z.clamp_max(-15).exp() / 2, F.softplus(z.clamp_min(-15)).log())
    return log_cross_entropy.logsumexp(0)


def descend(network: Classifier, x: Tensor, y: Int[Tensor, " batch"], params: PretrainParams) -> Iterator[Progress]:
    """Full-batch gradient descent on log(loss) until log-loss ≤ `stop_log_loss`, at most `max_steps` steps.

    Descent on log L follows the trajectory of descent on L in re-scaled time (Lyu & Li 2020), so that steps do not vanish with
    the loss. The step size grows while the loss falls; a step that raises it, or makes it infinite, is undone and halved.
    Yields after every accepted step.
    """
    network.train()
    zeta = list(network.parameters())
    step_size, last = params.step_size, math.inf
    accepted: list[Tensor] = []
    gradient: tuple[Tensor, ...] = ()
    for step in range(params.max_steps):
        logits = network(x)
        loss = log_loss(logits, y)
        value = loss.item()
        if math.isfinite(value) and (not accepted or value <= last + SLACK * abs(last)):
            last, step_size = value, step_size * GROW
            gradient = torch.autograd.grad(loss, zeta)
            accepted = [p.detach().clone() for p in zeta]
            yield Progress(step, value, smallest_margin(logits, y).min().item())
            if value <= params.stop_log_loss:
                return
        elif not accepted:
            raise InputError("the loss is infinite at the start; set a smaller first_scale or rest_scale")
        else:
            step_size *= SHRINK
        with torch.no_grad():
            for p, start, slope in zip(zeta, accepted, gradient, strict=True):
                p.copy_(start - step_size * slope)
    with torch.no_grad():  # the last step was never judged
        for p, start in zip(zeta, accepted, strict=True):
            p.copy_(start)


def regularise(network: Classifier, x: Tensor, y: Int[Tensor, " batch"], params: PretrainParams) -> Iterator[Progress]:
    """Minimise mean cross-entropy + wd/2·‖ζ‖² by full-batch L-BFGS, `max_steps` iterations.

    Where the gradient vanishes, stationarity holds exactly, with the softmax probabilities for multipliers: N·wd·ζ =
    Σ_i Σ_c p_ic ∇m_ic; ReLU's kinks leave a few per cent of that. Yields after every `ROUND` iterations.
    """
    zeta = list(network.train().parameters())
    optimiser = torch.optim.LBFGS(
        zeta, max_iter=ROUND, history_size=MEMORY, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        decay = torch.stack([p.square().sum() for p in zeta]).sum() * len(x) * params.weight_decay / 2
        value = log_loss(network(x), y).exp() + decay
        value.backward()
        return value

    for step in range(ROUND - 1, params.max_steps, ROUND):
        if not math.isfinite(optimiser.step(objective).item()):
            raise InputError("the loss is infinite at the start; set a smaller first_scale or rest_scale")
        with torch.no_grad():
            logits = network(x)
        yield Progress(step, log_loss(logits, y).item(), smallest_margin(logits, y).min().item())


def oracle_of(network: Classifier, x: Tensor, y: Int[Tensor, " batch"], iterations: int = 300) -> Oracle:
    """How well images explain the network's weights as they stand, on Z₁; batch normalisation takes all of `x` as its batch."""
    network = copy.deepcopy(network).freeze()
    homogeneity = estimate(network, network.input_shape, ORACLE_INPUTS, torch.Generator().manual_seed(0))
    return oracle(network, homogeneity, x, y, iterations)


def pretrain(
    params: PretrainParams, data: dict[str, Tensor], seed: int, device: torch.device
) -> tuple[Classifier, pd.DataFrame, dict[str, Any]]:
    """Train a classifier on sampled images: by `regularise` with weight decay, by `descend` without.

    Returns it with the curve of its descent (the oracle residual at every doubling of the step), and with what its images have to do
    with its weights: the oracle residual of the training and of the control images, and which training images carry a multiplier.
    """
    x, y = data["train_x"].to(device), data["train_y"].to(device)
    labels, y = y.unique(return_inverse=True)
    network = Classifier(params.architecture, tuple(x.shape[1:]), tuple(params.hidden), tuple(labels.tolist()))
    network.initialise(torch.Generator().manual_seed(seed), params.first_scale, params.rest_scale)
    network.to(device)
    rows: list[dict[str, float]] = []
    checkpoint = FIRST_CHECKPOINT
    progress = Progress(0, math.inf, -math.inf)
    with tqdm(total=params.max_steps, desc="descent", mininterval=1) as bar:
        for progress in (regularise if params.weight_decay else descend)(network, x, y, params):
            bar.update(progress.step + 1 - bar.n)
            row = vars(progress)
            if progress.step + 1 >= checkpoint:
                checkpoint *= 2
                row = row | {"oracle_residual": oracle_of(network, x, y, CURVE_ITERATIONS).residual}
            if (progress.step + 1) % max(1, params.max_steps // CURVE_ROWS) == 0 or "oracle_residual" in row:
                rows.append(row)
                bar.set_postfix(log_loss=f"{progress.log_loss:.4g}", margin=f"{progress.smallest_margin:.4g}")
    network.settle(x)
    final = oracle_of(network, x, y)
    rows.append(vars(progress) | {"oracle_residual": final.residual})
    facts: dict[str, Any] = {
        "residual": final.residual,
        "active": (final.mu.max(1) > ACTIVE * final.mu.max()).tolist(),
        "log_loss": progress.log_loss,
        "smallest_margin": progress.smallest_margin,
        "steps": progress.step + 1,
        "heldout_residual": None,
        "heldout_accuracy": None,
    }
    if len(data["control_x"]):
        control_x, control_y = data["control_x"].to(device), torch.searchsorted(labels, data["control_y"].to(device))
        facts["heldout_residual"] = oracle_of(network, control_x, control_y).residual
        with torch.no_grad():
            facts["heldout_accuracy"] = (network.eval()(control_x).argmax(1) == control_y).double().mean().item()
    return network, pd.DataFrame(rows), facts
