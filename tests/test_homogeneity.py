"""Λ against known answers, and its refusal of networks that have none."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from gbc.classifier import Classifier
from gbc.homogeneity import choose_lambda, estimate, polytope, scaling_table, solve
from gbc.params import InputError, LambdaParams

INPUTS = LambdaParams(inputs=8, batch=8)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def classifier(architecture: str) -> Classifier:
    net = Classifier(architecture, (4,), (9, 8), (0, 1, 2))
    net.initialise(rng(), 1.0, 1.0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=rng())
    return net


def test_the_papers_network_has_lambda_one_on_its_last_bias():
    found = estimate(nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 1)), (2,), INPUTS, rng())
    assert found.lam == pytest.approx({"0.weight": 1 / 3, "0.bias": 1 / 3, "2.weight": 2 / 3, "2.bias": 1.0}, abs=1e-9)
    assert found.z1 == ["2.bias"]
    assert found.violation <= 1e-9


@pytest.mark.parametrize("depth", range(1, 7))
def test_a_network_without_bias_has_one_over_its_depth(depth):
    layers: list[nn.Module] = [nn.Linear(4, 16, bias=False)]
    for _ in range(depth - 1):
        layers += [nn.ReLU(), nn.Linear(16, 16, bias=False)]
    found = estimate(nn.Sequential(*layers), (4,), INPUTS, rng())
    assert list(found.lam.values()) == pytest.approx([1 / depth] * depth, abs=1e-12)
    assert found.dimension == depth - 1
    for low, high in found.bounds.values():
        assert [low, high] == pytest.approx([0 if depth > 1 else 1, 1], abs=1e-6)


def test_a_bias_in_layer_one_changes_nothing():
    found = estimate(classifier("homogeneous"), (4,), INPUTS, rng())
    assert list(found.lam.values()) == pytest.approx([1 / 3] * 4, abs=1e-9)
    assert len(found.z1) == 4


def test_batch_normalisation_leaves_one_half_on_the_last_scale_shift_and_weight():
    found = estimate(classifier("batchnorm"), (4,), INPUTS, rng())
    assert found.z1 == ["layers.5.weight", "layers.5.bias", "layers.7.weight"]
    assert [found.lam[name] for name in found.z1] == pytest.approx([0.5] * 3, abs=1e-9)
    assert all(value == 0 for name, value in found.lam.items() if name not in found.z1)
    assert found.violation <= 1e-9


class Functional(nn.Module):
    """Linear, `activation`, linear: without a module for the activation."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(4, 9), nn.Linear(9, 3), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output."""
        return self.last(self.activation(self.first(x)))


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (nn.Tanh(), r"tanh after 0.weight is not positively homogeneous: .* by (9\..e-01|1.0e\+00)"),
        (nn.GELU(), "gelu after 0.weight is not positively homogeneous"),
        (nn.ReLU6(), "hardtanh after 0.weight is not positively homogeneous"),
        (nn.Dropout(), "dropout after 0.weight is random, two passes differ by"),
        (nn.Sequential(nn.BatchNorm1d(9), nn.Tanh()), "tanh after 1.0.weight is not positively homogeneous"),
    ],
)
def test_a_network_that_is_not_quasi_homogeneous_is_refused_with_the_culprit(activation: nn.Module, message: str):
    with pytest.raises(InputError, match="not quasi-homogeneous: " + message):
        estimate(nn.Sequential(nn.Linear(4, 9), activation, nn.Linear(9, 3)), (4,), INPUTS, rng())


@pytest.mark.parametrize("function", [torch.tanh, F.gelu, torch.sin, torch.exp, torch.Tensor.sigmoid])
def test_an_activation_that_is_no_module_is_refused_too(function: Callable[[torch.Tensor], torch.Tensor]):
    with pytest.raises(InputError, match="after first.weight is not positively homogeneous"):
        estimate(Functional(function), (4,), INPUTS, rng())


def test_a_residual_sum_without_normalisation_has_zero_in_its_branch():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.branch, self.last = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """The output."""
            h = self.first(x)
            return self.last(h + torch.relu(self.branch(h)))

    found = estimate(Sum(), (4,), INPUTS, rng())
    assert list(found.lam.values()) == pytest.approx([0.5, 0, 0.5], abs=1e-12)


