"""Every picture of the report. Functions take plain arrays and tables and return a matplotlib figure."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn

from gbc.artifacts import write_bytes
from gbc.homogeneity import Homogeneity, estimate, scaling_table
from gbc.kkt import duality
from gbc.params import LambdaParams

matplotlib.use("Agg")
sns.set_theme(style="whitegrid", context="paper", palette="colorblind")
DPI = 150
COLUMNS = 20  # of a grid of images, about


def save_figure(path: Path, figure: Figure) -> bytes:
    """Write a PNG whose bytes depend on nothing but the figure, and return them."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
    return buffer.getvalue()


def fig2_duality() -> Figure:
    """The U-shaped duality loss of Eq. 6 for three values of δ, at α = 0."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    margin = torch.linspace(-0.5, 3, 701)
    for delta in (0.0, 0.25, 0.5):
        axes.plot(margin, duality(margin, torch.tensor(0.0), delta), label=f"δ = {delta}")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="margin against the runner-up", ylabel="duality loss", title="max(m − e$^{−α}$ − δ, 0) − min(m − e$^{−α}$, 0), α = 0")
    axes.legend()
    return figure


def paper_network() -> nn.Sequential:
    """The network of the paper's Fig. 3, Linear(2, 10)–ReLU–Linear(10, 1), with weights drawn from seed 0."""
    network = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 1))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=rng)
    return network


