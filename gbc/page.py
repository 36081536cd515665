"""The report's page: one HTML file that holds its pictures and needs no network. Its text and layout are in page.html."""

import base64
import math
import re
from collections.abc import Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from gbc.artifacts import load_json, png
from gbc.homogeneity import Homogeneity
from gbc.params import Params

ABOUT = {
    "mnist": "Handwritten digits, and a batch-normalised classifier as in the paper.",
    "mnist_10": "The classifier of mnist trained on ten images per class instead of fifty: as many weights for a fifth of the images, it gives most of them away.",
    "mnist_pair": "One generator from two classifiers, one that knows the digits 0 to 4 and one that knows 5 to 9 (Eq. 12).",
    "mnist_plain": "A homogeneous classifier of one hidden layer without batch normalisation, trained with weight decay. There are no statistics to match "
    "and no collapse to hold on to: what is given away comes from stationarity.",
    "mnist_letter": "The paper's loss (Eqs. 5 to 7 and total variation) without an added term, from the classifier of mnist, in a short training (what "
    "it keeps of ours is in docs/beyond.md). What comes out are not digits: the extensions are what the other results rest on, batch statistics and larger batches first (reports/experiments.md).",
    "faces": "Faces and patches without a face, 25×25; non-faces first.",
    "toy": "Eighteen points on a circle, in three classes.",
    "toy_pair": "One generator from the classifiers of both halves of the toy (Eq. 12).",
}
FIGURES = {"toy": "fig4_toy", "toy_pair": "fig5_toy_pair"}  # of a generator's section; images are shown one by one
CAPTIONS = {
    "fig2_duality": "Duality (Eq. 6): the loss is zero where a sample's margin lies between e^−α and e^−α + δ, and grows linearly outside: "
    "every generated sample is asked to sit at the smallest margin, where multipliers may be positive.",
    "fig3_lambda": "Λ (Eqs. 9 and 10), estimated from random inputs and the weights alone: the paper's two-layer network first, then every "
    "classifier of this pipeline, batch normalisation in train mode. Each title gives the largest relative difference in float64. "
    "If Λ is right, the dotted lines cover the solid ones.",
    "fig4_toy": "The toy: eighteen points on a circle in three classes, the classifier trained on them, and samples of the generator "
    "that saw only that classifier. Look for samples at the circled points, and for points that none reaches.",
    "fig5_toy_pair": "Two classifiers, one generator (Eq. 12). Each row: one half of the toy data, its classifier, its own generator; "
    "on the right, the generator born from both: (d) free, (e) and (i) with its classifier index fixed, where only that half should appear.",
    "pretraining_curves": "Full-batch descent of the classifiers. With weight decay (mnist_plain; up to 300 steps of descent before it are not shown) the log-loss swings, then stays while "
    "the residual below falls.",
    "oracle_residuals": "The oracle residual on Z₁ over the descent, of the true training images and of held-out ones. Where the two lines part, Z₁ alone tells training images from others; with "
    "batch normalisation it hardly does, and Z₂ tells (the table of Λ and oracle). mnist_biased is near 0: Z₁ is its last bias alone.",
    "loss_curves": "Training: stationarity is the relative residual of Eq. 5 over all parameters; the dotted line is what the true training "
    "images reach with the best multipliers and a sharper gate, so that a generator can end a little below it; a line for every member. Duality is in units of the margin asked for. Where images were polished they are free after "
    "the kink, g's before it, and the last point is g's again, fitted to them.",
    "film": "Digits and faces emerge from noise: the same codes after more and more steps of training (one row each), every class in equal shares; of several members the first. Most rows of polished generators are free images, the last is of g fitted to them.",
    "search_importance": "Random search: each parameter's share in the spread of the KKT violation that trainings ended with (fANOVA). Made by "
    "python -m stages.search, not by the pipeline.",
    "scaling": "Size: what a generator recovers where there are more training images, and where the classifier is wider or narrower (three seeds, "
    "mean and standard deviation, short trainings). On the right both against the weights that there are for every pixel of the training images.",
    "ssim_distribution": "Does the generator give training images away? Best SSIM over all generated images, for every training image and for "
    "as many images of the same classes that the classifier never saw. If the curves coincide, it gives nothing away beyond the class.",
}
SCORES = {
    "precision_ratio": "precision ratio",
    "recall_ratio": "recall ratio",
    "train_control_auc": "train/control AUC",
    "leak_60": "leak 0.6",
    "diversity_ratio": "diversity",
    "duplicates": "near-copies",
    "accuracy_on_generated": "label accuracy",
    "student_accuracy": "student",
    "teacher_accuracy": "teacher",
    "kkt_residual": "residual",
    "oracle_residual": "oracle",
    "seconds": "seconds",
}
POINTS = {
    "within_015": "samples near a training point",
    "points_hit": "training points hit",
    "points_active": "of active ones",
    "own_015": "by index: near its points",
    "others_015": "near the others'",
    "accuracy_on_generated": "label accuracy",
    "kkt_residual": "residual",
    "oracle_residual": "oracle",
    "seconds": "seconds",
}
SHARED = {"ssim_precision": "precision", "ssim_recall": "recall", "train_control_auc": "train/control AUC", "leak_60": "leak 0.6"}
BASELINES = {
    "training": "the training images themselves",
    "held_out": "real images never seen",
    "class_mean": "class means",
    "untrained": "untrained generator",
}