@pytest.mark.parametrize("scale", [0.1, 20, 100, 500])
def test_the_epsilon_of_batch_normalisation_does_not_blur_lambda(scale: float):
    net = classifier("batchnorm")
    with torch.no_grad():
        for name in ("layers.1.weight", "layers.4.weight"):
            net.get_parameter(name).mul_(scale)
    found = estimate(net, (4,), INPUTS, rng())
    assert [found.lam[name] for name in found.z1] == pytest.approx([0.5] * 3, abs=1e-9)
    assert [found.bounds[name][1] for name in found.z1] == pytest.approx([1] * 3, abs=1e-4)


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-6, 0])
def test_a_small_or_zero_last_bias_has_lambda_one(size: float):
    net = classifier("biased")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.mul_(size)
    assert estimate(net, (4,), INPUTS, rng()).z1 == ["layers.5.bias"]


def test_frozen_and_unused_parameters_are_no_obstacle_and_damaged_ones_are_named():
    net = Functional(torch.relu).requires_grad_(False)
    net.unused = nn.Parameter(torch.ones(2))
    found = estimate(net, (4,), INPUTS, rng())
    assert found.lam["unused"] == 0
    assert found.bounds["unused"] == [0, None]
    with torch.no_grad():
        net.last.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="infinite or NaN"):
        estimate(net, (4,), INPUTS, rng())


def test_an_output_that_no_lambda_scales_is_refused_with_a_group():
    class Offset(Functional):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x[:, :1]

    with pytest.raises(InputError, match="no Λ ≥ 0 satisfies Eqs. 9 and 10; .* most of it at"):
        estimate(Offset(torch.relu), (4,), INPUTS, rng())


def test_an_added_constant_is_refused_where_it_is_added():
    class Offset(Functional):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    with pytest.raises(InputError, match="add after last.weight is not positively homogeneous"):
        estimate(Offset(torch.relu), (4,), INPUTS, rng())


def test_a_dead_network_is_refused():
    first = nn.Linear(4, 3)
    nn.init.constant_(first.bias, -100)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(3, 2, bias=False))
    with pytest.raises(InputError, match="output is zero on random inputs"):
        estimate(net, (4,), INPUTS, rng())


def test_dropout_in_eval_mode_and_leaky_relu_are_accepted():
    net = nn.Sequential(nn.Linear(4, 9, bias=False), nn.LeakyReLU(0.1), nn.Dropout(), nn.Linear(9, 3, bias=False)).eval()
    assert list(estimate(net, (4,), INPUTS, rng()).lam.values()) == pytest.approx([0.5, 0.5], abs=1e-12)


@pytest.mark.parametrize(
    "normalisation",
    [nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4, affine=False)]
    + [nn.LayerNorm([4, 6, 6], elementwise_affine=False), nn.RMSNorm([4, 6, 6], elementwise_affine=False)],
    ids=lambda module: type(module).__name__,
)
def test_normalisations_without_a_scale_of_their_own_are_accepted(normalisation: nn.Module):
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), normalisation, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3, bias=False))
    assert list(estimate(net, (2, 6, 6), INPUTS, rng()).lam.values()) == pytest.approx([0, 1], abs=1e-9)


def test_batch_normalisation_in_eval_mode_is_an_affine_map():
    net = nn.Sequential(nn.Linear(4, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3, bias=False))
    net(torch.randn(30, 4, generator=rng()))  # running means away from 0, so that the first weight's scale is fixed
    found = estimate(net.eval(), (4,), INPUTS, rng())
    assert list(found.lam.values()) == pytest.approx([0, 0.5, 0.5, 0.5], abs=1e-9)


