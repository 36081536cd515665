"""Generator and multiplier network: shapes, noise, labels, classifier indices."""

from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from torch.nn import functional as F

from gbc.artifacts import load_network, save_json, save_network
from gbc.generator import BEND, Generator, Mixture, Multipliers, Pixels, Waves
from gbc.params import InputError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generator(shape: tuple[int, ...] = (9, 7), known: tuple[tuple[int, ...], ...] = ((0, 1), (1, 5))) -> Generator:
    return Generator(known, shape, noise=3, anchors=4, spread=0.5, width=16, channels=8).initialise(rng())


@pytest.mark.parametrize("shape", [(2,), (28, 28), (25, 25), (3, 32, 32), (9, 7), (1, 6, 11)])
def test_samples_have_the_classifiers_input_shape(shape: tuple[int, ...]):
    x, y = generator(shape).sample(7, rng())
    assert x.shape == (7, *shape)
    if len(shape) > 1:
        assert x.min() >= 0
        assert x.max() <= 1
        layers = [type(layer).__name__ for layer in generator(shape).layers]
        assert layers.count("Linear") == 3
        assert layers.count("ConvTranspose2d") == 3
    assert torch.bincount(y, minlength=6)[[0, 1, 5]].tolist() == [3, 2, 2]


def test_fresh_noise_is_a_mixture_around_the_anchors():
    g = generator()
    anchor = torch.tensor([2]).repeat(20_000)
    noise = g.perturb(anchor, torch.full_like(anchor, 5), rng())
    torch.testing.assert_close(noise.mean(0), g.centres[2, 2], atol=0.02, rtol=0)  # the third of the third label
    torch.testing.assert_close(noise.std(0), torch.full((3,), 0.5), atol=0.02, rtol=0)


def test_the_classifier_index_is_drawn_from_those_that_know_the_label():
    g = generator((2,))
    seen = []
    g.layers.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    _, y = g.sample(3000, rng())
    index = seen[0][:, -2:].argmax(1)
    assert (index[y == 0] == 0).all()
    assert (index[y == 5] == 1).all()
    assert 0.4 < index[y == 1].double().mean() < 0.6
    _, y = g.sample(10, rng(), t=1)
    assert set(y.tolist()) == {1, 5}
    assert (seen[1][:, -1] == 1).all()


def test_sampling_is_a_function_of_the_seed():
    g = generator()
    assert torch.equal(g.sample(5, rng(1))[0], g.sample(5, rng(1))[0])
    assert not torch.equal(g.sample(5, rng(1))[0], g.sample(5, rng(2))[0])


def test_kaiming_keeps_the_scale_of_activations():
    wide = Generator(((0,),), (28, 28), noise=64, anchors=4, spread=0.1, width=256, channels=64).initialise(rng())
    for module in wide.modules():
        if isinstance(module, torch.nn.ConvTranspose2d) and module.stride == (2, 2):
            x = torch.randn(50, module.in_channels, 9, 9, generator=rng())
            second_moment = (module(x.relu())[..., 4:-4, 4:-4]).square().mean()
            assert second_moment.item() == pytest.approx(1, rel=0.3)


def test_multipliers_are_non_negative_start_alive_and_cover_the_classifiers_classes():
    h = Multipliers(((0, 1, 2), (2, 7)), (4, 4), 16, "relu").initialise(rng())
    x, y = torch.rand(9, 4, 4), torch.tensor([2] * 9)
    assert h(x, y, 0).shape == (9, 3)
    assert h(x, y, 1).shape == (9, 2)
    assert (h(x, y, 0) > 0.3).all()
    torch.nn.init.constant_(h.layers[-1].bias, -5.0)  # type: ignore[arg-type]
    assert (h(x, y, 0) == 0).all()
    h.positive = torch.nn.functional.softplus
    assert (h(x, y, 0) > 0).all()
    assert (Multipliers(((0, 1, 2), (2, 7)), (4, 4), 16, "equal").initialise(rng())(x, y, 0) == 1).all()


