"""Each term off in turn, on a tiny task."""

import pytest
import torch

from gbc.ablation import PIXELS, VARIANTS, Pixels, ablate
from gbc.params import InputError, Params, load_params

TINY = [
    "sample.faces.per_class=10",
    "pretrain.faces.hidden=[12,8]",
    "pretrain.faces.max_steps=20",
    "pretrain.faces.settle_steps=5",
    "train_single.faces.anchors=4",
    "train_single.faces.batch=12",
    "train_single.faces.length=1",
    "generator.noise=4",
    "generator.width=16",
    "generator.channels=8",
    "evaluate.samples=40",
    "steps=4",
]


def tiny(*overrides: str) -> Params:
    return load_params([*TINY, *overrides])


def test_every_term_is_switched_off_once_and_what_is_known_is_not_made_again():
    known = {"statistics off", "collapse off", "learned multipliers", "smooth gate off", "total variation off", "duality off"}
    rows = {row["variant"]: row for row in ablate(tiny(), "faces", 1, known)}
    assert set(rows) == {*VARIANTS, PIXELS} - known
    assert all(row["seed"] == 1 for row in rows.values())
    assert {row["steps"] for variant, row in rows.items() if variant != PIXELS} == {4}
    assert rows["all terms"]["kkt_residual"] != rows["stationarity off"]["kkt_residual"]
    assert list(ablate(tiny(), "faces", 1, {*VARIANTS, PIXELS})) == []


def test_a_variant_that_repeats_another_is_left_out():
    off = ["train_single.faces.statistics=0", "train_single.faces.collapse=0", "train_single.faces.multiplier=relu"]
    known = {"all terms", "duality off", "total variation off", "smooth gate off", PIXELS}
    assert [row["variant"] for row in ablate(tiny(*off), "faces", 0, known)] == ["stationarity off"]


def test_pixels_are_free_images_of_every_anchor():
    pixels = Pixels(((0, 1),), (5, 5), 4, 3, 0.1, 8, 8).initialise(torch.Generator().manual_seed(0))
    images, y = pixels.bank()
    assert images.shape == (6, 5, 5)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    drawn, labels = pixels.sample(8, torch.Generator().manual_seed(1))
    for image, label in zip(drawn, labels.tolist(), strict=True):
        assert any(torch.equal(image, images[3 * label + anchor]) for anchor in range(3))


def test_points_are_refused():
    with pytest.raises(InputError, match="toy_1 makes points"):
        next(ablate(load_params([]), "toy_1", 0, set()))