def _panels(count: int, width: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels `width` inches wide, so many in a row."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * width, 2.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def fig3_lambda(curves: Mapping[str, pd.DataFrame], violations: Mapping[str, float]) -> Figure:
    """Φ(x; e^{αΛ}ζ), solid, and e^α Φ(x; ζ), dotted, for the paper's network and every classifier of the pipeline."""
    homogeneity = estimate(paper_network(), (2,), LambdaParams(inputs=16, batch=16), torch.Generator().manual_seed(0))
    curves = {"Linear(2, 10)–ReLU–Linear(10, 1)": scaling_table(paper_network(), (2,), homogeneity)} | dict(curves)
    violations = {"Linear(2, 10)–ReLU–Linear(10, 1)": homogeneity.violation} | dict(violations)
    figure, panels = _panels(len(curves), 3.2)
    for axes, (name, table) in zip(panels, curves.items(), strict=True):
        for color, (_, line) in zip(sns.color_palette(), table.groupby("input"), strict=False):
            axes.plot(line["alpha"], line["scaled"], color=color, linewidth=1.2)
            axes.plot(line["alpha"], line["expected"], color="black", linestyle=":", linewidth=1.6)
        # Below 1e-12 it is rounding, which differs from processor to processor.
        difference = "below 1e-12" if violations[name] < 1e-12 else f"{violations[name]:.1e}"
        axes.set_title(f"{name}\nlargest relative difference {difference}", fontsize=8)
        axes.set_xlabel("α")
    figure.suptitle("Φ(x; e$^{αΛ}$ζ) solid, e$^{α}$ Φ(x; ζ) dotted; one colour per input")
    return figure


def _landscape(axes: Axes, classes: np.ndarray, extent: float, title: str) -> None:
    """Predicted class on a square grid, white where the prediction changes."""
    edge = np.zeros(classes.shape, dtype=bool)
    edge[:-1] |= classes[:-1] != classes[1:]
    edge[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    shades = ListedColormap([sns.light_palette(color, 5)[3] for color in sns.color_palette()[: classes.max() + 1]])
    axes.imshow(
        np.ma.masked_where(edge, classes),
        origin="lower",
        extent=(-extent, extent, -extent, extent),
        cmap=shades,
        vmin=0,
        vmax=classes.max(),
    )
    axes.set_title(title, fontsize=9)


def _points(
    axes: Axes, x: np.ndarray, y: np.ndarray, title: str, active: np.ndarray | None = None, behind: np.ndarray | None = None
) -> None:
    """Points coloured by class; inactive ones hollow; `behind` marks the training points under generated ones."""
    if behind is not None:
        axes.scatter(*behind.T, s=40, facecolors="none", edgecolors="black", linewidths=0.6, zorder=3)
    colors = np.array(sns.color_palette())[y]
    size = 26 if behind is None else 3
    if active is None:
        axes.scatter(*x.T, s=size, c=colors, linewidths=0)
    else:
        axes.scatter(*x[active].T, s=size, c=colors[active])
        axes.scatter(*x[~active].T, s=size, facecolors="none", edgecolors=list(colors[~active]))
    axes.set_title(title, fontsize=9)


def _square(axes: Axes, extent: float) -> None:
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    axes.grid(False)


def fig4_toy(toy: Mapping[str, np.ndarray]) -> Figure:
    """Training data, the classifier's landscape and generated samples, from left to right."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    data, landscape, samples = figure.subplots(1, 3)
    _points(data, toy["train_x"], toy["train_y"], "(a) training data; filled: carries a multiplier", toy["active"])
    _landscape(landscape, toy["landscape_0"], toy["extent"].item(), "(b) classifier")
    _points(
        samples,
        toy["samples_x"],
        toy["samples_y"],
        f"(c) {len(toy['samples_x']):,} samples; circles: data",
        behind=toy["train_x"],
    )
    for axes in figure.axes:
        _square(axes, toy["extent"].item())
    return figure


def fig5_toy_pair(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], pair: Mapping[str, np.ndarray]) -> Figure:
    """Two halves of the toy data, a generator of each, and one generator of both, free and with its classifier index fixed."""
    figure = Figure(figsize=(14, 5.9), layout="constrained")
    grid = figure.subplots(2, 5)
    for row, (half, letters) in enumerate(zip((first, second), ("abce", "fghi"), strict=True)):
        n = row + 1
        _points(grid[row, 0], half["train_x"], half["train_y"], f"({letters[0]}) training data D{n}", half["active"])
        _landscape(grid[row, 1], half["landscape_0"], half["extent"].item(), f"({letters[1]}) classifier Φ{n}")
        _points(grid[row, 2], half["samples_x"], half["samples_y"], f"({letters[2]}) samples of g{n}", behind=half["train_x"])
        fixed = (pair[f"fixed_{row}_x"], pair[f"fixed_{row}_y"])
        _points(grid[row, 4], *fixed, f"({letters[3]}) g1+2, classifier index {n}", behind=half["train_x"])
    _points(grid[0, 3], pair["samples_x"], pair["samples_y"], "(d) samples of g1+2", behind=pair["train_x"])
    for axes in grid.flat:
        _square(axes, pair["extent"].item())
    grid[1, 3].set_visible(False)
    return figure


def _tiled(images: np.ndarray, background: int = 0) -> np.ndarray:
    """Images [n, height, width] or [n, channels, height, width] in a row, each in a frame."""
    row = images if images.ndim == 3 else np.moveaxis(images, 1, -1)
    return np.concatenate([np.pad(tile, [(1, 1), (1, 1)] + [(0, 0)] * (tile.ndim - 2), constant_values=background) for tile in row], 1)


def film_strips(pictures: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Every generator's samples of the same codes, uint8, in a row for every number of steps made."""
    figure, panels = _panels(len(pictures), 5.0, columns=2)
    for axes, (name, shown) in zip(panels, pictures.items(), strict=True):
        picture, steps = np.concatenate([_tiled(samples) for samples in shown["film"]]), shown["film_step"]
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        centres = (np.arange(len(steps)) + 0.5) * len(picture) / len(steps)
        axes.set(title=name, xticks=[], yticks=centres, yticklabels=steps, ylabel="steps")
        axes.grid(False)
    return figure


def fig_images(generated: np.ndarray, nearest: np.ndarray, classes: int, title: str) -> Figure:
    """Odd rows: generated images; even rows: the nearest training image of each, by SSIM. [n, height, width] or with channels, uint8.

    The images come class by class, as many of each; every class gets columns of its own.
    """
    share = max(1, min(COLUMNS, len(generated)) // classes)
    rows = len(generated) // classes // share
    order = np.arange(len(generated)).reshape(classes, -1)[:, : rows * share].reshape(classes, rows, share).swapaxes(0, 1).flatten()
    generated, nearest = generated[order], nearest[order]
    tiles = []
    for start in range(0, len(generated), classes * share):
        for images, background in ((generated, 0), (nearest, 255)):
            tiles.append(_tiled(images[start : start + classes * share], background))
    picture = np.concatenate(tiles)
    figure = Figure(figsize=(10, 10 * picture.shape[0] / picture.shape[1] + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return figure


def loss_curves(histories: Mapping[str, pd.DataFrame], oracles: Mapping[str, float]) -> Figure:
    """Stationarity residual and duality of every generator, and the residual that the true training images reach over all parameters."""
    figure, panels = _panels(len(histories), 3.4)
    for axes, (name, history) in zip(panels, histories.items(), strict=True):
        long = history.melt(["step", "classifier", "member"], ["stationarity", "duality"], var_name="term")
        shown = {"hue": "term", "style": "classifier", "units": "member", "estimator": None}
        sns.lineplot(long, x="step", y="value", **shown, ax=axes, legend=False, linewidth=1)
        axes.axhline(oracles[name], color="black", linestyle=":", linewidth=1.2)
        axes.set(yscale="log", title=name, ylabel="")
    figure.suptitle(
        "stationarity blue, duality orange, a second classifier's dashed; dotted: oracle residual of the true training images",
        fontsize=10,
    )
    return figure


def ssim_distribution(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Share of training and of control images whose best SSIM over the generated images exceeds a value."""
    figure, panels = _panels(len(tables), 3.4)
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        shown = table.query("images != 'generated'")
        sns.ecdfplot(shown, x="ssim", hue="images", hue_order=["train", "control"], complementary=True, ax=axes)
        axes.set(title=name, xlabel="best SSIM over generated images", ylabel="share of images above", xlim=(0, 1))
    return figure


def pretraining_curves(descents: Mapping[str, pd.DataFrame]) -> Figure:
    """Log-loss and smallest margin of every classifier's descent."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves = pd.concat([table.assign(classifier=name) for name, table in descents.items()])
    colors = dict(zip(descents, sns.color_palette("tab20", len(descents)), strict=True))
    for axes, column in zip(figure.subplots(1, 2), ("log_loss", "smallest_margin"), strict=True):
        axes.set(xscale="log", yscale="symlog")
        sns.lineplot(curves, x="step", y=column, hue="classifier", palette=colors, ax=axes)
        axes.set(ylabel=column.replace("_", " "))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.get_legend().remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def oracle_residuals(descents: Mapping[str, pd.DataFrame]) -> Figure:
    """Oracle residuals of true and held-out images over every classifier's descent; a panel for each."""
    figure, panels = _panels(len(descents), 3.2, 4)
    for axes, (name, table) in zip(panels, descents.items(), strict=True):
        measured = table.dropna(subset="oracle_residual")
        for column, images, style in (("oracle_residual", "true", "-"), ("heldout_residual", "held-out", "--")):
            axes.plot(measured["step"], measured[column], style, marker=".", label=images)
        axes.set(xlabel="step", ylabel="oracle residual", ylim=(0, None), title=name)
    panels[0].legend()
    return figure


def search_importance(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Every parameter's share in the spread of a search's results; a panel for each search."""
    figure, panels = _panels(len(studies), 4.5, min(2, len(studies)))
    for axes, (name, table) in zip(panels, studies.items(), strict=True):
        axes.barh(table["parameter"].str.removeprefix("train_single.").str.removeprefix("train_multi."), table["importance"])
        axes.invert_yaxis()
        axes.set(xlabel="importance", title=name)
    return figure


def scaling(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Recall and AUC against the number of training images, and against weights per pixel of them; means and deviations over seeds."""
    figure = Figure(figsize=(9, 5.6 * len(studies)), layout="constrained")
    panels = iter(figure.subplots(2 * len(studies), 2, sharey="row"))
    for name, table in studies.items():
        varied = table["images"].isin(table.loc[table["width"] != 1, "images"])
        for score, text in (("recall_ratio", "recall ratio"), ("train_control_auc", "train/control AUC")):
            left, right = next(panels)
            for label, part, color in zip(
                ("more images", "wider classifier"), (table[table["width"] == 1], table[varied]), sns.color_palette(), strict=False
            ):
                for axes, size in ((left, "images"), (right, "weights_per_pixel")):
                    if len(set(part[size])) > 1:
                        points = part.groupby(size)[score].agg(["mean", "std"]).reset_index()
                        axes.errorbar(points[size], points["mean"], points["std"], marker="o", capsize=3, color=color, label=label)
            left.set(xlabel="training images N", ylabel=text, xscale="log", title=name)
            right.set(xlabel="weights per pixel of them, p/(dN)", xscale="log")
            right.legend()
            for axes in (left, right):
                axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    return figure


IMAGE_FIGURES = {"mnist": "fig6_mnist", "faces": "fig7_faces", "mnist_pair": "fig8_mnist_pair"}


def draw(
    metrics: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[str, Mapping[str, np.ndarray]],
    tables: Mapping[str, pd.DataFrame],
    histories: Mapping[str, pd.DataFrame],
    lambdas: Mapping[str, Homogeneity],
    scalings: Mapping[str, pd.DataFrame],
    descents: Mapping[str, pd.DataFrame],
    classes: Mapping[str, int],
    studies: Mapping[str, pd.DataFrame],
) -> dict[str, Figure]:
    """Every figure of the report, by file name; the paper's first. All mappings are by generator or classifier name, `studies` by file."""
    figures = {
        "fig2_duality": fig2_duality(),
        "fig3_lambda": fig3_lambda(scalings, {name: lam.violation for name, lam in lambdas.items()}),
    }
    if "toy" in pictures:
        figures["fig4_toy"] = fig4_toy(pictures["toy"])
    if {"toy_1", "toy_2", "toy_pair"} <= set(pictures):
        figures["fig5_toy_pair"] = fig5_toy_pair(pictures["toy_1"], pictures["toy_2"], pictures["toy_pair"])
    images = [name for name in pictures if "generated" in pictures[name]]
    for name in images:
        file = IMAGE_FIGURES.get(name, f"fig7_{name}" if name.startswith("celeba_") else f"samples_{name}")
        title = f"{name}: odd rows generated, even rows nearest training image"
        figures[file] = fig_images(pictures[name]["generated"], pictures[name]["nearest"], classes[name], title)
        if "agreed" in pictures[name]:
            title = f"{name}: odd rows what two members agree on most, even rows nearest training image"
            figures[f"agreed_{name}"] = fig_images(pictures[name]["agreed"], pictures[name]["agreed_nearest"], classes[name], title)
    figures = dict(sorted(figures.items()))
    figures["pretraining_curves"] = pretraining_curves(descents)
    figures["oracle_residuals"] = oracle_residuals(descents)
    figures["loss_curves"] = loss_curves(histories, {name: values["oracle_residual"] for name, values in metrics.items()})
    if images:
        figures["film"] = film_strips({name: pictures[name] for name in images})
        figures["ssim_distribution"] = ssim_distribution({name: tables[name] for name in images})
    if searches := {name.removeprefix("search_"): table for name, table in studies.items() if name.startswith("search_")}:
        figures["search_importance"] = search_importance(searches)
    if sizes := {name.removeprefix("scaling_"): table for name, table in studies.items() if name.startswith("scaling_")}:
        figures["scaling"] = scaling(sizes)
    return figures
