"""The report's tables, and the committed page in a real browser, on a phone and on a desktop, by day and by night."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gbc import page as report
from gbc.figures import paper_network
from gbc.homogeneity import estimate
from gbc.params import LambdaParams, load_params
from tests.tiny import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[dev]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PAGE = ROOT / "reports/index.html"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")], ids=lambda case: f"{case[0]}-{case[1]}")
def page(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """The report without a network; in the end nothing was asked of it, and the console has no error."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True)
    opened, trouble = context.new_page(), []
    opened.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else trouble.append(asked.url))
    opened.goto(PAGE.as_uri())
    yield opened
    assert trouble == []
    if folder := os.environ.get("SCREENSHOTS"):
        opened.screenshot(path=f"{folder}/{width}-{scheme}.png", full_page=True)
    context.close()


def test_a_pair_has_the_label_and_the_similarity_of_its_sample():
    best = pd.DataFrame({"images": ["train"] * 2 + ["generated"] * 7, "ssim": [0.9, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]})
    tiles = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 3, 3), dtype=np.uint8)
    found = report.pairs({"generated": tiles, "nearest": tiles}, best, [3, 8])  # 4 samples of class 3, then 3 of class 8
    assert [pair["text"] for pair in found] == ["class 3, SSIM 0.10", "class 3, SSIM 0.20", "class 8, SSIM 0.50", "class 8, SSIM 0.60"]


def test_the_certificate_names_where_lambda_is_largest():
    homogeneity = estimate(paper_network(), (2,), LambdaParams(8, 8), torch.Generator().manual_seed(0))
    everywhere = {"residual": 0.3, "heldout_residual": 0.9, "cosine": 0.95, "groups": {"0.weight": 0.3}}
    oracle = {"residual": 0.2, "heldout_residual": None, "everywhere": everywhere, "active": [True, False]}
    oracle |= {"smallest_margin": 2.0, "log_loss": -3.0, "heldout_accuracy": None}
    row = report.certify_table({"net": report.certificate("homogeneous", homogeneity, oracle)}).loc["net"]
    assert row["λ on Z₁"] == "1 on 2.bias"  # of the paper's network: its last bias
    assert row["active"] == "1 of 2"


def test_an_alternative_text_ends_with_the_first_sentence_not_with_an_equation():
    assert report.lead("Duality (Eq. 6), not Eqs. 5 to 7: a loss. It is zero.") == "Duality (Eq. 6), not Eqs. 5 to 7: a loss"


def test_an_ablation_is_shown_as_means_over_seeds():
    table = pd.DataFrame(
        {"variant": ["b", "a", "b"], "seed": [0, 0, 1], "train_control_auc": [0.5, 0.9, 0.7], "recall_ratio": [1.0, 3.0, 2.0]}
    )
    shown = report.seed_means(table, report.SCORES)
    assert list(shown.index) == ["b", "a"]
    assert shown.loc["b"].to_dict() == pytest.approx({"seeds": 2, "recall ratio": 1.5, "train/control AUC": 0.6, "±": 0.02**0.5})


def test_seeds_are_shown_apart_for_images_and_points():
    rows: dict[str, Any] = {"variant": ["mnist", "toy"], "seed": 0}
    rows |= {"train_control_auc": [0.7, None], "points_hit": [None, 17.0], "kkt_residual": [0.2, 0.1]}
    shown = report.over_seeds(pd.concat([pd.DataFrame(rows), pd.DataFrame(rows | {"seed": 1, "points_hit": [None, 18.0]})]))
    assert shown["images"].loc["mnist"].to_dict() == pytest.approx({"seeds": 2, "train/control AUC": 0.7, "±": 0.0, "residual": 0.2})
    assert shown["points"].loc["toy"].to_dict() == pytest.approx({"seeds": 2, "training points hit": 17.5, "residual": 0.1})
    assert list(report.over_seeds(pd.DataFrame(rows).head(1))) == ["images"]


def test_pixels_stand_below_the_generator_that_they_replace():
    seeds = pd.DataFrame({"variant": ["toy", "mnist", "faces", "mnist"], "seed": [0, 0, 0, 1], "leak_60": [None, 0.3, 0.2, 0.4]})
    drawn = {"pixels_faces": {0: 0.1}, "pixels_mnist": {1: 0.2, 2: 0.4}}
    studies = {name: pd.DataFrame({"variant": "pixels instead of g", "seed": list(d), "leak_60": d.values()}) for name, d in drawn.items()}
    shown = report.beside_pixels(seeds, studies | {"ablation_mnist": seeds})
    assert list(shown.index) == ["mnist", "mnist: pixels", "faces", "faces: pixels"]
    assert list(shown["leak 0.6"]) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert report.beside_pixels(seeds, {}).empty


