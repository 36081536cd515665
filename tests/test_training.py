"""The generator's loss, term by term, and a training that makes it fall, on small real classifiers."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gbc.classifier import Classifier
from gbc.closed_form import step_of
from gbc.datasets import sample
from gbc.generator import Generator, Multipliers, Waves
from gbc.homogeneity import Homogeneity, estimate
from gbc.kkt import margin_gradient, smallest_margin, stationarity, target
from gbc.params import InputError, LambdaParams, PretrainParams, SampleParams, TrainParams, load_params
from gbc.pretraining import pretrain
from gbc.progress import Live
from gbc.training import FINAL_RATE, Descent, cosine, draw_codes, initial_alpha, loss_terms, total_variation, train
from tests import ranks

SHARED = dataclasses.replace(ranks.SHARED, width=64, learning_rate=6e-3, alpha_learning_rate=1e-2)


def task(*names: str, **changes: float) -> TrainParams:
    values: dict[str, Any] = {
        "length": 1.0,
        "matrix_learning_rate": 0.0,
        "stationarity": 1.0,
        "total_variation": 0.0,
        "statistics": 10.0,
        "collapse": 0.0,
    }
    values |= {"duality": 1.0, "gate": 50.0, "margin_reward": 0.3, "multiplier_floor": 0.3}
    values |= changes
    return TrainParams(classifiers=list(names), anchors=8, batch=24, multiplier="relu", matmul_precision="highest", **values)


@functools.cache
def pretrained(path: str, architecture: str) -> tuple[Classifier, Homogeneity, dict[str, torch.Tensor]]:
    data = sample(SampleParams(source="circle", classes=[0, 1, 2], per_class=6 if path == "all" else 3, path=path), 0)
    settings = PretrainParams(architecture, [32, 32], 0.5, 0.2, 0.001, 0.0, 0.0, 0.0, 600, 0, -50.0, 0.0, "float32")
    network, _, _ = pretrain(settings, data, 0, torch.device("cpu"))
    return network, estimate(network, (2,), LambdaParams(8, 16), torch.Generator().manual_seed(0)), data


def toy(path: str, architecture: str = "batchnorm") -> tuple[Classifier, Homogeneity, dict[str, torch.Tensor]]:
    """A trained classifier of its own for every test, for training sets its gate."""
    return copy.deepcopy(pretrained(path, architecture))


@contextlib.contextmanager
def calls(kind: type[torch.nn.Module]) -> Iterator[list[tuple[Any, tuple[torch.Tensor, ...]]]]:
    """Every module of `kind` that is called meanwhile, with its arguments."""
    seen = []

    def look(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, kind):
            seen.append((module, arguments))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def run(
    classifiers: list[Classifier],
    homogeneities: list[Homogeneity],
    settings: TrainParams,
    steps: int = 300,
    beta: float = 50.0,
    live: Live | None = None,
):
    params = dataclasses.replace(load_params([]), beta=beta, seed=0, steps=steps, generator=SHARED)
    return train(params, settings, classifiers, homogeneities, torch.device("cpu"), live=live)


def test_total_variation_is_the_mean_step_between_neighbours():
    image = torch.tensor([[[0.0, 1.0], [0.0, 0.5]]])
    assert total_variation(image).item() == pytest.approx((0 + 0.5) / 2 + (1 + 0.5) / 2)
    assert total_variation(torch.rand(3, 2)).item() == 0


def test_codes_are_spread_evenly_over_labels_and_anchors():
    anchor, y = draw_codes(4, 24, (3, 5, 9), torch.Generator().manual_seed(0))
    assert torch.bincount(y).tolist() == [0, 0, 0, 8, 0, 8, 0, 0, 0, 8]
    for label in (3, 5, 9):
        assert torch.bincount(anchor[y == label]).tolist() == [2, 2, 2, 2]


def test_the_classifiers_own_training_batch_has_no_statistics_mismatch():
    network, homogeneity, data = toy("all")
    step = step_of(network, homogeneity, 50.0)
    step.logits(data["train_x"])
    assert step.statistics_mismatch(18).item() < 1e-6
    step.logits(data["train_x"] + 1)
    assert step.statistics_mismatch(18).item() > 0.1
    step.logits(data["train_x"].repeat(4, 1))  # the same distribution, but another batch
    assert step.statistics_mismatch(18).item() < 1e-6
    assert step.statistics_mismatch(72).item() > 5e-4


def test_training_images_are_as_many_as_anchors_where_they_are_left_out():
    network, homogeneity, _ = toy("all")
    histories = [run([network], [homogeneity], task("toy", images=images), steps=2)[1] for images in (0, 8, 3)]
    left_out, same, fewer = (history["statistics"].tolist() for history in histories)
    assert left_out == same
    assert abs(left_out[0] - fewer[0]) > 1e-4


def test_loss_terms_measure_margins_in_units_of_the_margin_asked_for():
    network, homogeneity, data = toy("all", "homogeneous")
    step = step_of(network, homogeneity, 50.0)
    x, y = data["train_x"], data["train_y"]
    margin = smallest_margin(network(x), y).detach()
    alpha = torch.tensor(-2.0, requires_grad=True)
    terms = loss_terms(step, x.clone().requires_grad_(), y, torch.ones(18, 3), alpha, 18, delta=0.1, floor=0.0, collapse=False)
    relative = margin / np.exp(2)
    expected = (relative - 1.1).clamp_min(0) + (1 - relative).clamp_min(0)
    assert terms["duality"].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    (slope,) = torch.autograd.grad(terms["duality"], alpha)
    assert slope.item() == pytest.approx(((relative > 1.1).double() - (relative < 1).double()).mean().item(), abs=1e-6)


def test_the_floor_lifts_the_runner_ups_multiplier_only():
    network, homogeneity, data = toy("all", "homogeneous")
    x, y = data["train_x"], data["train_y"]
    logits = network(x)
    runner_up = torch.zeros_like(logits).scatter(1, logits.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True), 1.0)
    goal = list(target(network, homogeneity).values())
    explicit = stationarity(goal, margin_gradient(network.set_gate(50.0)(x), y, 0.5 * runner_up, list(network.parameters())))
    step = step_of(network, homogeneity, 50.0)
    floored = loss_terms(step, x, y, torch.zeros(18, 3), torch.tensor(0.0), 18, 0.1, floor=0.5, collapse=False)["stationarity"]
    assert floored.item() == pytest.approx(explicit.item(), abs=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_terms_and_rewards_a_larger_margin():
    rng = torch.Generator().manual_seed(0)
    network = Classifier("batchnorm", (12, 12), (16, 16), (0, 1))
    homogeneity = estimate(network, (12, 12), LambdaParams(8, 16), rng)
    weights = {"stationarity": 2.0, "duality": 0.5, "total_variation": 7.0, "statistics": 11.0, "collapse": 13.0}
    settings = task("net", margin_reward=0.25, **weights)
    params = dataclasses.replace(load_params([]), beta=3.0, generator=SHARED)
    g = Generator(((0, 1),), (12, 12), SHARED.noise, 8, SHARED.spread, 16, 8).initialise(rng)
    h = Multipliers(((0, 1),), (12, 12), 16, "relu").initialise(rng)
    step, alpha = step_of(network, homogeneity, 50.0), torch.tensor([0.7], requires_grad=True)
    descent = Descent(params, settings, [step], h, alpha, rng)
    loss, (row,) = descent.loss(g, fade=0.5, logged=True), descent.rows
    factors = {"duality": 3.0, "total_variation": 0.5}  # β, and how far it has faded
    expected = sum(weight * factors.get(name, 1.0) * row[name] for name, weight in weights.items())
    assert loss.item() == pytest.approx(expected + 3 * 0.25 * 0.7, rel=1e-5)
    assert all(row[name] > 0.01 for name in weights)
    free = Descent(params, dataclasses.replace(settings, duality=0.0), [step], h, alpha, rng)
    (slope,) = torch.autograd.grad(free.loss(g, fade=0.5, logged=False), alpha)
    assert slope.item() == pytest.approx(3 * 0.25)


def test_alpha_starts_at_the_size_of_the_margins_and_rates_fall_along_a_cosine():
    network, homogeneity, _ = toy("all")
    g = Generator((network.labels,), (2,), SHARED.noise, 8, 0.0, 16, 8).initialise(torch.Generator().manual_seed(0))
    alpha = initial_alpha(g, step_of(network, homogeneity, 50.0), task("toy"), 0, torch.Generator().manual_seed(0))
    y = torch.arange(3).repeat_interleave(8)
    x = g(g.centres.flatten(0, 1), y, torch.zeros_like(y))
    assert torch.exp(-alpha).item() == pytest.approx(smallest_margin(network(x), y).abs().mean().item(), rel=1e-5)
    assert [cosine(done, 10) for done in (0, 5, 10)] == pytest.approx([1, (1 + FINAL_RATE) / 2, FINAL_RATE])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the CUDA path was never run on real hardware")
def test_a_generator_is_born_on_cuda():
    network = Classifier("batchnorm", (12, 12), (16, 16), (0, 1))
    homogeneity = estimate(network, (12, 12), LambdaParams(8, 16), torch.Generator().manual_seed(0))
    settings = task("net", matrix_learning_rate=0.02, polish=1.0, total_variation=1.0, collapse=1.0)
    params = dataclasses.replace(load_params([]), steps=3, generator=SHARED)
    generator, history, _, _ = train(params, settings, [network], [homogeneity], torch.device("cuda"))
    assert np.isfinite(history["stationarity"]).all()
    on_cuda = generator.sample(20, torch.Generator().manual_seed(0))[0].cpu()
    on_cpu = generator.cpu().sample(20, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-3, atol=1e-3)


def test_a_generator_is_born_nearer_to_the_training_points_than_it_started():
    network, homogeneity, data = toy("all")
    generator, history, film, seconds = run([network], [homogeneity], task("toy"), steps=1000)
    _, y = generator.sample(600, torch.Generator().manual_seed(1))
    first, last = history.to_dict("records")[:: len(history) - 1]
    assert last["statistics"] < 0.5 * first["statistics"]
    assert last["stationarity"] < first["stationarity"]
    untrained = Generator(generator.known, (2,), 8, 8, 0.1, 64, 8).initialise(torch.Generator().manual_seed(0))
    distances = [
        torch.cdist(g.sample(600, torch.Generator().manual_seed(1))[0], data["train_x"]).amin(1).mean() for g in (generator, untrained)
    ]
    assert distances[0] < 0.85 * distances[1]
    assert sorted(set(y.tolist())) == [0, 1, 2]
    assert seconds > 0
    assert [*film][:3] == [0, 15, 62]
    assert [*film][-1] == 1000
    assert (generator.shares.amax(2) > 1.05 * generator.shares.amin(2)).all()
    generator.shares.fill_(1 / 8)  # of the film's codes
    fresh = generator.sample(20, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(film[1000], fresh)
    assert not torch.equal(film[1000], film[0])
    assert len(history) <= 302


def test_training_is_reproducible_to_the_byte_and_leaves_the_classifier_alone():
    network, homogeneity, _ = toy("all")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    settings = task("toy", matrix_learning_rate=0.02)
    states = [run([network], [homogeneity], settings, steps=20)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_several_classifiers_have_an_alpha_each_and_share_one_generator():
    halves = [toy("even"), toy("odd"), toy("all")]
    generator, history, _, _ = run([h[0] for h in halves], [h[1] for h in halves], task("toy_1", "toy_2", "toy"), steps=30)
    assert sorted(history["classifier"].unique()) == [0, 1, 2]
    assert len(set(history["alpha"].tail(3))) == 3
    assert generator.known == ((0, 1, 2),) * 3


def test_every_batch_of_the_generator_holds_all_classifiers():
    # A batch with one index would lose it: g's batch normalisation subtracts what is constant over the batch.
    halves = [toy("even"), toy("odd")]
    with calls(Generator) as seen:
        run([h[0] for h in halves], [h[1] for h in halves], task("toy_1", "toy_2"), steps=3)
    assert [index.unique().tolist() for _, (_, _, index) in seen if len(index) == 48] == [[0, 1]] * 4  # and once all anchors, at the end


def test_classifiers_of_different_shapes_are_refused():
    network, homogeneity, _ = toy("all")
    other = Classifier("batchnorm", (3,), (4, 4), (0, 1))
    with pytest.raises(InputError, match="take inputs of different shapes"):
        run([network, other], [homogeneity, homogeneity], task("toy", "other"), steps=1)


def test_a_batch_with_fewer_samples_than_labels_is_refused():
    network, homogeneity, _ = toy("all", "homogeneous")
    with pytest.raises(InputError, match="batch=2 has no sample for each of 3 labels"):
        run([network], [homogeneity], dataclasses.replace(task("toy"), batch=2))


def test_polished_images_meet_the_equations_better_and_the_generator_makes_them():
    settings = PretrainParams("batchnorm", [64, 64], 0.2, 0.1, 0.01, 0.95, 0.0, 0.0, 300, 0, -1000.0, 0.0, "float32")
    network, _, _ = pretrain(settings, sample(SampleParams("faces", [0, 1], 6), 0), 0, torch.device("cpu"))
    homogeneity = estimate(network, network.input_shape, LambdaParams(8, 16), torch.Generator().manual_seed(0))
    changes = {"polish": 1.0, "total_variation": 1.0, "matrix_learning_rate": 0.02}
    with calls(Waves) as free:
        generator, history, film, _ = run([network], [homogeneity], task("faces", **changes), steps=100)
    assert history["step"].tolist() == [*range(201)]  # every one, the images' from 100 on, and the fitted generator's at the end
    before, images = history["stationarity"][[99, 199]]
    assert images < 0.5 * before
    polished = free[-1][0].bank()[0]
    assert (generator.bank()[0] - polished).square().mean() < 0.3 * (polished - polished.mean(0)).square().mean()
    assert [*film][-1] == 200
    generator.shares.fill_(1 / 8)  # of the film's codes
    torch.testing.assert_close(film[200], generator.sample(20, torch.Generator().manual_seed(0))[0])


def test_points_are_not_polished():
    network, homogeneity, _ = toy("all")
    with pytest.raises(InputError, match=r"polish=1.0 is for images, and classifiers toy take points"):
        run([network], [homogeneity], task("toy", polish=1.0), steps=1)
