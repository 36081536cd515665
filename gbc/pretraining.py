"""Full-batch descent of a classifier: into the maximum-margin regime, or to the stationary point that weight decay has."""

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from gbc.classifier import Classifier
from gbc.homogeneity import Homogeneity, estimate
from gbc.kkt import Oracle, oracle, smallest_margin, target
from gbc.params import InputError, LambdaParams, PretrainParams
from gbc.progress import progress

GROW, SHRINK = 1.05, 0.5  # of the step size, after an accepted step and after one that raised the loss
SLACK = 1e-3  # relative rise of the loss that is still accepted, so that rounding does not stop the descent
APPROACH = 300  # steps of descent before L-BFGS, at most
MEMORY, ROUND = 20, 10  # of L-BFGS: pairs that it remembers, iterations between two rows of the curve
KINK = 3000.0  # sharpness of the smooth gate that stands for ReLU's set-valued derivative at 0
STAGES = 8  # of L-BFGS, each on a sharper softplus
SETTLE = 0.995  # what the step size is multiplied by in each of the last steps
CURVE_ROWS = 200  # of the curve, about
FIRST_CHECKPOINT = 128  # step of the first oracle along the curve; the next ones are at every doubling
ITERATIONS = 50  # of every oracle
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
    """Full-batch gradient descent with momentum on log(loss) until log-loss ≤ `stop_log_loss`, at most `max_steps` steps.

    Descent on log L follows the trajectory of descent on L in re-scaled time (Lyu & Li 2020), so that steps do not vanish with
    the loss; momentum keeps the maximum-margin bias (Wang et al. 2022). The step size grows while the loss falls; a step that raises
    it, or makes it infinite, is undone, halved and freed of its momentum. With `smoothing`, ReLU is a softplus of that sharpness that
    hardens to KINK; in the last `settle_steps` the step size only falls, so that the weights come to rest on ReLU's kinks rather
    than jump across them. Yields after every accepted step.
    """
    network.train()
    zeta = list(network.parameters())
    step_size, last = params.step_size, math.inf
    accepted = [torch.empty_like(p) for p in zeta]
    gradient: tuple[Tensor, ...] = ()
    velocity = [torch.zeros_like(p) for p in zeta]
    for step in range(params.max_steps):
        if params.smoothing:
            network.set_gate(params.smoothing * (KINK / params.smoothing) ** (step / params.max_steps), soft=True)
        logits = network(x)
        loss = log_loss(logits, y)
        value = loss.item()
        if math.isfinite(value) and value <= last + SLACK * abs(last):
            last, step_size = value, step_size * (GROW if step < params.max_steps - params.settle_steps else SETTLE)
            gradient = torch.autograd.grad(loss, zeta)
            with torch.no_grad():
                for start, p, v, slope in zip(accepted, zeta, velocity, gradient, strict=True):
                    start.copy_(p)
                    v.mul_(params.momentum).add_(slope)
            yield Progress(step, value, smallest_margin(logits, y).min().item())
            if value <= params.stop_log_loss:
                return
        elif last == math.inf:
            raise InputError("the loss is infinite at the start; set a smaller first_scale or rest_scale")
        else:
            step_size = step_size * SHRINK
            for v, slope in zip(velocity, gradient, strict=True):
                v.copy_(slope)
        with torch.no_grad():
            for p, start, v in zip(zeta, accepted, velocity, strict=True):
                torch.sub(start, torch.mul(v, step_size, out=p), out=p)
    with torch.no_grad():  # the last step was never judged
        for p, start in zip(zeta, accepted, strict=True):
            p.copy_(start)