def test_a_generator_survives_its_files_and_a_mismatch_is_one_line(tmp_path: Path):
    g = generator()
    save_network(tmp_path, g)
    assert torch.equal(load_network(tmp_path, Generator).sample(5, rng())[0], g.sample(5, rng())[0])
    other = {"known": [[0]], "output_shape": [9, 7], "noise": 3, "anchors": 4, "spread": 1, "width": 8, "channels": 8}
    for change in ({}, {"anchors": 0}, {"output_shape": []}, {"noise": "many"}):
        save_json(tmp_path / "architecture.json", other | change)
        with pytest.raises(InputError, match="does not fit architecture.json") as error:
            load_network(tmp_path, Generator)
        assert "\n" not in str(error.value)


def test_the_bank_is_every_anchor_of_every_label_without_noise():
    g = Generator(((0, 1), (1, 5)), (9, 9), 3, 4, 0.1, 8, 8).initialise(rng())
    samples, y = g.bank()
    assert y.tolist() == [0] * 4 + [1] * 4 + [5] * 4
    third = g(g.centres[:, 2], torch.tensor([0, 1, 5]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(samples[[2, 6, 10]], third)
    g.spread = 0.0
    assert torch.cdist(g.sample(30, rng(), 0)[0].flatten(1), samples[:8].flatten(1)).amin(1).max() < 0.05  # different ones are 0.4 apart


def test_anchors_are_drawn_in_proportion_to_their_samples_multipliers():
    known = ((0, 1, 5), (1, 5))
    g, h = generator(known=known), Multipliers(known, (9, 7), 16, "softplus").initialise(rng(3))
    h.layers[-1].weight.data.mul_(200)  # type: ignore[operator, union-attr]
    g.weigh(h)
    g.spread = 0.0
    seen: list[torch.Tensor] = []
    g.layers.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for t, label in [(0, 1), (1, 1), (1, 5)]:
        centres, y = g.centres[g.labels.tolist().index(label)], torch.full((4,), label)
        wrong = [place for place, other in enumerate(known[t]) if other != label]
        multipliers = h(g.eval()(centres, y, torch.full((4,), t)), y, t)[:, wrong].sum(1).detach()
        assert multipliers.max() > 1.2 * multipliers.min()
        g.sample(20_000, rng(), t=t, label=label)
        drawn = (seen[-1][:, None, :3] == centres).all(2).double().mean(0)
        torch.testing.assert_close(drawn, (multipliers / multipliers.sum()).double(), atol=0.01, rtol=0)


def test_what_is_hardly_ever_drawn_is_not_heard():
    first, second = generator(), generator()
    assert first.heard().all()
    first.shares[0, 1] = torch.tensor([0.93, 0.03, 0.02, 0.02])  # of label 1, which classifier 1 knows too
    first.shares[1, 1:] = torch.tensor([0.0, 0.0, 0.5, 0.5])
    heard = [True] * 4 + [True, True, False, False] + [False, False, True, True]
    assert first.heard().tolist() == heard
    assert Mixture.of([first, second]).heard().reshape(12, 2).T.tolist() == [heard, [True] * 12]


@pytest.mark.parametrize("bias", [-5.0, float("nan"), float("inf")])
def test_anchors_whose_multipliers_have_died_or_diverged_are_drawn_evenly(bias: float):
    g, h = generator(), Multipliers(((0, 1), (1, 5)), (9, 7), 16, "relu").initialise(rng())
    torch.nn.init.constant_(h.layers[-1].bias, bias)  # type: ignore[arg-type]
    g.weigh(h)
    torch.testing.assert_close(g.shares, torch.full((2, 3, 4), 0.25))


def test_a_mixture_draws_from_its_members_in_turn_and_survives_its_files(tmp_path: Path):
    members = [generator().initialise(rng(seed)) for seed in (1, 2, 3)]
    for k, member in enumerate(members):
        member.shares[:] = torch.eye(4)[k]  # an anchor alone, and each member's another
    save_network(tmp_path, Mixture.of(members))
    mixture = load_network(tmp_path, Mixture)
    for part in mixture.parts:
        part.spread = 0.0
    seen: list[torch.Tensor] = []
    for part in mixture.parts:
        part.layers.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x, y = mixture.sample(60, rng(9))
    assert y.tolist() == [0] * 20 + [1] * 20 + [5] * 20
    for k, (member, codes) in enumerate(zip(members, seen, strict=True)):
        assert torch.equal(codes[:, :3], member.centres[torch.searchsorted(member.labels, y[k::3].contiguous()), k])
        own = codes[:, :3], y[k::3].contiguous(), codes[:, 6:].argmax(1)
        torch.testing.assert_close(x[k::3], member.eval()(*own).detach())
    assert mixture.sample(1, rng())[0].shape == (1, 9, 7)  # fewer than members, by two
    alone, _ = Mixture.of(members[:1]).sample(7, rng(4))
    assert torch.equal(alone, members[0].sample(7, rng(4))[0])
    images, labels = mixture.bank()
    for k, member in enumerate(members):
        torch.testing.assert_close(images[k::3], member.bank()[0])
        assert labels[k::3].tolist() == member.bank()[1].tolist()


def test_a_label_of_a_mixture_can_be_drawn_alone():
    x, y = Mixture.of([generator((2,)), generator((2,)).initialise(rng(1))]).sample(9, rng(), label=5)
    assert x.shape == (9, 2)
    assert y.tolist() == [5] * 9
    with pytest.raises(InputError, match="label 5 is unknown to this generator; it knows 0, 1"):
        generator((2,)).sample(9, rng(), t=0, label=5)
    with pytest.raises(InputError, match="classifier 2 is unknown to this generator; it was born from 2, counted from 0"):
        generator((2,)).sample(9, rng(), t=2)


def test_pixels_are_free_images_of_every_anchor():
    pixels = Pixels(((0, 1),), (5, 5), 4, 3, 0.1, 8, 8).initialise(rng())
    images, y = pixels.bank()
    assert images.shape == (6, 5, 5)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    drawn, labels = pixels.sample(8, rng(1))
    for image, label in zip(drawn, labels.tolist(), strict=True):
        assert any(torch.equal(image, images[3 * label + anchor]) for anchor in range(3))


def test_waves_of_a_generator_are_its_samples_at_the_anchors_for_every_classifier():
    g = Generator(((0, 1), (1, 2)), (9, 7), 5, 3, 0.1, 8, 8).initialise(rng())
    waves = Waves.of(g)
    for t, labels in enumerate(g.known):
        y, anchor = torch.cartesian_prod(torch.tensor(labels), torch.arange(3)).T.contiguous()
        index = torch.full_like(y, t)
        expected = g.eval()(g.centres[torch.searchsorted(g.labels, y), anchor], y, index)
        torch.testing.assert_close(waves(waves.perturb(anchor, y, rng()), y, index), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(waves.bank()[0], g.bank()[0], atol=1e-5, rtol=0)


def test_parameters_of_waves_are_the_cosine_transform_divided_by_what_they_count():
    g = Generator(((0, 1),), (3, 9, 7), 5, 3, 0.1, 8, 8).initialise(rng())
    waves = Waves.of(g)
    down, across = np.mgrid[:9, :7]
    weights = 1 / (1 + (down**2 + across**2) / BEND**2)
    weights /= np.sqrt((weights**2).mean())
    transform = scipy.fft.dctn(g.anchored().flatten(0, 2).clamp(0.005, 0.995).logit().double().numpy(), axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(waves.raw.detach().numpy(), transform / weights, atol=1e-4)


def test_a_step_of_all_parameters_alike_is_coarse_in_waves_and_as_large_as_that_of_pixels():
    waves = Waves.of(Generator(((0, 1),), (28, 28), 5, 3, 0.1, 8, 8).initialise(rng()))
    before = waves.logits()
    with torch.no_grad():
        waves.raw.add_(torch.randn(waves.raw.shape, generator=rng()).sign())
    step = waves.logits() - before
    assert step.square().mean().item() == pytest.approx(1, abs=0.1)
    coarse = F.avg_pool2d(step, 4)  # of white noise a sixteenth of the power would be left
    assert coarse.square().mean() > 0.5 * step.square().mean()