def data_uri(png: bytes) -> str:
    """A PNG file as a link that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def lead(caption: str) -> str:
    """The first sentence, the image's alternative text."""
    return re.split(r"(?<!Eq)(?<!Eqs)\. ", caption)[0]


def rows(table: pd.DataFrame, corner: str) -> Markup:
    """A table as HTML, three significant digits; `corner` says what the names of the rows are."""
    named = table.rename_axis(index=None, columns=corner)
    return Markup(named.to_html(float_format=lambda value: f"{value:.3g}", na_rep="", border=0))


def pairs(pictures: Mapping[str, np.ndarray], best: pd.DataFrame, labels: list[int]) -> list[dict[str, Any]]:
    """Every generated image that is shown with its nearest training image, its label and their SSIM.

    `best` has the best SSIM of every sample, classes one after another in equal shares.
    """
    similarity = best.loc[best["images"] == "generated", "ssim"].to_numpy()
    each, classes = len(pictures["generated"]) // len(labels), len(labels)
    places = [(label, math.ceil(k * len(similarity) / classes) + i) for k, label in enumerate(labels) for i in range(each)]
    return [
        {"generated": png(generated), "nearest": png(nearest), "text": f"class {label}, SSIM {similarity[place]:.2f}"}
        for (label, place), generated, nearest in zip(places, pictures["generated"], pictures["nearest"], strict=True)
    ]


def facts(params: Params, name: str, certificates: Mapping[str, Mapping[str, Any]], history: pd.DataFrame) -> dict[str, str]:
    """What a generator was born from: data, classifiers, Λ, oracle, and the margin that was found without data."""
    found, task = {}, params.train[name]
    for t, classifier in enumerate(task.classifiers):
        source, net, known = params.sample[classifier], params.pretrain[classifier], certificates[classifier]
        of = f" of {classifier}" if len(task.classifiers) > 1 else ""
        found[f"Data{of}"] = f"{source.source}, {source.per_class} of each of the classes {', '.join(map(str, source.classes))}"
        found[f"Classifier{of}"] = f"{net.architecture}, hidden widths {', '.join(map(str, net.hidden))}; log-loss {known['log_loss']:.4g}"
        found[f"Λ{of}"] = f"{max(known['lam'].values()):.3g} on {', '.join(group.removeprefix('layers.') for group in known['z1'])}"
        held_out = known["heldout_residual_all"]
        others = "" if held_out is None else f"; of images never seen {held_out:.3g}"
        found[f"Oracle residual{of}"] = f"{known['oracle_residual_all']:.3g} of the training images{others}"
        asked = math.exp(-history.loc[history["classifier"] == t].groupby("member")["alpha"].last().mean())
        smallest = known["smallest_margin"]
        found[f"Margin e^−α{of}"] = (
            f"{asked:.4g}, found without data; the classifier's smallest training margin is {smallest:.4g} ({asked / smallest - 1:+.1%})"
        )
    return found


