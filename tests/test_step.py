"""The step in closed form and in chunks against autograd's double backward, to rounding."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gbc.classifier import Classifier, SmoothGateReLU
from gbc.closed_form import ClosedForm, step_of
from gbc.distributed import normalise
from gbc.homogeneity import Homogeneity
from gbc.kkt import margin_gradient, stationarity, target
from gbc.precision import factor_type
from gbc.step import TINY_SPREAD, DoubleBackward, chunked_stationarity

PERCEPTRONS = ["homogeneous", "biased", "batchnorm"]


def network(architecture: str, hidden: tuple[int, ...], dtype: torch.dtype) -> Classifier:
    shape = (8, 8) if architecture in ("convolutional", "residual") else (5,)
    net = Classifier(architecture, shape, hidden, (0, 1, 2))
    rng = torch.Generator().manual_seed(0)
    net.initialise(rng, 1.0, 1.0)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    return net.to(dtype)


def batch(net: Classifier, samples: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *net.input_shape, generator=rng).to(dtype).requires_grad_()
    mu = torch.rand(samples, 3, generator=rng).to(dtype).requires_grad_()
    return x, torch.randint(3, (samples,), generator=rng), mu


def everywhere(net: Classifier, z2: tuple[str, ...] = ()) -> Homogeneity:
    return Homogeneity({name: 0.0 if name in z2 else 0.5 for name, _ in net.named_parameters()}, {}, 0, 0.0)


def reference(net: Classifier, homogeneity: Homogeneity, gate: float | None, x: torch.Tensor, own: torch.Tensor, mu: torch.Tensor):
    net.requires_grad_(True).freeze().set_gate(gate)
    gradient = margin_gradient(net(x), own, mu, list(net.parameters()), create_graph=True)
    residual = stationarity(list(target(net, homogeneity).values()), gradient)
    return residual.detach(), *torch.autograd.grad(residual, (x, mu))


def moments(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    others = [0, *range(2, z.ndim)]
    return z.mean(others), z.var(others, correction=0)


@settings(deadline=None, max_examples=100)
@given(
    architecture=st.sampled_from(PERCEPTRONS),
    hidden=st.lists(st.integers(2, 40), max_size=3),
    samples=st.integers(2, 60),
    gate=st.sampled_from([None, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    kept=st.booleans(),
)
def test_the_closed_form_equals_the_double_backward(architecture, hidden, samples, gate, dtype, kept):
    net = network(architecture, tuple(hidden), dtype)
    homogeneity = everywhere(net, () if kept else ("layers.1.weight", "layers.2.bias"))
    x, own, mu = batch(net, samples, dtype)
    expected = reference(net, homogeneity, gate, x, own, mu)
    step = step_of(net, homogeneity, gate)
    assert isinstance(step, ClosedForm)
    with mock.patch.multiple("gbc.closed_form", BLOCK=16 * samples, STRIP=7, NARROW=2):  # several of each
        torch.testing.assert_close(step.logits(x), net(x))
        residual = step.stationarity(own, mu)
        found = residual.detach(), *torch.autograd.grad(residual, (x, mu))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for fast, slow in zip(found, expected, strict=True):
        assert (fast - slow).norm() <= tolerance * max(slow.norm().item(), 1e-3)


@pytest.mark.parametrize("architecture", [*PERCEPTRONS, "convolutional", "residual"])
@pytest.mark.parametrize("gate", [None, 50.0])
def test_every_architecture_has_a_step_and_a_chunked_one(architecture: str, gate: float | None):
    net = network(architecture, (3,) if architecture == "residual" else (4, 3), torch.float64)
    x, own, mu = batch(net, 12, torch.float64)
    expected = reference(net, everywhere(net), gate, x, own, mu)
    coupled = architecture in ("batchnorm", "residual")
    goal = list(target(net, everywhere(net)).values())
    chunked = chunked_stationarity(net, goal, x, own, mu, len(x) if coupled else 5)
    in_chunks = chunked.detach(), *torch.autograd.grad(chunked, (x, mu))
    step = step_of(net, everywhere(net), gate)
    assert isinstance(step, DoubleBackward if architecture in ("convolutional", "residual") else ClosedForm)
    step.logits(x)
    residual = step.stationarity(own, mu)
    whole = residual.detach(), *torch.autograd.grad(residual, (x, mu))
    for found, piecewise, slow in zip(whole, in_chunks, expected, strict=True):
        torch.testing.assert_close(found, slow, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(piecewise, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ["batchnorm", "residual"])
def test_the_statistics_are_those_that_batch_normalisation_keeps(architecture: str):
    net = network(architecture, (3,), torch.float64)
    x, _, _ = batch(net, 20, torch.float64)
    net.settle(x.detach())
    step = step_of(net, everywhere(net), 50.0)
    step.logits(x)
    assert step.statistics_mismatch(20).item() < 1e-20
    step.logits(x * 1.5 + 0.1)
    assert step.statistics_mismatch(20).item() > 0.01


@pytest.mark.parametrize("architecture", ["batchnorm", "residual"])
def test_a_dead_neuron_leaves_the_statistics_numbers(architecture: str):
    net = network(architecture, (3,), torch.float64)
    x, _, _ = batch(net, 20, torch.float64)
    with torch.no_grad():
        next(net.parameters())[0] = 0
    net.settle(x.detach())
    step = step_of(net, everywhere(net), 50.0)
    step.logits(x)
    assert step.statistics_mismatch(20).item() < 1e-7
    step.logits(x * 1.5 + 0.1)
    assert 0.01 < step.statistics_mismatch(20).item() < 100


@pytest.mark.parametrize("architecture", [*PERCEPTRONS, "convolutional", "residual"])
def test_collapse_is_the_distance_from_the_mean_of_the_class(architecture: str):
    net = network(architecture, (3,), torch.float64)
    x, own, _ = batch(net, 20, torch.float64)
    features: list[torch.Tensor] = []
    last = [module for module in net.modules() if isinstance(module, SmoothGateReLU)][-1]
    hook = last.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0].flatten(1)))
    net.freeze()(x)
    hook.remove()
    f = features[0]
    apart = [(f[i] - f[own == own[i]].mean(0)).norm() for i in range(20)]
    slow = torch.stack(apart).mean() / (f - f.mean(0)).square().sum(1).mean().sqrt()
    step = step_of(net, everywhere(net), 50.0)
    step.logits(x)
    torch.testing.assert_close(step.collapse(own), slow, rtol=1e-4, atol=0)
    twins = x.detach()[own]  # the samples of a class all equal: collapsed
    step.logits(twins)
    assert step.collapse(own).item() == pytest.approx(TINY_SPREAD**0.5)


@pytest.mark.parametrize("architecture", PERCEPTRONS)
def test_bfloat16_factors_change_the_gradient_by_less_than_a_tenth(architecture: str):
    net = Classifier(architecture, (784,), (200, 300), (0, 1, 2))
    net.initialise(torch.Generator().manual_seed(0), 1.0, 1.0)
    x = torch.rand(30, 784, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mu = torch.rand(30, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    own = net(x).argmax(1)  # positive margins: elsewhere the residual may be flat
    found = []
    for factors in (torch.float32, torch.bfloat16):
        with mock.patch("gbc.closed_form.factor_type", return_value=factors):
            step = step_of(net, everywhere(net), 50.0)
        step.logits(x)
        residual = step.stationarity(own, mu)
        found.append((residual.detach(), *torch.autograd.grad(residual, (x, mu))))
    for exact, coarse in zip(*found, strict=True):
        assert 0 < (exact - coarse).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_only_medium_precision_asks_for_bfloat16(bfloat16: bool):
    weight = torch.zeros(2, 2)
    with mock.patch("torch.cpu._is_avx512_bf16_supported", return_value=bfloat16):
        assert factor_type(weight) == torch.float32
        with mock.patch("torch.get_float32_matmul_precision", return_value="medium"):
            assert factor_type(weight) == (torch.bfloat16 if bfloat16 else torch.float32)
            assert factor_type(weight.double()) == torch.float64


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 2)])
def test_normalising_has_the_derivatives_of_what_it_computes(shape: tuple[int, ...]):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    normal, scale, average, variance = normalise(z, 1e-5)
    torch.testing.assert_close(normal, torch.nn.functional.batch_norm(z, None, None, training=True))
    torch.testing.assert_close(torch.stack([average, variance, scale]), torch.stack([*moments(z), (moments(z)[1] + 1e-5).rsqrt()]))
    assert torch.autograd.gradcheck(lambda z: normalise(z, 1e-5), z)
    assert torch.autograd.gradgradcheck(lambda z: normalise(z, 1e-5), z)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the CUDA path was never run on real hardware")
def test_the_step_on_cuda_equals_the_one_on_the_cpu():
    net = network("batchnorm", (6, 5), torch.float64)
    x, own, mu = batch(net, 9, torch.float64)
    expected = reference(net, everywhere(net), 50.0, x, own, mu)
    step = step_of(net.cuda(), everywhere(net), 50.0)
    x, own, mu = x.detach().cuda().requires_grad_(), own.cuda(), mu.detach().cuda().requires_grad_()
    step.logits(x)
    residual = step.stationarity(own, mu)
    for found, slow in zip((residual.detach(), *torch.autograd.grad(residual, (x, mu))), expected, strict=True):
        torch.testing.assert_close(found.cpu(), slow, rtol=1e-9, atol=1e-10)
