"""Λ of a quasi-homogeneous network, from its weights alone (Eqs. 8–10 of the paper)."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linprog, lsq_linear, nnls
from torch import Tensor, nn
from torch.func import functional_call

from gbc.artifacts import InputError, load_json
from gbc.params import LambdaParams

EQUATION_WEIGHT = 1e4  # of the Euler equations against the norm
TOLERANCE = 1e-9  # relative; float64 Euler equations of a quasi-homogeneous network hold to about 1e-13
SETTLED = 3  # inputs in a row that add no rank end the search for equations
SNAP = 1e-5  # a λ nearer than this to one of its bounds is on it
EXACT = {"presolve": False}  # HiGHS's presolve takes equations as tight as these for infeasible
FACTOR, PROBE = 16, 1e-6  # a positively homogeneous activation f has f(FACTOR·z) = FACTOR·f(z), to PROBE of its size
NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # what is before them is free of scale
REFUSED = "the network is not quasi-homogeneous: "


@dataclass(frozen=True)
class Homogeneity:
    """Λ as one λ per parameter tensor ("group"), with what it was chosen from and how well it holds."""

    lam: dict[str, float]  # λ of every group
    bounds: dict[str, list[float | None]]  # smallest and largest λ ≥ 0 of every group over all solutions; None: unbounded
    dimension: int  # of the polytope of solutions λ ≥ 0: 0 if Λ is unique
    violation: float  # max |Φ(x; e^{αΛ}ζ) − e^α Φ(x; ζ)| / max |e^α Φ(x; ζ)|, float64

    @property
    def lam_max(self) -> float:
        """λ_max, the largest element of Λ."""
        return max(self.lam.values())

    @property
    def z1(self) -> list[str]:
        """Groups of Z₁: those whose λ is λ_max. The others are Z₂, and their stationarity target is zero."""
        return [name for name, value in self.lam.items() if value > self.lam_max * (1 - 1e-6)]


def probe(network: nn.Module, x: Float[Tensor, "batch *shape"]) -> None:
    """Raise `InputError`, with names and sizes, if a module without parameters is neither positively homogeneous nor a normalisation.

    A network with tanh before a linear layer satisfies Eq. 9 with Λ on that layer alone, but the scale of what comes before tanh matters
    and Λ cannot say how: such networks are refused at the activation, where f(cz) = c·f(z) fails (and so does f(cz) = f(z)).
    """
    before = "its input"

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal before
        if any(True for _ in module.parameters(recurse=False)):
            before = names[module] + ".weight"
            return
        z = arguments[0]
        once, again, scaled = (module.forward(z * factor) for factor in (1, 1, FACTOR))
        size = once.abs().max().clamp_min(torch.finfo(z.dtype).tiny)
        what = f"{names[module]} ({type(module).__name__}, after {before})"
        if (random := float((once - again).abs().max() / size)) > 0:
            raise InputError(f"{REFUSED}{what} is random, two passes differ by {random:.1e} of their size; call eval() on it first")
        miss = float((scaled - FACTOR * once).abs().max() / (FACTOR * size))
        if miss > PROBE and (scaled - once).abs().max() > 1e-2 * size:
            raise InputError(
                f"{REFUSED}{what} is not positively homogeneous: f({FACTOR}z) differs from {FACTOR}f(z) by {miss:.1e} of its size"
            )

    names = {module: name for name, module in network.named_modules()}
    hooks = [module.register_forward_pre_hook(look) for module in network.modules() if not list(module.children())]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()


def euler_equations(
    network: nn.Module, inputs: Iterator[Float[Tensor, "batch *shape"]], rng: torch.Generator
) -> Iterator[Float[np.ndarray, "2 columns"]]:
    """For every input, Eq. 9 and Eq. 10's derivative equation along a random direction, as rows of coefficients and right-hand side.

    Both are taken of s = ⟨w, Φ(x)⟩ with random w over batch and classes. Eq. 9 reads Σ_g λ_g ⟨ζ_g, ∇_g s⟩ = s. Differentiated along v it
    is Σ_g λ_g (⟨ζ_g, ∇_g(v·∇s)⟩ + v_g·∇_g s) = v·∇s, which also sees groups that are zero.
    """
    zeta = list(network.parameters())
    for x in inputs:
        logits = network(x)
        s = (torch.randn(logits.shape, generator=rng, dtype=x.dtype) * logits).sum()
        gradient = torch.autograd.grad(s, zeta, create_graph=True)
        v = [torch.randn(p.shape, generator=rng, dtype=x.dtype) * (p.detach().square().mean().sqrt() or 1) for p in zeta]
        slopes = [(direction * d).sum() for direction, d in zip(v, gradient, strict=True)]
        slope = torch.stack(slopes).sum()
        second = torch.autograd.grad(slope, zeta, materialize_grads=True) if slope.requires_grad else [torch.zeros_like(p) for p in zeta]
        first_order = [(p * d).sum().item() for p, d in zip(zeta, gradient, strict=True)]
        second_order = [((p * d).sum() + part).item() for p, d, part in zip(zeta, second, slopes, strict=True)]
        yield np.array([[*first_order, s.item()], [*second_order, slope.item()]])


def euler_system(
    network: nn.Module, shape: tuple[int, ...], params: LambdaParams, rng: torch.Generator
) -> Float[np.ndarray, "rows columns"]:
    """Equations from random inputs, at least `params.inputs` of them and until further ones add no rank; every row's largest entry is 1."""
    inputs = iter(lambda: torch.randn(params.batch, *shape, generator=rng, dtype=torch.float64), None)
    rows = np.empty((0, len(list(network.parameters())) + 1))
    rank = settled = 0
    for count, pair in enumerate(euler_equations(network, inputs, rng), 1):
        scale = np.abs(pair).max(1)
        rows = np.vstack([rows, pair[scale > 0] / scale[scale > 0, None]])
        grown = int(np.linalg.matrix_rank(rows, TOLERANCE * np.sqrt(len(rows))))
        rank, settled = grown, settled + 1 if grown == rank else 0
        if count >= params.inputs and settled >= SETTLED:
            break
    return rows


