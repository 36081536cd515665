"""Λ of a quasi-homogeneous network, from its weights alone (Eqs. 8–10 of the paper)."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linprog, nnls
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gbc.artifacts import load_json
from gbc.params import InputError, LambdaParams

TOLERANCE = 1e-9  # relative, of the scaling check
FAINT = (1e-6, 1e-7, 1e-8, 1e-9, 1e-10)  # relative size below which equations are left out as rounding, if the scaling check allows it
SETTLED = 3  # inputs in a row that add no rank end the search for equations
SNAP = 1e-5  # a λ nearer than this to one of its bounds is on it; an equation fainter than this counts for less, as rounding blurs it
NOISE, SLACK = 1e-14, 1e-7  # rounding in the equations; a λ of −SLACK is as good as 0, more so if NOISE blurs it
LARGEST, UNBOUNDED = 30.0, 1e3  # any λ that the equations limit is below LARGEST; the box in which the bounds are sought
HIGHS = {"primal_feasibility_tolerance": 1e-9}
FACTOR, PROBE = 2.0**20, 1e-9  # the c of f(c²z)·f(z) = f(cz)², and to what share of their size the two agree
NORMALISATIONS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"}  # homogeneous but for their ε, which Λ shows
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


class Probe(TorchFunctionMode):
    """While it is on, every function of one tensor must be positively homogeneous, of any degree, and not random.

    A network with tanh before a linear layer satisfies Eq. 9 with Λ on that layer alone, but the scale of what comes before tanh matters
    and Λ cannot say how: such networks are refused, with `InputError`, at the function where f(c²z)·f(z) = f(cz)² fails.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.names = {id(p): name for name, p in network.named_parameters()}
        self.before = "the input"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`func` as it is, after a look at it."""
        kwargs = kwargs or {}
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        used = [self.names[id(part)] for part in tensors if id(part) in self.names]
        alone = len(tensors) == 1 and not used and args and args[0] is tensors[0] and args[0].is_floating_point()
        if alone and func.__name__ not in NORMALISATIONS:
            z = args[0].clone()
            plain, again, far, farther = (func(z * factor, *args[1:], **kwargs) for factor in (1, 1, FACTOR, FACTOR**2))
            if isinstance(plain, Tensor) and plain.is_floating_point():
                what = f"{func.__name__} after {self.before}"
                size = plain.abs().max()
                if (random := (plain - again).abs().max()) > 0:
                    raise InputError(
                        f"{REFUSED}{what} is random, two passes differ by {random / size:.1e} of their size; call eval() first"
                    )
                miss = (farther * plain - far.square()).abs().max()
                if not miss <= PROBE * (whole := far.square().max()):  # NaN is no agreement
                    raise InputError(
                        f"{REFUSED}{what} is not positively homogeneous: f(c²z)·f(z) and f(cz)² differ by {miss / whole:.1e} of their size"
                    )
        self.before = used[0] if used else self.before
        return func(*args, **kwargs)


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
        gradient = torch.autograd.grad(s, zeta, create_graph=True, materialize_grads=True)
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
        grown = int(np.linalg.matrix_rank(rows, FAINT[-1] * np.sqrt(len(rows))))
        rank, settled = grown, settled + 1 if grown == rank else 0
        if count >= params.inputs and settled >= SETTLED:
            break
    return rows


@dataclass(frozen=True)
class Solutions:
    """All solutions start + null·z of the equations, the shortest one first, and the equations without their redundancy."""

    a: Float[np.ndarray, "rank groups"]
    b: Float[np.ndarray, " rank"]
    weight: Float[np.ndarray, " rank"]  # 1 for equations that rounding does not blur
    start: Float[np.ndarray, " groups"]
    null: Float[np.ndarray, "groups free"]
    slack: float  # λ ≥ −slack is as good as λ ≥ 0


def solve(system: Float[np.ndarray, "rows columns"], faint: float) -> Solutions | None:
    """Solutions of `system`, whose last column is the right-hand side, less what is fainter than `faint`; None if there is none."""
    _, singular, basis = np.linalg.svd(system, full_matrices=False)
    singular = singular / np.sqrt(len(system))
    basis, singular = basis[singular > faint], singular[singular > faint]
    a, b = basis[:, :-1], basis[:, -1]
    rest = 1 - b @ b  # the rows of (A, b) are orthonormal: AAᵀ = I − bbᵀ, so that Aᵀb / (1 − bᵀb) is the shortest solution
    if rest < LARGEST**-2:
        return None
    null = np.linalg.svd(a)[2][len(a) :].T
    slack = max(SLACK, NOISE / singular.min())
    return Solutions(a, b, np.minimum(1, singular / SNAP), a.T @ b / rest, np.where(np.abs(null) > slack, null, 0), slack)


def choose_lambda(solutions: Solutions) -> Float[np.ndarray, " groups"] | None:
    """The solution λ ≥ 0 with the smallest λ_max and, among those, the smallest norm; None if there is no solution λ ≥ 0."""
    a, b, start, null, slack = solutions.a, solutions.b, solutions.start, solutions.null, solutions.slack
    groups, free = null.shape
    smallest = linprog(  # variables (z, t): minimise t subject to 0 ≤ λ ≤ t, λ = start + null·z
        np.append(np.zeros(free), 1.0),
        A_ub=np.block([[-null, np.zeros((groups, 1))], [null, -np.ones((groups, 1))]]),
        b_ub=np.append(start + slack, -start),
        bounds=(None, None),
        options=HIGHS,
    )
    if not smallest.success:
        return None
    # The smallest norm is a least-distance problem: min ‖z‖ subject to Gz ≥ h, which one non-negative least squares solves (Lawson &
    # Hanson 1974, ch. 23). It finds which bounds are active; those being known, λ_max and the λ between the bounds solve the equations.
    lam_max = smallest.x[-1] + slack
    g, h = np.vstack([null, -null]), np.append(-start - slack, start - lam_max)
    dual = nnls(np.vstack([g.T, h]), np.append(np.zeros(free), 1.0))[0]
    rest = np.append(g.T @ dual, h @ dual - 1)
    rough = start - null @ rest[:-1] / rest[-1]
    top, between = rough > lam_max - SNAP, (rough > SNAP) & (rough <= lam_max - SNAP)
    columns = np.column_stack([a[:, top].sum(1), a[:, between]]) * solutions.weight[:, None]
    exact = np.linalg.lstsq(columns, b * solutions.weight, rcond=SNAP)[0].clip(min=0)
    lam = np.zeros(groups)
    lam[top], lam[between] = exact[0], exact[1:]
    return lam


def polytope(solutions: Solutions) -> tuple[list[list[float | None]], int]:
    """Smallest and largest λ of every group over all solutions λ ≥ 0, None where there is no largest, and their dimension.

    Raises `InputError` if linear programming fails.
    """
    if not solutions.null.size:
        return [[value, value] for value in solutions.start.clip(0).tolist()], 0
    bounds = []
    for direction, value in zip(solutions.null, solutions.start, strict=True):
        ends = []
        for sign in (1, -1):
            box = (-UNBOUNDED, UNBOUNDED)
            end = linprog(sign * direction, -solutions.null, solutions.start + solutions.slack, bounds=box, options=HIGHS)
            if not end.success:
                raise InputError(f"the bounds of Λ were not found: {end.message}")
            ends.append(value + sign * end.fun)
        low, high = np.clip(ends, 0, None).tolist()
        bounds.append([low, high if high < LARGEST else None])
    loose = [high is None or high > low + SNAP for low, high in bounds]
    return bounds, sum(loose) - int(np.linalg.matrix_rank(solutions.a[:, loose], SNAP))


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
    network = copy.deepcopy(network).cpu().double().requires_grad_()
    x = torch.randn(params.batch, *input_shape, generator=rng, dtype=torch.float64)
    with torch.no_grad(), Probe(network):
        output = network(x)
    if not torch.isfinite(output).all():
        raise InputError("the network's output is infinite or NaN on random inputs: are its weights damaged?")
    if not output.any():
        raise InputError("the network's output is zero on random inputs, whatever its scale: it has no Λ")
    names = [name for name, _ in network.named_parameters()]
    system = euler_system(network, input_shape, params, rng)
    for faint in FAINT:
        solutions = solve(system, faint)
        values = solutions and choose_lambda(solutions)
        if solutions is None or values is None:
            rest = system[:, -1] - system[:, :-1] @ nnls(system[:, :-1], system[:, -1])[0]
            culprit, size = names[int(np.abs(system[:, :-1].T @ rest).argmax())], np.abs(rest).max()
            raise InputError(f"{REFUSED}no Λ ≥ 0 satisfies Eqs. 9 and 10; the best misses them by {size:.1e}, most of it at {culprit}")
        lam = dict(zip(names, values.tolist(), strict=True))
        left, right = scaling_curves(network, lam, x, torch.linspace(-1, 1, 21, dtype=torch.float64))
        violation = float((left - right).abs().max() / right.abs().max())
        if violation <= TOLERANCE:
            bounds, dimension = polytope(solutions)
            return Homogeneity(lam, dict(zip(names, bounds, strict=True)), dimension, violation)
    raise InputError(f"{REFUSED}Φ(x; e^(αΛ)ζ) differs from e^α Φ(x; ζ) by more than {TOLERANCE:.0e} of its size for the best Λ")


def scaling_table(network: nn.Module, input_shape: tuple[int, ...], homogeneity: Homogeneity, shown: int = 6) -> pd.DataFrame:
    """Fig. 3 as a table: α, input, Φ₀(x; e^{αΛ}ζ) ("scaled") and e^α Φ₀(x; ζ) ("expected") for a few random inputs, first class."""
    x = torch.randn(16, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alphas = torch.linspace(-1, 1, 21, dtype=torch.float64)
    left, right = scaling_curves(copy.deepcopy(network).cpu().double(), homogeneity.lam, x, alphas)
    rows = [(alphas[i].item(), k, left[i, k, 0].item(), right[i, k, 0].item()) for k in range(shown) for i in range(len(alphas))]
    return pd.DataFrame(rows, columns=["alpha", "input", "scaled", "expected"])


def load_homogeneity(path: Path) -> Homogeneity:
    """Read an estimate that was written as JSON; raises `InputError` if it is missing or damaged."""
    try:
        return Homogeneity(**load_json(path))
    except TypeError as error:
        raise InputError(f"{path}: not an estimate of Λ ({error}); make it anew with `dvc repro`") from error
