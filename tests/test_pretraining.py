"""Descent on log-loss: exact far below float's range, monotone, and it makes weights that the training points explain."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gbc.artifacts import load_network, save_network
from gbc.classifier import Classifier, SmoothGateReLU
from gbc.datasets import sample
from gbc.homogeneity import estimate
from gbc.kkt import inner, margin_gradient
from gbc.params import InputError, PretrainParams, SampleParams
from gbc.pretraining import KINK, ORACLE_INPUTS, descend, log_loss, pretrain


def params(**changes: object) -> PretrainParams:
    values: dict[str, object] = {
        "architecture": "homogeneous",
        "hidden": [32, 16],
        "first_scale": 0.3,
        "rest_scale": 0.5,
        "step_size": 0.01,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "smoothing": 0.0,
        "max_steps": 400,
        "settle_steps": 0,
        "stop_log_loss": -20.0,
        "plateau": 0.0,
        "precision": "float32",
    }
    return PretrainParams(**(values | changes))  # type: ignore[arg-type]


def clouds() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(12) % 3
    x = torch.randn(3, 6, generator=rng)[y] + 0.1 * torch.randn(12, 6, generator=rng)
    return {"train_x": x, "train_y": y, "control_x": x + 0.01, "control_y": y}


def test_log_loss_is_the_logarithm_of_the_summed_cross_entropy():
    rng = torch.Generator().manual_seed(0)
    logits, y = 5 * torch.randn(20, 4, generator=rng, dtype=torch.float64), torch.randint(4, (20,), generator=rng)
    assert log_loss(logits, y).item() == pytest.approx(F.cross_entropy(logits, y, reduction="sum").log().item(), abs=1e-12)


def test_log_loss_is_exact_where_the_loss_itself_underflows():
    logits = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 2000.0, 0.0]])
    y = torch.tensor([0, 1])
    assert log_loss(logits, y).item() == pytest.approx(-1000 + math.log(2))
    assert torch.isfinite(torch.autograd.grad(log_loss(logits.requires_grad_(), y), logits)[0]).all()


IMAGE = {"convolutional": (6, 8), "residual": (6,)}  # channels of the architectures that take images


def on_clouds(architecture: str) -> tuple[Classifier, torch.Tensor, torch.Tensor]:
    """A network for the clouds' points, or for the clouds' points as one row of an image."""
    data = clouds()
    x = data["train_x"][:, :, None].expand(-1, -1, 6).contiguous() if architecture in IMAGE else data["train_x"]
    network = Classifier(architecture, tuple(x.shape[1:]), IMAGE.get(architecture, (32, 16)), (0, 1, 2))
    network.initialise(torch.Generator().manual_seed(0), 0.3, 0.5)
    return network, x, data["train_y"]


@pytest.mark.parametrize("architecture", ["homogeneous", "biased", "batchnorm", "convolutional", "residual"])
def test_descent_does_not_change_lambda(architecture: str):
    network, x, y = on_clouds(architecture)
    found = []
    for _ in range(2):
        found.append(estimate(copy.deepcopy(network).freeze(), network.input_shape, ORACLE_INPUTS, torch.Generator().manual_seed(0)))
        list(descend(network, x, y, params(max_steps=100)))
    assert found[0].z1 == found[1].z1
    assert found[0].lam == pytest.approx(found[1].lam, abs=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("architecture", ["homogeneous", "biased", "batchnorm", "convolutional", "residual"])
def test_descent_falls_until_the_declared_stop(architecture: str, momentum: float):
    network, x, y = on_clouds(architecture)
    steps = list(descend(network, x, y, params(momentum=momentum, max_steps=800)))
    losses = [step.log_loss for step in steps]
    assert losses[-1] <= -20 < losses[-2]
    assert all(b <= a + 1e-3 * abs(a) for a, b in zip(losses, losses[1:], strict=False))
    network.train()
    assert log_loss(network(x), y).item() == pytest.approx(losses[-1])


def test_momentum_descends_further_in_as_many_steps():
    ends = []
    for momentum in (0.0, 0.95):
        network, x, y = on_clouds("homogeneous")
        ends.append(list(descend(network, x, y, params(momentum=momentum, max_steps=300, stop_log_loss=-1e6)))[-1].log_loss)
    assert ends[1] < 3 * ends[0] < 0


def test_while_the_descent_settles_every_step_is_a_little_smaller():
    network, x, y = on_clouds("homogeneous")
    weight = network.layers[1].weight
    assert isinstance(weight, torch.Tensor)
    path, slopes = [], []
    for _ in descend(network, x, y, params(max_steps=20, settle_steps=20, step_size=1e-3, momentum=0.0)):
        path.append(weight.detach().clone())
        slopes.append(torch.autograd.grad(log_loss(network(x), y), weight)[0])
    sizes = [((b - a).norm() / slope.norm()).item() for a, b, slope in zip(path, path[1:], slopes, strict=False)]
    assert sizes == pytest.approx([1e-3 * 0.995 ** (k + 1) for k in range(19)], rel=1e-3)


def test_smoothing_hardens_to_the_kink_and_leaves_a_relu_network():
    network, x, y = on_clouds("homogeneous")
    gate = network.layers[2]
    assert isinstance(gate, SmoothGateReLU)
    sharpness = [gate.sharpness or 0 for _ in descend(network, x, y, params(smoothing=100.0, stop_log_loss=-math.inf))]
    assert sharpness[0] == 100
    assert 0.9 * KINK < sharpness[-1] < KINK
    network, _, _ = pretrain(params(smoothing=100.0), clouds(), 0, torch.device("cpu"))
    assert network.layers[2].sharpness is None


def test_descent_ends_where_the_residual_stops_falling():
    settings = params(architecture="batchnorm", max_steps=10_000, stop_log_loss=-1e6, plateau=0.9)
    facts = pretrain(settings, clouds(), 0, torch.device("cpu"))[2]
    assert facts["steps"] == 256  # the second checkpoint: nothing falls by nine tenths in 128 steps


def test_float64_trains_in_float64_and_saves_float32():
    coarse, fine = (pretrain(params(precision=name), clouds(), 0, torch.device("cpu")) for name in ("float32", "float64"))
    assert fine[2]["log_loss"] != coarse[2]["log_loss"]
    assert {p.dtype for p in fine[0].state_dict().values() if p.is_floating_point()} == {torch.float32}


def test_descent_survives_a_step_size_that_diverges():
    data = clouds()
    network = Classifier("homogeneous", (6,), (32, 16), (0, 1, 2))
    network.initialise(torch.Generator().manual_seed(0), 0.3, 0.5)
    last = list(descend(network, data["train_x"], data["train_y"], params(step_size=1e6)))[-1]
    assert last.log_loss < -1


def test_the_oracle_residual_is_small_for_the_training_points_and_smaller_with_weight_decay():
    data = sample(SampleParams(source="circle", classes=[0, 1, 2], per_class=6, path="all"), 0)
    free = pretrain(params(max_steps=2000, stop_log_loss=-200.0), data, 0, torch.device("cpu"))[2]
    decayed = pretrain(params(max_steps=2000, weight_decay=1e-3, smoothing=30.0), data, 0, torch.device("cpu"))[2]
    assert free["residual"] < 0.4
    assert decayed["residual"] < free["residual"]
    assert sum(free["active"]) < 18  # inner points of an arc carry nothing
    assert free["heldout_residual"] is None


def test_weight_decay_ends_where_the_softmax_probabilities_are_the_multipliers():
    data, decay = clouds(), 1e-3
    network, curve, facts = pretrain(params(max_steps=400, weight_decay=decay, smoothing=30.0), data, 0, torch.device("cpu"))
    x, y = data["train_x"], data["train_y"]
    logits = network.train().set_gate(KINK)(x)
    zeta = list(network.parameters())
    gradient = margin_gradient(logits, y, logits.softmax(1).detach(), zeta)
    error = [len(x) * decay * p.detach() - slope for p, slope in zip(zeta, gradient, strict=True)]
    assert inner(error, error).sqrt() < 0.02 * inner(gradient, gradient).sqrt()
    assert facts["residual"] < 0.02
    assert facts["heldout_residual"] == pytest.approx(facts["everywhere"]["heldout_residual"])  # Z₁ is everything
    assert curve["log_loss"].iloc[-1] < 0  # where the descent before L-BFGS stops
    first, bias, *others = (p.detach().square().sum().item() for p in zeta)  # each layer's ζ·∇ is Σ μ m there, so their norms are equal
    assert others == pytest.approx([first + bias] * len(others), rel=0.03)


def test_pretraining_returns_a_classifier_its_curve_and_its_oracle():
    network, curve, facts = pretrain(params(architecture="batchnorm"), clouds(), 0, torch.device("cpu"))
    assert network.labels == (0, 1, 2)
    assert facts["heldout_accuracy"] == 1
    assert curve["oracle_residual"].iloc[-1] == pytest.approx(facts["residual"])
    assert np.diff(curve["log_loss"]).max() <= 1e-2
    network.train()
    batch = network.layers[1](network.layers[0](clouds()["train_x"]))
    torch.testing.assert_close(network.layers[2].running_mean, batch.mean(0))
    torch.testing.assert_close(network.layers[2].running_var, batch.var(0))


def test_an_infinite_start_is_refused():
    data = clouds()
    data["train_x"][0] = torch.inf
    with pytest.raises(InputError, match="the loss is infinite at the start"):
        pretrain(params(), data, 0, torch.device("cpu"))


def test_the_oracle_over_all_parameters_is_the_root_of_its_groups_squares():
    facts = pretrain(params(architecture="batchnorm"), clouds(), 0, torch.device("cpu"))[2]
    everywhere = facts["everywhere"]
    assert len(everywhere["groups"]) == 7  # three weights, and scale and shift of two normalisations
    assert math.hypot(*everywhere["groups"].values()) == pytest.approx(everywhere["residual"])
    assert everywhere["cosine"] == pytest.approx(math.sqrt(1 - everywhere["residual"] ** 2))
    assert everywhere["residual"] > facts["residual"]  # there is more to explain


def test_weight_decay_without_smoothing_is_refused():
    with pytest.raises(InputError, match="weight_decay needs a smoothing above 0"):
        pretrain(params(weight_decay=1e-3), clouds(), 0, torch.device("cpu"))


def test_classifiers_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="a residual network with 2 poolings cannot take inputs of shape"):
        Classifier("residual", (3, 3), (4, 4), (0, 1))
    with pytest.raises(InputError, match="labels must ascend, in the order of its outputs; they are 1, 0"):
        Classifier("homogeneous", (2,), (4,), (1, 0))
    with pytest.raises(InputError, match="there is no architecture 'vgg'; there are homogeneous, biased"):
        Classifier("vgg", (2,), (4,), (0, 1))
    with pytest.raises(InputError, match="a convolutional network"):
        Classifier("convolutional", (6,), (4,), (0, 1))


def test_a_classifier_survives_its_files_and_a_mismatch_is_refused(tmp_path):
    network = Classifier("batchnorm", (2, 3), (5, 4), (3, 8))
    save_network(tmp_path / "a", network)
    loaded = load_network(tmp_path / "a", Classifier).eval()
    x = torch.rand(4, 2, 3)
    assert torch.equal(loaded(x), network.eval()(x))
    assert loaded.labels == (3, 8)
    save_network(tmp_path / "b", Classifier("homogeneous", (2, 3), (5, 4), (3, 8)))
    (tmp_path / "b" / "weights.safetensors").write_bytes((tmp_path / "a" / "weights.safetensors").read_bytes())
    with pytest.raises(InputError, match="does not fit architecture.json"):
        load_network(tmp_path / "b", Classifier)


def test_a_descent_that_ends_on_a_soft_softplus_is_measured_as_the_relu_network_that_it_saves():
    data = clouds()
    network, curve, facts = pretrain(params(smoothing=3.0, stop_log_loss=-5.0), data, 0, torch.device("cpu"))
    assert facts["steps"] < 400
    expected = log_loss(network.train()(data["train_x"]), data["train_y"]).item()
    assert facts["log_loss"] == curve["log_loss"].iloc[-1] == pytest.approx(expected, rel=1e-5)
    assert abs(curve["log_loss"].iloc[-2] - expected) > 0.1


def test_more_steps_that_settle_than_steps_are_refused():
    with pytest.raises(InputError, match="settle_steps=401 is more than max_steps=400"):
        pretrain(params(settle_steps=401), clouds(), 0, torch.device("cpu"))


@pytest.mark.parametrize("architecture", ["convolutional", "residual", "homogeneous"])
def test_no_hidden_layer_at_all_is_a_linear_classifier(architecture: str):
    network = Classifier(architecture, (2, 4, 4), (), (0, 1, 2))
    assert [tuple(p.shape) for p in network.parameters()] == [(3, 32)]
    assert network(torch.ones(5, 2, 4, 4)).shape == (5, 3)
