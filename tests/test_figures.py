"""Every figure is drawn from small real inputs, and the page carries them."""

import dataclasses
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import torch

from gbc.classifier import Classifier
from gbc.evaluation import evaluate
from gbc.figures import draw, fig_images, paper_network, save_figure
from gbc.generator import Generator, Mixture
from gbc.homogeneity import estimate, scaling_table
from gbc.params import LambdaParams


def toy(known: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics and pictures of an untrained toy generator of one classifier or two."""
    rng = torch.Generator().manual_seed(0)
    generator = Generator(((0, 1, 2),) * known, (2,), 3, 4, 0.1, 16, 8).initialise(rng)
    classifier = Classifier("batchnorm", (2,), (8, 8), (0, 1, 2))
    data = {"train_x": torch.randn(6, 2, generator=rng), "train_y": torch.arange(6) % 3}
    metrics, table, pictures = evaluate(
        Mixture.of([generator]), [classifier] * known, [data] * known, [[True] * 5 + [False]] * known, 60, 0
    )
    apart = {"own_015", "others_015"} if known > 1 else set()
    assert set(metrics) == {"within_015", "points_hit", "points_active", "accuracy_on_generated"} | apart
    assert metrics["points_active"] == 5 * known
    assert table.empty
    return metrics | {"oracle_residual": 0.1}, {key: value.numpy() for key, value in pictures.items()}


def test_every_figure_of_the_report_is_drawn(tmp_path):
    names = ["toy", "toy_1", "toy_2", "toy_pair", "mnist", "celeba_Male"]
    metrics, pictures = {}, {}
    for name in names[:4]:
        metrics[name], pictures[name] = toy(2 if name == "toy_pair" else 1)
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 9), dtype=np.uint8)
    colour = np.random.default_rng(0).integers(0, 256, (60, 3, 9, 9), dtype=np.uint8)
    for name, tiles in (("mnist", images), ("celeba_Male", colour)):
        metrics[name] = {"ssim_precision": 0.5, "oracle_residual": 0.1, "baselines": {"held_out": {"ssim_precision": 0.6, "leak_60": None}}}
        pictures[name] = {"generated": tiles, "nearest": tiles, "film": np.stack([tiles[:20]] * 3), "film_step": np.array([0, 5, 20])}
    table = pd.DataFrame({"images": ["train", "control", "generated"] * 5, "ssim": np.linspace(0.1, 0.9, 15)})
    history = pd.DataFrame({"step": [0, 1], "classifier": [0, 0], "member": [0, 0], "stationarity": [1.0, 0.5], "duality": [1.0, 0.1]})
    descent = pd.DataFrame(
        {
            "step": [1, 2],
            "log_loss": [1.0, -3.0],
            "smallest_margin": [-1.0, 2.0],
            "oracle_residual": [0.9, 0.2],
            "heldout_residual": [0.9, None],
        }
    )
    homogeneity = estimate(paper_network(), (2,), LambdaParams(8, 8), torch.Generator().manual_seed(0))
    scaling = scaling_table(paper_network(), (2,), homogeneity)
    sizes = pd.DataFrame({"images": [100, 200, 200], "weights_per_pixel": [9.0, 4.5, 1.5], "width": [1.0, 1.0, 0.5]})
    sizes = sizes.assign(recall_ratio=[1.0, 0.9, 0.8], train_control_auc=[0.9, 0.8, 0.7])
    figures = draw(
        metrics,
        pictures,
        dict.fromkeys(names, table),
        dict.fromkeys(names, history),
        {"net": dataclasses.replace(homogeneity, violation=2.5e-10)},
        {"net": scaling},
        {"net": descent},
        {"mnist": 10, "celeba_Male": 2},
        {
            "search_toy": pd.DataFrame({"parameter": ["beta", "train_single.toy.batch"], "importance": [0.8, 0.2]}),
            "ablation_toy": table,
            "scaling_mnist": sizes,
        },
    )
    paper = ["fig2_duality", "fig3_lambda", "fig4_toy", "fig5_toy_pair", "fig6_mnist", "fig7_celeba_Male"]
    assert list(figures) == [
        *paper,
        "pretraining_curves",
        "oracle_residuals",
        "loss_curves",
        "film",
        "ssim_distribution",
        "search_importance",
        "scaling",
    ]
    for name, figure in figures.items():
        assert save_figure(tmp_path / name, figure) == (tmp_path / name).read_bytes()
    assert "largest relative difference below 1e-12" in figures["fig3_lambda"].axes[0].get_title()
    assert "largest relative difference 2.5e-10" in figures["fig3_lambda"].axes[1].get_title()


def test_odd_rows_are_generated_and_every_class_has_columns_of_its_own(tmp_path):
    generated = np.repeat(np.arange(10, dtype=np.uint8) * 20, 6)[:, None, None] * np.ones((1, 4, 4), dtype=np.uint8)
    figure = fig_images(generated, 255 - generated, 10, "title")
    shown = figure.axes[0].images[0].get_array()
    assert shown is not None
    assert shown.shape == (6 * 6, 20 * 6)
    for column in range(20):
        for row in range(6):
            tile = shown[6 * row + 1 : 6 * row + 5, 6 * column + 1 : 6 * column + 5]
            value = 20 * (column // 2)
            assert (tile == (255 - value if row % 2 else value)).all()
    few = fig_images(generated[::3], generated[::3], 10, "title").axes[0].images[0].get_array()
    assert few is not None
    assert few.shape == (2 * 6, 20 * 6)  # two of each class: one row of them
    save_figure(tmp_path / "grid.png", figure)
    assert matplotlib.image.imread(tmp_path / "grid.png").ndim == 3