def choose_lambda(
    system: Float[np.ndarray, "rows columns"], names: list[str]
) -> tuple[Float[np.ndarray, " groups"], list[list[float | None]], int]:
    """Solution λ ≥ 0 with the smallest λ_max and, among those, the smallest norm; bounds of every λ; dimension of the polytope.

    The last column of `system` is the right-hand side; bounds are over all solutions λ ≥ 0, None where there is none. Raises `InputError`
    if no λ ≥ 0 solves the system, with the group whose Euler terms are most at odds with what remains unsolved.
    """
    groups = len(names)
    _, singular, basis = np.linalg.svd(system, full_matrices=False)  # the same solutions, in at most groups + 1 equations
    basis = basis[singular > TOLERANCE * np.sqrt(len(system))]
    a, b = basis[:, :groups], basis[:, groups]
    smallest = linprog(  # variables (λ, t): minimise t subject to Aλ = b, 0 ≤ λ ≤ t
        np.append(np.zeros(groups), 1.0),
        A_ub=np.column_stack([np.eye(groups), -np.ones(groups)]),
        b_ub=np.zeros(groups),
        A_eq=np.column_stack([a, np.zeros(len(a))]),
        b_eq=b,
        options=EXACT,
    )
    if not smallest.success:
        rest = system[:, groups] - system[:, :groups] @ nnls(system[:, :groups], system[:, groups])[0]
        culprit = names[int(np.abs(system[:, :groups].T @ rest).argmax())]
        size = np.abs(rest).max()
        raise InputError(f"{REFUSED}no Λ ≥ 0 satisfies Eqs. 9 and 10; the best misses them by {size:.1e}, most of it at {culprit}")
    lam_max = smallest.x[-1]
    bounds: list[list[float | None]] = []
    for c in np.eye(groups):
        ends = [linprog(sign * c, A_eq=a, b_eq=b, options=EXACT) for sign in (1, -1)]  # λ ≥ 0 is linprog's default
        bounds.append([sign * end.fun if end.success else None for sign, end in zip((1, -1), ends, strict=True)])
    # The smallest norm: bounded least squares with the equations weighted heavily finds which bounds are active. Those being known, λ_max
    # and the λ between the bounds are the minimum-norm solution of the well-conditioned original equations.
    rough = lsq_linear(
        np.vstack([EQUATION_WEIGHT * a, np.eye(groups)]), np.append(EQUATION_WEIGHT * b, np.zeros(groups)), (0, lam_max), "bvls"
    ).x
    top, free = rough > lam_max - SNAP, (rough > SNAP) & (rough <= lam_max - SNAP)
    columns = np.column_stack([system[:, :groups][:, top].sum(1), system[:, :groups][:, free]])
    solution = np.linalg.lstsq(columns, system[:, groups], rcond=SNAP)[0]
    lam = np.zeros(groups)
    lam[top], lam[free] = solution[0], solution[1:]
    loose = [high is None or high > low + SNAP for low, high in bounds if low is not None]
    return lam, bounds, sum(loose) - int(np.linalg.matrix_rank(a[:, loose], SNAP))


