"""The KKT conditions that gradient descent leaves in a classifier: stationarity, duality and the oracle.

A margin is m_ic = Φ_{y_i}(x_i) − Φ_c(x_i). Stationarity asks for multipliers μ_ic ≥ 0 with Λ̄ζ = Σ_i Σ_c μ_ic ∇_ζ m_ic;
duality for min_c m_ic = e^{−α} wherever μ_ic > 0. (The paper's Eqs. 2a, 3a and 4 are printed with the sign reversed; min ½‖ζ‖² with
margins of 1 at least gives this one, Eq. 5's.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F

from gbc.homogeneity import Homogeneity
from gbc.params import InputError

TINY = 1e-30  # keeps the cosine's derivative finite where every multiplier is zero


def margins(logits: Float[Tensor, "batch classes"], y: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
    """m_ic = Φ_{y_i} − Φ_c for every class c; zero at c = y_i."""
    return logits.gather(1, y[:, None]) - logits


def smallest_margin(logits: Float[Tensor, "batch classes"], y: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Margin against the runner-up class, the only one of Eq. 6."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return margins(logits, y).masked_fill(own, torch.inf).amin(1)


def target(network: nn.Module, homogeneity: Homogeneity) -> dict[str, Tensor]:
    """Λ̄ζ up to its unidentified scalar factor, by parameter name in the network's order: ζ on Z₁, zero on Z₂.

    On Z₁ every λ is λ_max, so that Λ̄ is λ_max e^{α(2λ_max − 1)} there: one number.

    Raises `InputError` if Λ is that of a network with other parameters.
    """
    if other := set(homogeneity.lam) ^ {name for name, _ in network.named_parameters()}:
        raise InputError(f"Λ is not this classifier's: only one of the two has {', '.join(sorted(other))}; run estimate_lambda again")
    z1 = set(homogeneity.z1)
    return {name: p.detach() if name in z1 else torch.zeros_like(p) for name, p in network.named_parameters()}


def margin_gradient(
    logits: Float[Tensor, "batch classes"],
    y: Int[Tensor, " batch"],
    mu: Float[Tensor, "batch classes"],
    zeta: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor]:
    """Σ_i Σ_{c≠y_i} μ_ic (∇_ζ Φ_{y_i}(x_i) − ∇_ζ Φ_c(x_i)), one tensor per parameter of `zeta`.

    The gradient of one scalar, so it costs one backward pass whatever the number of samples and classes. With
    `create_graph` it can be differentiated with respect to what made `logits` and `mu`.
    """
    return list(torch.autograd.grad((mu * margins(logits, y)).sum(), zeta, create_graph=create_graph, materialize_grads=True))


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Euclidean inner product over all parameters."""
    return torch.stack([(u * v).sum() for u, v in zip(a, b, strict=True)]).sum()


def relative_residual(product: Float[Tensor, ""], goal: Float[Tensor, ""], gradient: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Min over s ≥ 0 of ‖goal − s·gradient‖ / ‖goal‖, from the inner product of the two and their squared norms; in [0, 1]."""
    cosine = product / (goal * gradient).clamp_min(TINY).sqrt()
    return (1 - cosine.clamp_min(0).square()).clamp_min(1e-12).sqrt()


def stationarity(goal: Sequence[Tensor], gradient: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Relative residual of Eq. 5: min over s ≥ 0 of ‖goal − s·gradient‖ / ‖goal‖, in [0, 1].

    N, the scalar factor of Λ̄ and the scale of μ absorb one another (Eqs. 3–5 fix none of them), so the scale s is the best one.
    """
    return relative_residual(inner(goal, gradient), inner(goal, goal), inner(gradient, gradient))


def duality(margin: Float[Tensor, "..."], alpha: Float[Tensor, ""], delta: float) -> Float[Tensor, "..."]:
    """Eq. 6 and Fig. 2, elementwise: max(m − e^{−α} − δ, 0) − min(m − e^{−α}, 0)."""
    excess = margin - torch.exp(-alpha)
    return F.relu(excess - delta) + F.relu(-excess)


@dataclass(frozen=True)
class Oracle:
    """How well given images explain the weights, with the best multipliers they could have."""

    residual: float  # ‖Λ̄ζ − Σ μ ∇m‖ / ‖Λ̄ζ‖
    groups: dict[str, float]  # the part of every parameter group in it: ‖(Λ̄ζ)_g − Σ μ ∇_g m‖ / ‖Λ̄ζ‖
    mu: Float[np.ndarray, "batch classes"]

    @property
    def cosine(self) -> float:
        """Of the angle between Λ̄ζ and Σ μ ∇m: at the best μ ≥ 0 the residual is orthogonal to Σ μ ∇m."""
        return math.sqrt(max(0.0, 1 - self.residual**2))


def oracle(network: nn.Module, goal: Mapping[str, Tensor], x: Tensor, y: Int[Tensor, " batch"], iterations: int = 300) -> Oracle:
    """Best non-negative multipliers of all (sample, wrong class) pairs: non-negative least squares of `goal`, Λ̄ζ by parameter name.

    With J the Jacobian of all margins, ‖Λ̄ζ − Jᵀμ‖² is a quadratic form in the Gram matrix JJᵀ, which is applied and never formed:
    Jᵀμ is `margin_gradient`, and its derivative along μ gives J(Jᵀμ − Λ̄ζ). So it holds for any network, batch normalisation in
    train mode included (the batch is `x`, whole), in the memory of one pass. Projected L-BFGS, at most `iterations` of it.
    """
    names = list(goal)
    zeta, aim = [network.get_parameter(name) for name in names], list(goal.values())
    norm = inner(aim, aim)
    logits = network(x)
    wrong = ~F.one_hot(y, logits.shape[1]).bool()
    pairs = int(wrong.sum())

    def rest(flat: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        mu = torch.zeros_like(logits).masked_scatter(wrong, torch.as_tensor(flat, dtype=x.dtype, device=x.device)).requires_grad_()
        gradient = margin_gradient(logits, y, mu, zeta, create_graph=True)
        return mu, [part - g for part, g in zip(aim, gradient, strict=True)]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        mu, residual = rest(flat)
        value = inner(residual, residual) / norm
        (slope,) = torch.autograd.grad(value, mu)
        return value.item(), slope[wrong].double().cpu().numpy()

    size = margins(logits, y)[wrong].abs().mean().item()
    start = np.full(pairs, norm.item() / (pairs * size))  # by Euler's equation, about the right sum of μ
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 30, "ftol": 1e-14, "gtol": 1e-12}
    best = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * pairs, options=options).x
    parts = [(part.square().sum() / norm).sqrt().item() for part in rest(best)[1]]
    mu = np.zeros(wrong.shape)
    mu[wrong.cpu().numpy()] = best
    return Oracle(math.hypot(*parts), dict(zip(names, parts, strict=True)), mu)
