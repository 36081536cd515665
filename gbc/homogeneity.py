"""Λ of a quasi-homogeneous network, from its weights alone (Eqs. 8–10 of the paper)."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linprog, lsq_linear
from torch import Tensor, nn
from torch.func import functional_call

from gbc.artifacts import InputError, load_json
from gbc.params import LambdaParams

EQUATION_WEIGHT = 1e4  # of the Euler equations against the norm
TOLERANCE = 1e-9  # relative; float64 Euler equations of a quasi-homogeneous network hold to about 1e-13


@dataclass(frozen=True)
class Homogeneity:
    """Λ as one λ per parameter tensor ("group"), with what it was chosen from and how well it holds."""

    lam: dict[str, float]  # λ of every group
    dimension: int  # of the affine set of solutions of Eqs. 9–10: 0 if Λ is unique
    violation: float  # max |Φ(x; e^{αΛ}ζ) − e^α Φ(x; ζ)| / max |e^α Φ(x; ζ)|, float64

    @property
    def lam_max(self) -> float:
        """λ_max, the largest element of Λ."""
        return max(self.lam.values())

    @property
    def z1(self) -> list[str]:
        """Groups of Z₁: those whose λ is λ_max. The others are Z₂, and their stationarity target is zero."""
        return [name for name, value in self.lam.items() if value > self.lam_max * (1 - 1e-6)]


def euler_system(
    network: nn.Module, x: Float[Tensor, "inputs batch *shape"]
) -> tuple[Float[np.ndarray, "equations groups"], Float[np.ndarray, " equations"]]:
    """Eq. 9 for every input batch and class, and Eq. 10's derivative equation of every group along a random direction.

    Eq. 9 reads Σ_g λ_g ⟨ζ_g, ∇_gΦ_c⟩ = Φ_c. Differentiated along v in group k, Σ_g λ_g ⟨ζ_g, ∇_g(v·∇_kΦ_c)⟩ + λ_k v·∇_kΦ_c
    = v·∇_kΦ_c. Both are linear in λ; returns the coefficients and the right-hand side.
    """
    zeta = list(network.parameters())
    rng = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in zeta]
    rows, rhs = [], []
    for batch in x:
        logits = network(batch)[0]  # one sample's logits; under batch normalisation they depend on the whole batch
        gradients = [torch.autograd.grad(value, zeta, create_graph=True) for value in logits]
        for value, gradient in zip(logits, gradients, strict=True):
            rows.append([(p * d).sum().item() for p, d in zip(zeta, gradient, strict=True)])
            rhs.append(value.item())
        for k, (direction, d) in enumerate(zip(directions, gradients[-1], strict=True)):
            slope = (direction * d).sum()
            second = torch.autograd.grad(slope, zeta, retain_graph=True, allow_unused=True) if slope.requires_grad else [None] * len(zeta)
            row = [0.0 if s is None else (p * s).sum().item() for p, s in zip(zeta, second, strict=True)]
            row[k] += slope.item()
            rows.append(row)
            rhs.append(slope.item())
    return np.array(rows), np.array(rhs)


def choose_lambda(rows: Float[np.ndarray, "equations groups"], rhs: Float[np.ndarray, " equations"]) -> tuple[np.ndarray, int]:
    """Solution λ ≥ 0 with the smallest λ_max and, among those, the smallest norm; and the dimension of the solution set.

    Raises `InputError` if no λ ≥ 0 solves the equations: the network is not quasi-homogeneous.
    """
    groups = rows.shape[1]
    system = np.column_stack([rows, rhs])
    scale = np.abs(system).max(axis=1)
    system = system[scale > 0] / scale[scale > 0, None]
    _, singular, basis = np.linalg.svd(system, full_matrices=False)  # the same solutions, in at most groups + 1 equations
    basis = basis[singular > TOLERANCE * singular[0]]
    a, b = basis[:, :groups], basis[:, groups]
    bound = linprog(  # variables (λ, t): minimise t subject to Aλ = b, 0 ≤ λ ≤ t
        np.append(np.zeros(groups), 1.0),
        A_ub=np.column_stack([np.eye(groups), -np.ones(groups)]),
        b_ub=np.zeros(groups),
        A_eq=np.column_stack([a, np.zeros(len(a))]),
        b_eq=b,
    )
    if not bound.success:
        raise InputError("the network is not quasi-homogeneous: no Λ ≥ 0 satisfies Eq. 9 on random inputs")
    lam_max = bound.x[-1]
    # The smallest norm: bounded least squares with the equations weighted heavily finds which bounds are active, and those
    # being known, the rest is the minimum-norm solution of the equations.
    rough = lsq_linear(
        np.vstack([EQUATION_WEIGHT * a, np.eye(groups)]), np.append(EQUATION_WEIGHT * b, np.zeros(groups)), (0, lam_max), "bvls"
    ).x
    lam = np.where(rough > lam_max - 1e-5, lam_max, np.where(rough < 1e-5, 0.0, rough))
    free = (lam > 0) & (lam < lam_max)
    lam[free] = np.linalg.lstsq(a[:, free], b - a[:, ~free] @ lam[~free], rcond=None)[0]
    return lam, groups - int(np.linalg.matrix_rank(a, tol=TOLERANCE))


def scaling_curves(
    network: nn.Module, lam: dict[str, float], x: Float[Tensor, "batch *shape"], alphas: Float[Tensor, " steps"]
) -> tuple[Float[Tensor, "steps batch classes"], Float[Tensor, "steps batch classes"]]:
    """Φ(x; e^{αΛ}ζ) and e^α Φ(x; ζ) for every α: the two families of curves of Fig. 3."""
    zeta = dict(network.named_parameters())
    with torch.no_grad():
        scaled = [functional_call(network, {n: torch.exp(alpha * lam[n]) * p for n, p in zeta.items()}, (x,)) for alpha in alphas]
        return torch.stack(scaled), torch.exp(alphas)[:, None, None] * network(x)


def estimate(network: nn.Module, input_shape: tuple[int, ...], params: LambdaParams, rng: torch.Generator) -> Homogeneity:
    """Λ of `network` from random batches of standard-normal inputs, in float64 and train mode.

    Batch normalisation is in train mode because that is the function that was trained. Sees the weights, never data.
    Raises `InputError` if the network is not quasi-homogeneous.
    """
    network = copy.deepcopy(network).double().train()
    x = torch.randn(params.inputs, params.batch, *input_shape, generator=rng, dtype=torch.float64)
    values, dimension = choose_lambda(*euler_system(network, x))
    lam = {name: float(value) for (name, _), value in zip(network.named_parameters(), values, strict=True)}
    left, right = scaling_curves(network, lam, x[0], torch.linspace(-1, 1, 21, dtype=torch.float64))
    violation = float((left - right).abs().max() / right.abs().max())
    if violation > TOLERANCE:
        raise InputError(f"the network is not quasi-homogeneous: Φ(x; e^(αΛ)ζ) differs from e^α Φ(x; ζ) by {violation:.1e} of its size")
    return Homogeneity(lam, dimension, violation)


def scaling_table(network: nn.Module, input_shape: tuple[int, ...], homogeneity: Homogeneity, shown: int = 6) -> pd.DataFrame:
    """Fig. 3 as a table: α, input, Φ₀(x; e^{αΛ}ζ) ("scaled") and e^α Φ₀(x; ζ) ("expected") for a few random inputs, first class."""
    x = torch.randn(16, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alphas = torch.linspace(-1, 1, 21, dtype=torch.float64)
    left, right = scaling_curves(copy.deepcopy(network).double().train(), homogeneity.lam, x, alphas)
    rows = [(alphas[i].item(), k, left[i, k, 0].item(), right[i, k, 0].item()) for k in range(shown) for i in range(len(alphas))]
    return pd.DataFrame(rows, columns=["alpha", "input", "scaled", "expected"])


def load_homogeneity(path: Path) -> Homogeneity:
    """Read an estimate that was written as JSON; raises `InputError` if it is missing or damaged."""
    return Homogeneity(**load_json(path))