def scaling_curves(
    network: nn.Module, lam: dict[str, float], x: Float[Tensor, "batch *shape"], alphas: Float[Tensor, " steps"]
) -> tuple[Float[Tensor, "steps batch classes"], Float[Tensor, "steps batch classes"]]:
    """Φ(x; e^{αΛ}ζ) and e^α Φ(x; ζ) for every α: the two families of curves of Fig. 3."""
    zeta = dict(network.named_parameters())
    with torch.no_grad():
        scaled = [functional_call(network, {n: torch.exp(alpha * lam[n]) * p for n, p in zeta.items()}, (x,)) for alpha in alphas]
        return torch.stack(scaled), torch.exp(alphas)[:, None, None] * network(x)


def estimate(network: nn.Module, input_shape: tuple[int, ...], params: LambdaParams, rng: torch.Generator) -> Homogeneity:
    """Λ of any `network` from random batches of standard-normal inputs, in float64. Sees the weights, never data.

    The network is taken in the mode it is in: batch normalisation in train mode is a function of the whole batch, in eval mode affine.
    Raises `InputError` that names the module or the group at fault, and by how much, if the network is not quasi-homogeneous.
    """
    network = copy.deepcopy(network).double()
    x = torch.randn(params.batch, *input_shape, generator=rng, dtype=torch.float64)
    probe(network, x)
    if not network(x).abs().max() > 0:
        raise InputError("the network's output is zero on random inputs, whatever its scale: it has no Λ")
    names = [name for name, _ in network.named_parameters()]
    system = euler_system(network, input_shape, params, rng)
    values, bounds, dimension = choose_lambda(system, names)
    if not any(isinstance(module, NORMALISATIONS) for module in network.modules()):
        for name, (_, largest), terms in zip(names, bounds, system.T, strict=False):
            if largest is not None and largest < SNAP < np.abs(terms).max():
                raise InputError(
                    f"{REFUSED}the scale of {name} matters, by up to {np.abs(terms).max():.1e} of the output, but no λ > 0 fits it"
                )
    lam = dict(zip(names, values.tolist(), strict=True))
    left, right = scaling_curves(network, lam, x, torch.linspace(-1, 1, 21, dtype=torch.float64))
    violation = float((left - right).abs().max() / right.abs().max())
    if violation > TOLERANCE:
        raise InputError(f"{REFUSED}Φ(x; e^(αΛ)ζ) differs from e^α Φ(x; ζ) by {violation:.1e} of its size")
    return Homogeneity(lam, dict(zip(names, bounds, strict=True)), dimension, violation)


def scaling_table(network: nn.Module, input_shape: tuple[int, ...], homogeneity: Homogeneity, shown: int = 6) -> pd.DataFrame:
    """Fig. 3 as a table: α, input, Φ₀(x; e^{αΛ}ζ) ("scaled") and e^α Φ₀(x; ζ) ("expected") for a few random inputs, first class."""
    x = torch.randn(16, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alphas = torch.linspace(-1, 1, 21, dtype=torch.float64)
    left, right = scaling_curves(copy.deepcopy(network).double(), homogeneity.lam, x, alphas)
    rows = [(alphas[i].item(), k, left[i, k, 0].item(), right[i, k, 0].item()) for k in range(shown) for i in range(len(alphas))]
    return pd.DataFrame(rows, columns=["alpha", "input", "scaled", "expected"])


def load_homogeneity(path: Path) -> Homogeneity:
    """Read an estimate that was written as JSON; raises `InputError` if it is missing or damaged."""
    return Homogeneity(**load_json(path))
