"""Λ against known answers, and its refusal of networks that have none."""

import numpy as np
import pytest
import torch
from torch import nn

from gbc.artifacts import InputError
from gbc.classifier import Classifier
from gbc.homogeneity import choose_lambda, estimate, scaling_table
from gbc.params import LambdaParams

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


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_network_without_bias_has_one_over_its_depth(depth):
    layers: list[nn.Module] = [nn.Linear(4, 6, bias=False)]
    for _ in range(depth - 1):
        layers += [nn.ReLU(), nn.Linear(6, 6, bias=False)]
    found = estimate(nn.Sequential(*layers), (4,), INPUTS, rng())
    assert list(found.lam.values()) == pytest.approx([1 / depth] * depth, abs=1e-9)
    assert found.dimension == depth - 1


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


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU()])
def test_a_network_that_is_not_quasi_homogeneous_is_refused(activation):
    with pytest.raises(InputError, match="not quasi-homogeneous"):
        estimate(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), activation), (3,), INPUTS, rng())


def test_the_rule_is_smallest_maximum_then_smallest_norm():
    # λ₁ + λ₂ = 1 and λ₃ + 2 λ₄ = 0.6: the maximum is ½, and the second equation is then solved with the smallest norm.
    lam, dimension = choose_lambda(np.array([[1.0, 1, 0, 0], [0, 0, 1, 2]]), np.array([1.0, 0.6]))
    assert lam == pytest.approx([0.5, 0.5, 0.12, 0.24], abs=1e-8)
    assert dimension == 2


def test_scaling_table_has_equal_columns_for_a_right_lambda_and_different_ones_for_a_wrong_one():
    net = classifier("biased")
    found = estimate(net, (4,), INPUTS, rng())
    table = scaling_table(net, (4,), found)
    np.testing.assert_allclose(table["scaled"], table["expected"], rtol=1e-9)
    wrong = scaling_table(net, (4,), type(found)({name: 1.0 for name in found.lam}, 0, 0.0))
    assert np.abs(wrong["scaled"] - wrong["expected"]).max() > 1e-3