def test_what_fails_is_said_in_numbers():
    mean = {"class_mean": {"train_control_auc": 0.6, "leak_60": 0.03}}
    images = {
        "accuracy_on_generated": 1.0,
        "train_control_auc": 0.62,
        "leak_60": 0.05,
        "baselines": mean,
        "kkt_residual": 0.2,
        "recall_50": 0.8,
    }
    lines = report.failures(
        {
            "toy": {"points_hit": 16, "points_active": 18},
            "whole": {"points_hit": 18, "points_active": 18},
            "faces": images,
            "mnist": images | {"train_control_auc": 0.7},
            "leaky": images | {"leak_60": 0.2},
            "letter": images | {"accuracy_on_generated": 0.2, "kkt_residual": 1.0},
        }
    )
    assert lines == [
        "toy misses 2 of 18 training points.",
        "faces gives away no more than its class means do: train/control AUC 0.62 and 0.60, leak 0.6 0.05 and 0.03.",
        "mnist: 20% of the training images are not reproduced above SSIM 0.5.",
        "leaky: 20% of the training images are not reproduced above SSIM 0.5.",
        "letter does not make images of the classes asked for: its residual stays at 1.00.",
    ]


def test_the_page_holds_all_it_is_given_in_one_file():
    homogeneity = estimate(paper_network(), (2,), LambdaParams(8, 8), torch.Generator().manual_seed(0))
    everywhere = {"residual": 0.3, "heldout_residual": None, "cosine": 0.95, "groups": {}}
    oracle = {"residual": 0.2, "heldout_residual": None, "everywhere": everywhere, "active": [True], "smallest_margin": 2.0}
    certificate = report.certificate("homogeneous", homogeneity, oracle | {"log_loss": -3.0, "heldout_accuracy": None})
    shared = dict.fromkeys(report.SHARED, 0.5)
    images = dict.fromkeys(report.SCORES, 0.75) | shared | {"recall_50": 0.5, "leak_50": 0.25}
    images |= {"agreed": 0.25, "agreed_train_70": 0.875, "agreed_control_70": 0.0625, "others_train_70": 0.3125, "others_control_70": None}
    metrics = {"toy": dict.fromkeys(report.POINTS, 1.0), "mnist": images | {"baselines": dict.fromkeys(report.BASELINES, shared)}}
    tiles = np.zeros((60, 4, 4), dtype=np.uint8)
    best = pd.DataFrame({"images": ["generated"] * 60, "ssim": np.linspace(0, 1, 60)})
    page = report.render(
        load_params([]),
        metrics,
        {"toy": certificate, "mnist": certificate},
        dict.fromkeys(metrics, pd.DataFrame({"member": [0], "classifier": [0], "alpha": [-np.log(2.1)]})),
        {"mnist": best},
        {"mnist": {"generated": tiles, "nearest": tiles}},
        {name: report.png(tiles[0]) for name in [*report.CAPTIONS, "agreed_mnist"]},
        {"kkt_step": {"threads": 2, "torch": "2", "speedup_eager": 1.25, "batch_norm": {"speedup_eager": 1.375}}},
        {"ablation_mnist": pd.DataFrame({"variant": ["all terms"], "seed": [0], "train_control_auc": [0.8125], "recall_ratio": [1.0]})},
    )
    assert page.count("data-pair=") == 60
    assert page.index('id="mnist"') < page.index('id="toy"')
    assert "the classifier&#39;s smallest training margin is 2 (+5.0%)" in page
    assert "batch_norm.speedup_eager" in page
    assert "0.812" in page
    (section,) = page.split("What its members agree on")[1:]
    assert "0.875" in section[: section.index("What the members of mnist agree on")]
    assert "| mnist" in report.summary(metrics)
    assert "toy" not in report.summary(metrics)


def test_every_image_loads_and_says_what_it_shows(page: Any):
    images = page.eval_on_selector_all("main img", "all => all.map(image => [image.naturalWidth, image.alt])")
    assert len(images) > 100
    assert all(width > 0 and alt for width, alt in images)


def test_the_page_does_not_scroll_sideways(page: Any):
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_click_enlarges_an_image_beside_its_nearest_neighbour(page: Any):
    buttons = page.locator("#mnist ~ .pairs button")
    first, second = (buttons.nth(k).get_attribute("data-pair") for k in (0, 1))
    dialog = page.locator("dialog")
    assert not dialog.is_visible()
    buttons.first.click()
    assert first in dialog.locator("h2").inner_text()
    sources = dialog.locator("img").evaluate_all("all => all.map(image => image.src)")
    assert sources == buttons.first.locator("img").evaluate_all("all => all.map(image => image.src)")
    assert dialog.locator("img").first.bounding_box()["width"] > 100
    page.keyboard.press("ArrowRight")
    assert second in dialog.locator("h2").inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_axe_finds_no_barrier(page: Any):
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.locator("[data-pair]").first.click()
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_page_is_not_heavy():
    assert PAGE.stat().st_size < 8 * 2**20
