"""kkt against per-sample loops, dense solves and the paper's own formulas, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from gbc.classifier import Classifier
from gbc.homogeneity import Homogeneity
from gbc.kkt import duality, margin_gradient, margins, oracle, smallest_margin, stationarity, target
from gbc.params import InputError


def network(architecture: str, seed: int = 0) -> Classifier:
    net = Classifier(architecture, (5,), (7, 6), (0, 1, 2))
    net.initialise(torch.Generator().manual_seed(seed), 1.0, 1.0)
    return net.double().freeze()


def batch(n: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=rng, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=rng), torch.rand(n, 3, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("architecture", ["homogeneous", "biased", "batchnorm"])
def test_margin_gradient_equals_a_loop_over_samples_and_classes(architecture):
    net = network(architecture)
    x, y, mu = batch(8)
    zeta = list(net.parameters())
    slow = [torch.zeros_like(p) for p in zeta]
    logits = net(x)
    for i in range(len(x)):
        for c in range(3):
            if c != y[i]:
                pair = torch.autograd.grad(logits[i, y[i]] - logits[i, c], zeta, retain_graph=True)
                slow = [s + mu[i, c] * g for s, g in zip(slow, pair, strict=True)]
    fast = margin_gradient(net(x), y, mu, zeta)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_stationarity_is_the_least_relative_residual_over_positive_scales():
    rng = torch.Generator().manual_seed(2)
    goal = [torch.randn(4, 3, generator=rng, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)]
    gradient = [goal[0] * 0.3 + 0.1 * torch.randn(4, 3, generator=rng, dtype=torch.float64), torch.full((5,), 0.05, dtype=torch.float64)]
    flat_goal, flat = (torch.cat([v.flatten() for v in vs]) for vs in (goal, gradient))
    scanned = min(((flat_goal - s * flat).norm() / flat_goal.norm()).item() for s in torch.linspace(0, 10, 100_001, dtype=torch.float64))
    assert stationarity(goal, gradient).item() == pytest.approx(scanned, abs=1e-7)
    assert stationarity(goal, [-g for g in gradient]).item() == pytest.approx(1)


def test_stationarity_of_dead_multipliers_is_one_with_a_finite_gradient():
    net = network("homogeneous")
    x, y, _ = batch(4)
    mu = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    zeta = list(net.parameters())
    residual = stationarity([p.detach() for p in zeta], margin_gradient(net(x), y, mu, zeta, create_graph=True))
    assert residual.item() == pytest.approx(1)
    assert torch.isfinite(torch.autograd.grad(residual, mu)[0]).all()


def test_stationarity_vanishes_at_a_kkt_point_and_has_eq_5s_sign():
    # A linear classifier on two points: the maximum-margin weights are x₁ − x₂ up to scale, with equal multipliers.
    net = torch.nn.Linear(2, 2, bias=False).double()
    x, y = torch.tensor([[1.0, 0.5], [-1.0, -0.5]]).double(), torch.tensor([0, 1])
    with torch.no_grad():
        net.weight.copy_(torch.stack([x[0] - x[1], x[1] - x[0]]))
    homogeneity = Homogeneity({"weight": 1.0}, {}, 0, 0.0)
    gradient = margin_gradient(net(x), y, torch.ones(2, 2).double(), list(net.parameters()))
    assert stationarity(list(target(net, homogeneity).values()), gradient).item() < 1e-5


def test_target_is_zeta_on_z1_and_zero_on_z2():
    net = network("batchnorm")
    lam = {name: 0.5 if name.startswith(("layers.5", "layers.7")) else 0.0 for name, _ in net.named_parameters()}
    for (name, p), goal in zip(net.named_parameters(), target(net, Homogeneity(lam, {}, 0, 0.0)).values(), strict=True):
        assert torch.equal(goal, p.detach() if lam[name] else torch.zeros_like(p))
    with pytest.raises(InputError, match="Λ is not this classifier's: only one of the two has layers.1.bias, layers.2.bias"):
        target(network("homogeneous"), Homogeneity(lam, {}, 0, 0.0))


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(-2, 2), st.floats(0, 1))
def test_duality_is_the_formula_of_figure_2(margin, alpha, delta):
    expected = max(margin - np.exp(-alpha) - delta, 0) - min(margin - np.exp(-alpha), 0)
    value = duality(torch.tensor(margin, dtype=torch.float64), torch.tensor(alpha, dtype=torch.float64), delta)
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_smallest_margin_is_against_the_runner_up():
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]]), torch.tensor([0, 2])
    assert smallest_margin(logits, y).tolist() == [1.0, -4.0]
    assert margins(logits, y).tolist() == [[0.0, 2.0, 1.0], [1.0, -4.0, 0.0]]


IMAGE = {"convolutional": (3, 4), "residual": (3,)}  # channels of the architectures that take images


@pytest.mark.parametrize("architecture", ["homogeneous", "biased", "batchnorm", "convolutional", "residual"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_oracle_equals_non_negative_least_squares_on_explicit_gradients(architecture: str, everywhere: bool):
    shape = (8, 8) if architecture in IMAGE else (5,)
    net = Classifier(architecture, shape, IMAGE.get(architecture, (7, 6)), (0, 1, 2))
    rng = torch.Generator().manual_seed(0)
    net.initialise(rng, 1.0, 1.0)
    net.double().freeze()
    x, y = torch.randn(6, *shape, generator=rng, dtype=torch.float64), torch.arange(6) % 3
    last = list(dict(net.named_parameters()))[-2:]
    goal = target(net, Homogeneity({name: 1.0 if name in last else 0.5 for name, _ in net.named_parameters()}, {}, 0, 0.0))
    if not everywhere:
        goal = {name: goal[name] for name in last}
    zeta = [p for name, p in net.named_parameters() if name in goal]
    columns = []
    logits = net(x)
    for i in range(len(x)):
        for c in range(3):
            if c != y[i]:
                pair = torch.autograd.grad(logits[i, y[i]] - logits[i, c], zeta, retain_graph=True, materialize_grads=True)
                columns.append(torch.cat([g.flatten() for g in pair]).numpy())
    flat = torch.cat([part.flatten() for part in goal.values()]).numpy()
    mu, residual = nnls(np.stack(columns, 1), flat)
    found = oracle(net, goal, x, y, iterations=5000)
    assert found.residual == pytest.approx(residual / np.linalg.norm(flat), abs=1e-6)
    assert found.mu.min() >= 0
    fitted = np.stack(columns, 1) @ mu
    assert found.cosine == pytest.approx(fitted @ flat / np.linalg.norm(fitted) / np.linalg.norm(flat), abs=1e-5)
    start = 0
    for name, part in goal.items():
        there = slice(start, start + part.numel())
        start += part.numel()
        assert found.groups[name] == pytest.approx(np.linalg.norm(flat[there] - fitted[there]) / np.linalg.norm(flat), abs=1e-3)
