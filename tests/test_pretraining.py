"""Descent on log-loss: exact far below float's range, monotone, and it makes weights that the training points explain."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gbc.artifacts import InputError, load_network, save_network
from gbc.classifier import Classifier
from gbc.datasets import sample
from gbc.kkt import inner, margin_gradient
from gbc.params import PretrainParams, SampleParams
from gbc.pretraining import descend, log_loss, pretrain


def params(**changes: object) -> PretrainParams:
    values: dict[str, object] = {
        "architecture": "homogeneous",
        "hidden": [32, 16],
        "first_scale": 0.3,
        "rest_scale": 0.5,
        "step_size": 0.01,
        "weight_decay": 0.0,
        "max_steps": 400,
        "stop_log_loss": -20.0,
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


@pytest.mark.parametrize("architecture", ["homogeneous", "biased", "batchnorm"])
def test_descent_falls_until_the_declared_stop(architecture: str):
    data = clouds()
    network = Classifier(architecture, (6,), (32, 16), (0, 1, 2))
    network.initialise(torch.Generator().manual_seed(0), 0.3, 0.5)
    steps = list(descend(network, data["train_x"], data["train_y"], params()))
    losses = [step.log_loss for step in steps]
    assert losses[-1] <= -20 < losses[-2]
    assert all(b <= a + 1e-3 * abs(a) for a, b in zip(losses, losses[1:], strict=False))
    network.train()
    assert log_loss(network(data["train_x"]), data["train_y"]).item() == pytest.approx(losses[-1])


def test_descent_survives_a_step_size_that_diverges():
    data = clouds()
    network = Classifier("homogeneous", (6,), (32, 16), (0, 1, 2))
    network.initialise(torch.Generator().manual_seed(0), 0.3, 0.5)
    last = list(descend(network, data["train_x"], data["train_y"], params(step_size=1e6)))[-1]
    assert last.log_loss < -1


def test_the_oracle_residual_is_small_for_the_training_points_and_smaller_with_weight_decay():
    data = sample(SampleParams(source="circle", classes=[0, 1, 2], per_class=6, path="all"), 0)
    free = pretrain(params(max_steps=2000, stop_log_loss=-200.0), data, 0, torch.device("cpu"))[2]
    decayed = pretrain(params(max_steps=2000, stop_log_loss=-200.0, weight_decay=1e-3), data, 0, torch.device("cpu"))[2]
    assert free["residual"] < 0.4
    assert decayed["residual"] < free["residual"]
    assert sum(free["active"]) < 18  # inner points of an arc carry nothing
    assert free["heldout_residual"] is None


def test_weight_decay_ends_where_the_softmax_probabilities_are_the_multipliers():
    data, decay = clouds(), 1e-3
    network, curve, facts = pretrain(params(max_steps=200, weight_decay=decay), data, 0, torch.device("cpu"))
    x, y = data["train_x"], data["train_y"]
    logits = network.train()(x)
    zeta = list(network.parameters())
    gradient = margin_gradient(logits, y, logits.softmax(1).detach(), zeta)
    error = [len(x) * decay * p.detach() - slope for p, slope in zip(zeta, gradient, strict=True)]
    assert inner(error, error).sqrt() < 0.06 * inner(gradient, gradient).sqrt()  # what ReLU's kinks leave
    assert facts["residual"] < 0.05
    assert curve["log_loss"].iloc[-1] < curve["log_loss"].iloc[0]


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