def agreement(values: Mapping[str, Any]) -> pd.DataFrame:
    """The codes of a mixture that are drawn, those on which its members agree and others: their share, and how many are near a real image."""
    rows = {
        "agreed on": (values["agreed"], values["agreed_train_70"], values["agreed_control_70"]),
        "others": (1 - values["agreed"], values["others_train_70"], values["others_control_70"]),
    }
    columns = ["share", "near a training image", "near an image never seen"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype(float)


def failures(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for every generator that leaves something to be desired, in numbers."""
    lines = []
    for name, values in metrics.items():
        if "points_hit" in values:
            if (missed := values["points_active"] - values["points_hit"]) > 0:
                lines.append(f"{name} misses {missed} of {values['points_active']} training points.")
            continue
        mean = values["baselines"]["class_mean"]
        given = {SHARED[key]: (values[key], mean[key]) for key in ("train_control_auc", "leak_60")}
        if values["accuracy_on_generated"] < 0.9:
            lines.append(f"{name} does not make images of the classes asked for: its residual stays at {values['kkt_residual']:.2f}.")
        elif all(own < means + 0.05 for own, means in given.values()):
            scores = ", ".join(f"{score} {own:.2f} and {means:.2f}" for score, (own, means) in given.items())
            lines.append(f"{name} gives away no more than its class means do: {scores}.")
        else:
            lines.append(f"{name}: {1 - values['recall_50']:.0%} of the training images are not reproduced above SSIM 0.5.")
    return lines


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


def certify_table(certificates: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A classifier in every row: its groups, Λ, the scaling check and the oracle residuals."""
    table = {}
    for name, values in certificates.items():
        highest = max(values["lam"].values())
        where = "on " + ", ".join(group.removeprefix("layers.") for group in values["z1"])
        rest = {f"{value:.3g}" for group, value in values["lam"].items() if group not in values["z1"]}
        table[name] = {
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
    return pd.DataFrame.from_dict(table, orient="index")


def benchmarks_table(benchmarks: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Every number of every benchmark in a row."""
    table = []
    for name, results in benchmarks.items():
        flat = pd.json_normalize(dict(results)).iloc[0].drop(["threads", "torch"])
        table += [{"benchmark": name, "measured": key, "value": value} for key, value in flat.items() if isinstance(value, Number)]
    return pd.DataFrame(table).set_index("benchmark") if table else pd.DataFrame()


def place(name: str) -> int:
    """Where a generator stands in the page; those that it does not know come last."""
    return [*ABOUT, name].index(name)


def seed_means(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """How many seeds every variant has, means over them of the scores `names`, in the order of the file, and the deviation of the AUC."""
    table = table.dropna(axis="columns", how="all")
    kept = [key for key in names if key in table and key != "seconds"]
    means = pd.DataFrame({key: table.groupby("variant", sort=False)[key].mean() for key in kept})
    means.insert(0, "seeds", table.groupby("variant").size())
    if "train_control_auc" in kept:
        means.insert(list(means).index("train_control_auc") + 1, "±", table.groupby("variant")["train_control_auc"].std())
    return means.rename(columns=names)


def over_seeds(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """`seed_means` of a run with each of several seeds: the generators of images and those of points, where there are any."""
    table = table.sort_values("variant", key=lambda names: names.map(place), kind="stable")
    points = table.reindex(columns=["points_hit"])["points_hit"].notna()
    parts = {"images": (table.loc[~points], SCORES), "points": (table.loc[points], POINTS)}
    return {what: seed_means(part, names) for what, (part, names) in parts.items() if len(part)}


def of_kind(studies: Mapping[str, pd.DataFrame], kind: str) -> dict[str, pd.DataFrame]:
    """The studies <kind>_<name>, by name."""
    return {name.removeprefix(f"{kind}_"): table for name, table in studies.items() if name.startswith(f"{kind}_")}


def beside_pixels(seeds: pd.DataFrame, studies: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`seed_means` of every generator that has a study pixels_<name>, and below each that of the pixels, of the same seeds."""
    parts = []
    for name, pixels in sorted(of_kind(studies, "pixels").items(), key=lambda item: place(item[0])):
        same = (seeds["variant"] == name) & seeds["seed"].isin(pixels["seed"])
        parts += [seeds.loc[same], pixels.assign(variant=f"{name}: pixels")]
    return seed_means(pd.concat(parts), SCORES) if parts else pd.DataFrame()


def summary(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores of the generators of images, as a table in Markdown."""
    scores = {name: values for name, values in metrics.items() if "baselines" in values}
    return pd.DataFrame(scores).T.filter(list(SCORES)).astype(float).rename(columns=SCORES).to_markdown(floatfmt=".3g")


def beside(values: Mapping[str, Any]) -> pd.DataFrame:
    """A generator's scores and its baselines', one in every row."""
    table = pd.DataFrame({"generated": values, **values["baselines"]}).T.filter(list(SHARED)).astype(float)
    return table.rename(columns=SHARED, index=BASELINES)


def render(
    params: Params,
    metrics: Mapping[str, Mapping[str, Any]],
    certificates: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, pd.DataFrame],
    tables: Mapping[str, pd.DataFrame],
    pictures: Mapping[str, Mapping[str, np.ndarray]],
    figures: Mapping[str, bytes],
    benchmarks: Mapping[str, Mapping[str, Any]],
    studies: Mapping[str, pd.DataFrame],
) -> str:
    """The page. All mappings are by generator, classifier, figure or study."""
    metrics = {name: metrics[name] for name in sorted(metrics, key=place)}
    images = [name for name in metrics if "points_hit" not in metrics[name]]
    scores = pd.DataFrame({name: {key: value for key, value in values.items() if key != "baselines"} for name, values in metrics.items()}).T
    results = scores.loc[images].filter(list(SCORES)).rename(columns=SCORES)
    if images:
        means = [metrics[name]["baselines"]["class_mean"]["train_control_auc"] for name in images]
        results.insert(list(results).index("train/control AUC") + 1, "of class means", means)
    tasks = {}
    for name, values in metrics.items():
        labels = sorted({label for part in params.train[name].classifiers for label in params.sample[part].classes})
        tasks[name] = {
            "about": ABOUT.get(name, ""),
            "facts": facts(params, name, certificates, histories[name]),
            "pairs": pairs(pictures[name], tables[name], labels) if name in images else [],
            "figure": FIGURES.get(name) if FIGURES.get(name) in figures else None,
            "agreement": agreement(values) if "agreed" in values else None,
            "baselines": beside(values) if name in images else None,
        }
    headline = {}
    if "mnist" in images:
        best = metrics["mnist"]
        headline = {
            "of mnist's training images are reproduced above SSIM 0.5": f"{best['recall_50']:.0%}",
            "of images of the same classes that the classifier never saw are too": f"{best['recall_50'] - best['leak_50']:.0%}",
            "train/control AUC of mnist; 0.5 would give nothing away": f"{best['train_control_auc']:.2f}",
            "percentage points more of mnist's training images than of images never seen are reproduced above SSIM 0.6": f"{100 * best['leak_60']:.0f}",
        }
    seeds = studies.get("seeds")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"uri": data_uri, "rows": rows, "lead": lead}
    return environment.from_string(Path(__file__).with_name("page.html").read_text()).render(
        headline=headline,
        results=results,
        points=scores.drop(index=images).filter(list(POINTS)).rename(columns=POINTS),
        everything=scores.T,
        tasks=tasks,
        figures=figures,
        captions=CAPTIONS,
        certificates=certify_table(certificates),
        ablations={name: seed_means(table, SCORES) for name, table in of_kind(studies, "ablation").items()},
        seeds={} if seeds is None else over_seeds(seeds),
        rivals=pd.DataFrame() if seeds is None else beside_pixels(seeds, studies),
        fails=failures(metrics),
        benchmarks=benchmarks_table(benchmarks),
    )


if __name__ == "__main__":
    print(summary(load_json(Path("reports/metrics.json"))))
