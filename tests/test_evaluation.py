"""Metrics on sets whose scores are known."""

import pytest
import torch

from gbc.classifier import Classifier
from gbc.evaluation import (
    Images,
    Similarities,
    accuracy,
    auc,
    class_means,
    compare,
    diversity,
    duplicates,
    evaluate,
    leak,
    score_agreement,
    score_images,
    score_index,
    score_points,
    student_accuracy,
)
from gbc.generator import Generator, Mixture
from gbc.params import InputError


def images(count: int, seed: int) -> Images:
    """Two classes of 13×13 noise around a bright left or right half."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    base = torch.zeros(2, 13, 13)
    base[0, :, :6], base[1, :, 7:] = 1, 1
    return Images((0.5 * base[y] + 0.5 * torch.rand(count, 13, 13, generator=rng)).clamp(0, 1), y)


TRAIN, CONTROL, REFERENCE = images(20, 0), images(20, 1), images(30, 2)


def test_auc_counts_pairs():
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_a_generator_that_returns_the_training_images_gives_everything_away():
    ours = compare(TRAIN, TRAIN, CONTROL)
    scores = score_images(TRAIN, ours, REFERENCE, compare(REFERENCE, TRAIN, CONTROL), TRAIN)
    assert scores["ssim_precision"] == pytest.approx(1, abs=1e-5)
    assert scores["ssim_matched"] == pytest.approx(1, abs=1e-5)
    assert scores["recall_50"] == 1
    assert scores["train_control_auc"] == 1
    assert scores["diversity_ratio"] == pytest.approx(1)
    assert scores["precision_ratio"] > 1
    assert scores["leak_60"] == pytest.approx(1 - (ours.control.amax(0) > 0.6).double().mean().item())


def test_the_reference_images_score_as_a_perfect_generator():
    real = compare(REFERENCE, TRAIN, CONTROL)
    scores = score_images(REFERENCE, real, REFERENCE, real, TRAIN)
    assert scores["precision_ratio"] == pytest.approx(1)
    assert scores["recall_ratio"] == pytest.approx(1)
    assert 0.2 < scores["train_control_auc"] < 0.8


def test_class_means_are_precise_without_diversity():
    means = class_means(TRAIN)
    torch.testing.assert_close(means.x[0], TRAIN.x[TRAIN.y == 0].mean(0))
    assert diversity(means) == pytest.approx(0, abs=1e-5)
    assert diversity(TRAIN) > 0.1


def test_leak_is_the_difference_of_shares():
    assert leak(torch.tensor([0.7, 0.2]), torch.tensor([0.65, 0.61]), 0.6) == -0.5


def test_points_are_hit_within_015():
    train = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    generated = torch.tensor([[0.1, 0.0], [0.0, 0.14], [0.0, 0.2], [5.0, 5.0]])
    assert score_points(generated, train, torch.tensor([True, True])) == {"within_015": 0.5, "points_hit": 1, "points_active": 2}
    hit = torch.cdist(generated, train).amin(0) < 0.15
    assert score_points(generated, train, ~hit) == {"within_015": 0.5, "points_hit": 0, "points_active": 1}


def test_samples_of_an_index_are_near_their_own_classifiers_points_or_the_others():
    first, second = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    stray = torch.tensor([[0.0, 0.1], [1.0, 0.1], [3.0, 0.0], [0.1, 0.0]])
    assert score_index([stray, second], [first, second]) == {"own_015": 0.5, "others_015": 0.25}
    assert score_index([first, stray], [first, second]) == {"own_015": 0.25, "others_015": 0.5}


def test_accuracy_asks_the_classifiers_that_know_the_label():
    first, second = Classifier("homogeneous", (1,), (2, 2), (0, 1)), Classifier("homogeneous", (1,), (2, 2), (5, 6))
    for network, favourite in ((first, 0), (second, 1)):
        with torch.no_grad():
            network.layers[-1].weight.zero_()[favourite] = 1.0  # type: ignore[union-attr, operator]
            network.layers[1].weight.fill_(1.0)  # type: ignore[union-attr]
            network.layers[3].weight.fill_(1.0)  # type: ignore[union-attr]
    x, y = torch.ones(4, 1), torch.tensor([0, 1, 5, 6])
    assert accuracy([first, second], x, y) == 0.5
    assert accuracy([first], x[:2], y[:2]) == 0.5


def test_a_student_learns_from_real_images_and_not_from_swapped_labels():
    assert student_accuracy(TRAIN, REFERENCE, 0) == 1
    assert student_accuracy(Images(TRAIN.x, 1 - TRAIN.y), REFERENCE, 0) == 0


def evaluation(generator: Generator | Mixture, count: int = 40):
    classifier = Classifier("batchnorm", (13, 13), (8, 8), (0, 1))
    data = {f"{role}_{part}": getattr(value, part) for role, value in {"train": TRAIN, "control": CONTROL}.items() for part in "xy"}
    data |= {"reference_x": torch.empty(0), "reference_y": torch.empty(0, dtype=torch.long)}
    mixture = generator if isinstance(generator, Mixture) else Mixture.of([generator])
    return evaluate(mixture, [classifier], [data], [[True] * 20], count, 0)


def test_duplicates_are_those_of_an_earlier_image_of_the_same_class():
    x = torch.cat([TRAIN.x[[0, 1, 2]], TRAIN.x[[0, 2, 1]]])
    assert duplicates(Images(x, torch.tensor([0, 1, 0, 0, 0, 0]))) == pytest.approx(2 / 6)  # the last is of another class than its twin


def test_the_untrained_baseline_keeps_nothing_of_the_training():
    fresh, trained = (Generator(((0, 1),), (13, 13), 3, 4, 0.1, 16, 8).initialise(torch.Generator().manual_seed(0)) for _ in range(2))
    for value in trained.state_dict().values():
        value += torch.ones_like(value)
    metrics = [evaluation(generator)[0] for generator in (fresh, trained)]
    assert metrics[0]["ssim_precision"] != metrics[1]["ssim_precision"]
    assert metrics[0]["baselines"]["untrained"] == metrics[1]["baselines"]["untrained"]


def test_a_diverged_generator_and_too_few_samples_are_refused():
    generator = Generator(((0, 1),), (13, 13), 3, 4, 0.1, 16, 8).initialise(torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="evaluate.samples=3 is too few: 4 would be 2 of each class"):
        evaluation(generator, 3)
    generator.centres.fill_(torch.nan)
    with pytest.raises(InputError, match="its training diverged"):
        evaluation(generator)


def test_fewer_points_than_classifiers_are_refused():
    generator = Mixture.of([Generator(((0, 1), (0, 1)), (2,), 3, 4, 0.1, 16, 8).initialise(torch.Generator().manual_seed(0))])
    classifiers = [Classifier("batchnorm", (2,), (8, 8), (0, 1)) for _ in range(2)]
    points = {"train_x": torch.eye(2), "train_y": torch.tensor([0, 1])}
    evaluate(generator, classifiers, [points, points], [[True] * 2] * 2, 2, 0)
    with pytest.raises(InputError, match="evaluate.samples=1 is too few: 2 would be one of each classifier"):
        evaluate(generator, classifiers, [points, points], [[True] * 2] * 2, 1, 0)


def test_images_that_are_held_out_for_one_classifier_and_trained_on_by_another_are_refused():
    generator = Generator(((0, 1), (0, 1)), (13, 13), 3, 4, 0.1, 16, 8).initialise(torch.Generator().manual_seed(0))
    parts = {"train": TRAIN, "control": CONTROL, "reference": REFERENCE}
    one = {f"{role}_{part}": getattr(value, part) for role, value in parts.items() for part in "xy"}
    other = one | {"train_x": torch.cat([TRAIN.x[1:], REFERENCE.x[:1]])}
    classifiers = [Classifier("batchnorm", (13, 13), (8, 8), (0, 1)) for _ in range(2)]
    evaluate(Mixture.of([generator]), classifiers, [one, one], [[True] * 20] * 2, 40, 0)
    with pytest.raises(InputError, match="training images of one classifier are held out for another"):
        evaluate(Mixture.of([generator]), classifiers, [one, other], [[True] * 20] * 2, 40, 0)


def test_evaluation_has_every_key_of_the_contract():
    generator = Generator(((0, 1),), (13, 13), 3, 4, 0.1, 16, 8).initialise(torch.Generator().manual_seed(0))
    metrics, table, pictures = evaluation(generator)
    scores = "ssim_precision ssim_recall ssim_matched precision_ratio recall_ratio diversity_ratio train_control_auc "
    scores += "leak_50 leak_60 recall_40 recall_50 duplicates "
    scores += "precision_ratio_bank recall_ratio_bank train_control_auc_bank leak_60_bank"
    assert set(metrics) == {*scores.split(), "accuracy_on_generated", "student_accuracy", "teacher_accuracy", "baselines"}
    assert set(metrics["baselines"]) == {"training", "class_mean", "untrained", "held_out"}
    for baseline in metrics["baselines"].values():
        assert set(baseline) == {"ssim_precision", "ssim_recall", "train_control_auc", "leak_60"}
    assert metrics["baselines"]["held_out"]["train_control_auc"] is None  # there was no reference beside the controls
    assert metrics["baselines"]["training"]["train_control_auc"] == 1
    assert metrics["baselines"]["class_mean"]["ssim_precision"] > metrics["baselines"]["untrained"]["ssim_precision"]
    assert table.groupby("images").size().to_dict() == {"control": 20, "generated": 40, "train": 20}
    assert pictures["generated"].dtype == torch.uint8
    assert pictures["nearest"].shape == pictures["generated"].shape
    assert len(evaluation(generator, 41)[2]["generated"]) == 40  # as many of each class


def test_what_members_agree_on_is_compared_with_training_and_control_images():
    bank = Similarities(torch.tensor([[0.9, 0.1], [0.1, 0.8], [0.2, 0.3], [0.1, 0.9]]), torch.tensor([[0.8], [0.1], [0.1], [0.1]]))
    scores = score_agreement(torch.tensor([True, True, False, False]), bank)
    assert scores == {"agreed": 0.5, "agreed_train_70": 1, "agreed_control_70": 0.5, "others_train_70": 0.5, "others_control_70": 0}
    assert score_agreement(torch.zeros(4, dtype=torch.bool), bank)["agreed_train_70"] is None


def test_a_mixture_is_scored_as_a_whole_and_for_agreement():
    parts = [Generator(((0, 1),), (13, 13), 3, 4, 0.1, 16, 8).initialise(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    metrics, _, pictures = evaluation(Mixture.of(parts))
    alone, _, none = evaluation(Mixture.of(parts[:1]))
    assert set(metrics) - set(alone) == {"agreed", *(f"{name}_{role}_70" for name in ("agreed", "others") for role in ("train", "control"))}
    assert metrics["train_control_auc_bank"] != alone["train_control_auc_bank"]
    assert pictures["agreed"].shape == pictures["agreed_nearest"].shape == (8, 13, 13)
    assert metrics["agreed"] == 0
    parts[0].shares[:] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    twins, _, _ = evaluation(Mixture.of([parts[0]] * 2))
    assert (twins["agreed"], twins["others_train_70"]) == (1, None)  # of what is drawn
    assert "agreed" not in none