def regularise(network: Classifier, x: Tensor, y: Int[Tensor, " batch"], params: PretrainParams) -> Iterator[Progress]:
    """Minimise mean cross-entropy + wd/2·‖ζ‖² by full-batch L-BFGS, about `max_steps` iterations.

    Where the gradient vanishes, stationarity holds with the softmax probabilities for multipliers: N·wd·ζ = Σ_i Σ_c p_ic ∇m_ic. The
    minimum lies on ReLU's kinks, where L-BFGS stalls; so it runs on a softplus, sharpened in stages from `smoothing` until it is ReLU
    to 1/KINK. Before that come up to `APPROACH` steps of `descend`, which ends where the summed cross-entropy is 1 and is not yielded: from
    initial weights, the first steps of L-BFGS can be so long that a weight decay as small as 1e-6 never takes them back. Yields after
    every `ROUND` iterations. Raises `InputError` if `smoothing` is 0.
    """
    if not params.smoothing:
        raise InputError("weight_decay needs a smoothing above 0, such as 30: on ReLU itself L-BFGS stalls at the kinks")
    network.set_gate(params.smoothing, soft=True)
    for _ in descend(network, x, y, dataclasses.replace(params, smoothing=0.0, max_steps=APPROACH, settle_steps=0, stop_log_loss=0.0)):
        pass
    zeta = list(network.train().parameters())

    def objective() -> Tensor:
        decay = torch.stack([p.square().sum() for p in zeta]).sum() * len(x) * params.weight_decay / 2
        value = log_loss(network(x), y).exp() + decay
        for p, slope in zip(zeta, torch.autograd.grad(value, zeta), strict=True):
            p.grad = slope
        return value

    step = 0
    for sharpness in np.geomspace(params.smoothing, KINK, STAGES):
        network.set_gate(float(sharpness), soft=True)
        optimiser = torch.optim.LBFGS(
            zeta, max_iter=ROUND, history_size=MEMORY, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
        )
        for _ in range(max(1, params.max_steps // (ROUND * STAGES))):
            if not math.isfinite(optimiser.step(objective).item()):
                raise InputError("the loss became infinite; set a smaller first_scale or rest_scale")
            step += ROUND
            with torch.no_grad():
                logits = network(x)
            yield Progress(step - 1, log_loss(logits, y).item(), smallest_margin(logits, y).min().item())


def certify(
    network: Classifier, homogeneity: Homogeneity, sets: Sequence[tuple[Tensor, Int[Tensor, " batch"]]], everywhere: bool = False
) -> list[Oracle]:
    """How well each set of images and labels explains the weights: on Z₁, or `everywhere`, that is with the target zero on Z₂ too.

    Batch normalisation takes a whole set as its batch. ReLU's derivative at 0 is any number in [0, 1] (Clarke's subdifferential, with
    which the maximum-margin theorem is stated), and trained networks put samples there; σ(KINK·z) is the one that a descent on
    softplus chose.
    """
    network = copy.deepcopy(network).set_gate(KINK).freeze()
    goal = target(network, homogeneity)
    if not everywhere:
        goal = {name: goal[name] for name in homogeneity.z1}
    return [oracle(network, goal, x, y, ITERATIONS) for x, y in sets]


def residuals(found: Sequence[Oracle]) -> dict[str, Any]:
    """Columns of the curve, from the certificate of the training images and, where there are any, of the control images."""
    return {"oracle_residual": found[0].residual, "heldout_residual": found[1].residual if len(found) > 1 else None}


def pretrain(
    params: PretrainParams, data: dict[str, Tensor], seed: int, device: torch.device
) -> tuple[Classifier, pd.DataFrame, dict[str, Any]]:
    """Train a classifier on sampled images: by `regularise` with weight decay, by `descend` without.

    The descent also ends where a doubling of its steps lowered the oracle residual of the training images by less than the share
    `plateau`, unless that is 0. Returns the classifier with the curve of its descent (oracle residuals at every doubling of the steps),
    and with its certificate: the oracle residuals of the training and of the control images, and which training images carry a
    multiplier. Raises `InputError` if more steps are to settle than to be made.
    """
    if params.settle_steps > params.max_steps:
        raise InputError(f"settle_steps={params.settle_steps} is more than max_steps={params.max_steps}, of which it is a part")
    dtype = getattr(torch, params.precision)
    x, y = data["train_x"].to(device, dtype), data["train_y"].to(device)
    labels, y = y.unique(return_inverse=True)
    control_x, control_y = data["control_x"].to(device, dtype), torch.searchsorted(labels, data["control_y"].to(device))
    network = Classifier(params.architecture, tuple(x.shape[1:]), tuple(params.hidden), tuple(labels.tolist()))
    network.initialise(torch.Generator().manual_seed(seed), params.first_scale, params.rest_scale)
    network.to(device, dtype)
    # Λ belongs to the architecture, so that the initial weights have that of the trained ones; `certify` needs only its Z₁.
    homogeneity = estimate(copy.deepcopy(network).freeze(), network.input_shape, ORACLE_INPUTS, torch.Generator().manual_seed(0))
    rows: list[dict[str, float]] = []
    checkpoint, residual = FIRST_CHECKPOINT, math.inf
    last = Progress(0, math.inf, -math.inf)
    sets = [(x, y), (control_x, control_y)] if len(control_x) else [(x, y)]
    with progress(params.max_steps, "descent") as bar:
        for last in (regularise if params.weight_decay else descend)(network, x, y, params):
            bar.update(last.step + 1 - bar.n)
            row: dict[str, Any] = vars(last)
            if last.step + 1 >= checkpoint:
                checkpoint, before = 2 * checkpoint, residual
                measured = residuals(certify(network, homogeneity, sets))
                row, residual = row | measured, measured["oracle_residual"]
                if params.plateau and residual > (1 - params.plateau) * before:
                    break
            if (last.step + 1) % max(1, params.max_steps // CURVE_ROWS) == 0 or "oracle_residual" in row:
                rows.append(row)
                bar.set_postfix(log_loss=f"{last.log_loss:.4g}", margin=f"{last.smallest_margin:.4g}", refresh=False)
    network.set_gate(None).settle(x)
    with torch.no_grad():
        logits = network.train()(x)
    # Of ReLU itself, not of the softplus that the descent may have ended on.
    last = Progress(last.step, log_loss(logits, y).item(), smallest_margin(logits, y).min().item())
    final = certify(network, homogeneity, sets)
    covered = len(final[0].groups) == len(list(network.parameters()))
    everywhere = final if covered else certify(network, homogeneity, sets, everywhere=True)
    facts: dict[str, Any] = {
        "residual": final[0].residual,
        "heldout_residual": residuals(final)["heldout_residual"],
        "everywhere": {
            "residual": everywhere[0].residual,
            "heldout_residual": residuals(everywhere)["heldout_residual"],
            "cosine": everywhere[0].cosine,
            "groups": everywhere[0].groups,
        },
        "active": (final[0].mu.max(1) > ACTIVE * final[0].mu.max()).tolist(),
        "log_loss": last.log_loss,
        "smallest_margin": last.smallest_margin,
        "steps": last.step + 1,
        "heldout_accuracy": None,
    }
    rows.append(vars(last) | residuals(final))
    if len(control_x):
        with torch.no_grad():
            facts["heldout_accuracy"] = (network.eval()(control_x).argmax(1) == control_y).double().mean().item()
    return network.float(), pd.DataFrame(rows), facts
