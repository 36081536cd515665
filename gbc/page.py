"""The report's page: one HTML file with every figure inlined, readable offline."""

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

from gbc.homogeneity import Homogeneity

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
img { max-width: 100%; display: block; margin: 0.5rem auto; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""

CAPTIONS = {
    "fig2_duality": "Duality (Eq. 6). The loss is zero where a sample's margin lies between e^−α and e^−α + δ, and grows linearly outside: "
    "every generated sample is asked to sit at the smallest margin, where multipliers may be positive.",
    "fig3_lambda": "Λ (Eqs. 9 and 10), estimated from random inputs and the weights alone: the paper's two-layer network first, then every "
    "classifier of this pipeline, batch normalisation in train mode. Each title gives the largest relative difference in float64. "
    "If Λ is right, the dotted lines cover the solid ones.",
    "fig4_toy": "The toy. Eighteen points on a circle in three classes, the classifier trained on them, and samples of the generator "
    "that saw only that classifier. Look for samples at the circled points, and for points that none reaches.",
    "fig5_toy_pair": "Two classifiers, one generator (Eq. 12). Each row: one half of the toy data, its classifier, its own generator; "
    "on the right, the generator born from both: (d) free, (e) and (i) with its classifier index fixed, where only that half should appear.",
    "fig6_mnist": "MNIST, batch-normalised classifier. Odd rows: the first generated images of each digit from fresh noise, not selected; "
    "even rows: the training image nearest by SSIM.",
    "fig7_faces": "Faces and patches without a face, 25×25. Odd rows generated, even rows nearest training image; non-faces first.",
    "fig8_mnist_pair": "One generator from two classifiers, one that knows the digits 0 to 4 and one that knows 5 to 9. Odd rows generated, even rows nearest.",
    "samples_mnist_plain": "MNIST, homogeneous classifier without batch normalisation, trained with weight decay: the paper's loss where its "
    "theory is cleanest. There are no statistics to match: stationarity does all the work. Odd rows generated, even rows nearest.",
    "samples_mnist_letter": "MNIST, batch-normalised classifier, the paper's loss to the letter (Eqs. 5 to 7 and total variation, no extension). "
    "The loss is met by images that are not digits: the extensions are what the other MNIST results rest on.",
    "pretraining_curves": "Full-batch descent of the classifiers: log-loss and smallest margin against steps, and the oracle residual on Z₁ against the "
    "log-loss, of the true training images (solid) and of held-out ones (dashed). With weight decay (mnist_plain) the log-loss stays where it is while "
    "the residual falls. Where the two lines part, the weights tell training images from others. mnist_biased, at 1e-7, is below the panel: Z₁ is its last bias alone.",
    "loss_curves": "Training. Stationarity is the relative residual of Eq. 5 over all parameters; the dotted line is what the true training "
    "images reach with the best multipliers. Duality is in units of the margin asked for.",
    "film": "Digits and faces emerge from noise: the same codes after more and more steps of training (one row each), every class in equal shares.",
    "ssim_distribution": "Does the generator give training images away? Best SSIM over all generated images, for every training image and for "
    "as many images of the same classes that the classifier never saw. If the curves coincide, it gives nothing away beyond the class.",
}


SHARED = ["ssim_precision", "ssim_recall", "train_control_auc", "leak_60"]  # scores that baselines have too


def caption(name: str) -> str:
    """What to see in a figure."""
    if name.startswith("fig7_celeba_"):
        return f"CelebA, attribute {escape(name.removeprefix('fig7_celeba_'))}: class 0 first. Odd rows generated, even rows nearest training image."
    return CAPTIONS.get(name) or f"Generator {escape(name.removeprefix('samples_'))}: odd rows generated, even rows nearest training image."


def wide(table: pd.DataFrame) -> str:
    """A table as HTML, three significant digits, that scrolls by itself where it is wider than the page."""
    return f'<div class="wide">{table.to_html(float_format=lambda v: f"{v:.3g}", na_rep="", border=0)}</div>\n'


def metrics_tables(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Three tables as HTML, as far as there is something to put in: images and points, a generator in every column; then baselines."""
    scores = {name: {key: value for key, value in values.items() if key != "baselines"} for name, values in metrics.items()}
    beside = {
        f"{name}: {role}": row
        for name, values in metrics.items()
        if "baselines" in values
        for role, row in {"generated": values, **values["baselines"]}.items()
    }
    points = [name for name in scores if "points_hit" in scores[name]]
    tables = [
        pd.DataFrame({name: scores[name] for name in scores if name not in points}),
        pd.DataFrame({name: scores[name] for name in points}),
        pd.DataFrame.from_dict(beside, orient="index").filter(SHARED),
    ]
    return "".join(wide(table) for table in tables if table.size)


def certificate(architecture: str, homogeneity: Homogeneity, oracle: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a classifier before a generator is born from it: Λ with its polytope, and how well images explain the weights."""
    return {
        "architecture": architecture,
        "lam": homogeneity.lam,
        "lam_bounds": homogeneity.bounds,
        "z1": homogeneity.z1,
        "polytope_dimension": homogeneity.dimension,
        "scaling_violation": homogeneity.violation,
        "oracle_residual": oracle["residual"],
        "heldout_residual": oracle["heldout_residual"],
        "oracle_residual_all": oracle["everywhere"]["residual"],
        "heldout_residual_all": oracle["everywhere"]["heldout_residual"],
        "cosine_all": oracle["everywhere"]["cosine"],
        "groups_all": oracle["everywhere"]["groups"],
        "images": len(oracle["active"]),
        "active_images": sum(oracle["active"]),
        "smallest_margin": oracle["smallest_margin"],
        "log_loss": oracle["log_loss"],
        "heldout_accuracy": oracle["heldout_accuracy"],
    }


def certify_table(certificates: Mapping[str, Mapping[str, Any]]) -> str:
    """A classifier in every row, as HTML: its groups, Λ, the scaling check and the oracle residuals."""
    rows = {}
    for name, values in certificates.items():
        highest = max(values["lam"].values())
        where = "on " + ", ".join(group.removeprefix("layers.") for group in values["z1"])
        rest = {f"{value:.3g}" for group, value in values["lam"].items() if group not in values["z1"]}
        rows[name] = {
            "architecture": values["architecture"],
            "groups": len(values["lam"]),
            "polytope": values["polytope_dimension"],
            "λ on Z₁": f"{highest:.3g} {where if rest else 'everywhere'}",
            "elsewhere": ", ".join(sorted(rest)),
            "scaling check": f"{values['scaling_violation']:.0e}",
            "true, Z₁": values["oracle_residual"],
            "held-out, Z₁": values["heldout_residual"],
            "true, all": values["oracle_residual_all"],
            "held-out, all": values["heldout_residual_all"],
            "active": f"{values['active_images']} of {values['images']}",
            "margin": values["smallest_margin"],
            "log-loss": values["log_loss"],
        }
    return wide(pd.DataFrame.from_dict(rows, orient="index"))


def benchmarks_table(benchmarks: Mapping[str, Mapping[str, Any]]) -> str:
    """Every number of every benchmark in a row, as HTML."""
    rows = []
    for name, results in benchmarks.items():
        flat = pd.json_normalize(dict(results)).iloc[0].drop(["threads", "torch"])
        rows += [{"benchmark": name, "measured": key, "value": value} for key, value in flat.items() if isinstance(value, float | int)]
    return wide(pd.DataFrame(rows).set_index("benchmark"))


def render(
    metrics: Mapping[str, Mapping[str, Any]],
    certificates: Mapping[str, Mapping[str, Any]],
    benchmarks: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, bytes],
) -> str:
    """The page: tables of all metrics, certificates and benchmarks, and every figure (PNG bytes) with a paragraph on what to see."""
    sections = [
        f'<h2 id="{name}">{name}</h2>\n<p>{caption(name)}</p>\n<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in figures.items()
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>gbc: Generator Born from Classifier</title>',
            f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>',
            "<h1>Generator Born from Classifier</h1>",
            "<p>Generators trained on nothing but a classifier's weights, after Yu &amp; Wang, NeurIPS 2023. Images are drawn from fresh noise. "
            "Precision: mean best SSIM of a generated image to a training image. Recall: of a training image to the generated ones. Ratios: the "
            "same, over that of as many real images never seen (1 is a perfect generator). <code>train_control_auc</code>: probability that a "
            "training image is reproduced better than a control image of the same class (0.5: nothing is given away). "
            "<code>leak_t</code>: share of training images above SSIM t, less the share of controls.</p>",
            metrics_tables(metrics),
            '<h2 id="certify">certify</h2>\n<p>Before a generator is trained: does Λ hold, and do the training images explain the weights? The oracle '
            "residual is ‖Λ̄ζ − Σ μ ∇m‖ / ‖Λ̄ζ‖ with the best non-negative multipliers of the true images: what a perfect generator would reach. Beside it "
            "the same for held-out images of the same classes: where it is no larger, stationarity cannot tell the training images from others. "
            "“Z₁”: over the parameters of the largest λ alone; “all”: over all, the target being zero on Z₂.</p>",
            certify_table(certificates),
            *sections,
            '<h2 id="benchmarks">benchmarks</h2>\n<p>Speed, as ratios of things measured in turn in one process on two cores; above 1 ours is faster '
            "(<code>speedup_…</code>), or uses more (<code>…_ratio</code>; for <code>time_to_residual_ratio</code> and <code>step_ratio</code> more is better). "
            "<code>kkt_step</code> is Eq. 5's residual with its gradient; <code>matmul_share</code> the share of the machine's own matrix-product speed. Measured by "
            "<code>make benchmarks</code>, not by the pipeline: the numbers are kept in data/benchmarks.</p>",
            benchmarks_table(benchmarks),
            "</body>\n</html>\n",
        ]
    )