def test_the_rule_is_smallest_maximum_then_smallest_norm():
    # λ₁ + λ₂ = 1 and λ₃ + 2 λ₄ = 0.6: the maximum is ½, and the second equation is then solved with the smallest norm.
    solutions = solve(np.array([[1.0, 1, 0, 0, 1], [0, 0, 1, 2, 0.6]]), 1e-7)
    assert solutions is not None
    lam, (bounds, dimension) = choose_lambda(solutions), polytope(solutions)
    assert lam == pytest.approx([0.5, 0.5, 0.12, 0.24], abs=1e-8)
    assert dimension == 2
    assert bounds == [pytest.approx([0, high]) for high in (1, 1, 0.6, 0.3)]


def test_a_group_that_the_output_ignores_is_unbounded_and_gets_zero():
    solutions = solve(np.array([[1.0, 0, 1]]), 1e-7)
    assert solutions is not None
    lam, (bounds, dimension) = choose_lambda(solutions), polytope(solutions)
    assert lam == pytest.approx([1, 0])
    assert bounds == [pytest.approx([1, 1]), [0, None]]
    assert dimension == 1


def build(kind: str, widths: list[int], classes: int, activation: nn.Module, pooling: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of one of the supported kinds and the shape of its inputs; the first width is the input's."""
    if kind == "residual":
        return Classifier("residual", (8, 8), tuple(widths[:2]), tuple(range(classes))), (8, 8)
    layers: list[nn.Module] = []
    for i, (fan_in, width) in enumerate(itertools.pairwise(widths)):
        bias = kind == "all" or (kind in ("first", "conv") and i == 0)
        if kind == "conv":
            layers += [nn.Conv2d(fan_in, width, 3, padding=1, bias=bias), activation, pooling]
        else:
            layers.append(nn.Linear(fan_in, width, bias=bias))
            layers += {"batchnorm": [nn.BatchNorm1d(width)], "layernorm": [nn.LayerNorm(width)]}.get(kind, [])
            layers.append(activation)
    side = 8 >> (len(widths) - 1) if kind == "conv" else 1
    layers += [nn.Flatten(), nn.Linear(widths[-1] * side**2, classes, bias=kind == "all")]
    return nn.Sequential(*layers), (widths[0], 8, 8) if kind == "conv" else (widths[0],)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    st.sampled_from(["none", "first", "all", "batchnorm", "layernorm", "conv", "residual"]),
    st.lists(st.integers(2, 6), min_size=2, max_size=4),
    st.integers(1, 4),
    st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2)]),
    st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2)]),
    st.integers(0, 10**6),
)
def test_lambda_scales_random_networks_of_every_kind(
    kind: str, widths: list[int], classes: int, activation: nn.Module, pooling: nn.Module, seed: int
):
    network, shape = build(kind, widths, classes, activation, pooling)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, max(1, parameter[0].numel()) ** -0.5, generator=generator)
    batch = torch.randn(INPUTS.batch, *shape, generator=rng(), dtype=torch.float64)
    assume(network.double()(batch).abs().max() > 1e-6)  # ReLU networks as narrow as these may be dead
    found = estimate(network, shape, INPUTS, rng())
    assert found.violation <= 1e-9
    assert min(found.lam.values()) >= 0
    for name, value in found.lam.items():
        low, high = found.bounds[name]
        assert low is not None
        assert low - 1e-6 <= value
        assert high is None or value <= high + 1e-6


@pytest.mark.slow
def test_resnet_18_has_all_of_lambda_on_its_last_layer():
    found = estimate(resnet18(), (3, 32, 32), INPUTS, rng())
    assert found.z1 == ["fc.weight", "fc.bias"]
    assert found.lam_max == pytest.approx(1, abs=1e-9)
    assert all(value == 0 for name, value in found.lam.items() if name not in found.z1)
    assert found.violation <= 1e-9


def test_scaling_table_has_equal_columns_for_a_right_lambda_and_different_ones_for_a_wrong_one():
    net = classifier("biased")
    found = estimate(net, (4,), INPUTS, rng())
    table = scaling_table(net, (4,), found)
    np.testing.assert_allclose(table["scaled"], table["expected"], rtol=1e-9)
    wrong = scaling_table(net, (4,), type(found)({name: 1.0 for name in found.lam}, {}, 0, 0.0))
    assert np.abs(wrong["scaled"] - wrong["expected"]).max() > 1e-3
