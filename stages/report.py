"""Write reports/: metrics.json, the figures and index.html: python -m stages.report."""

from pathlib import Path

from gbc.params import Params, run_stage

DATA, REPORTS = Path("data"), Path("reports")


def main(params: Params) -> None:
    """data/{evaluations,histories,oracles,lambda,benchmarks,studies}/ → reports/."""
    from gbc.artifacts import load_json, load_table, load_tensors, save_json, write_bytes
    from gbc.figures import draw, save_figure
    from gbc.homogeneity import load_homogeneity
    from gbc.page import certificate, render

    metrics, pictures, tables, histories = {}, {}, {}, {}
    for name in params.train:
        folder, history = DATA / "evaluations" / name, DATA / "histories" / name
        metrics[name] = load_json(folder / "metrics.json") | {"seconds": load_json(history / "seconds.json")}
        tensors = load_tensors(folder / "pictures.safetensors") | load_tensors(history / "film.safetensors")
        pictures[name] = {key: value.numpy() for key, value in tensors.items()}
        tables[name], histories[name] = load_table(folder / "best_ssim.csv"), load_table(history / "history.csv")
    oracles = {name: load_json(DATA / "oracles" / name / "oracle.json") for name in params.pretrain}
    lambdas = {name: load_homogeneity(DATA / "lambda" / name / "lambda.json") for name in params.pretrain}
    scalings = {name: load_table(DATA / "lambda" / name / "scaling.csv") for name in params.pretrain}
    descents = {name: load_table(DATA / "oracles" / name / "curve.csv") for name in params.pretrain}
    classes = {name: len({y for part in task.classifiers for y in params.sample[part].classes}) for name, task in params.train.items()}
    certificates = {name: certificate(params.pretrain[name].architecture, lambdas[name], oracles[name]) for name in params.pretrain}
    save_json(REPORTS / "metrics.json", metrics | {"certify": certificates})
    benchmarks = {path.stem: load_json(path) for path in sorted((DATA / "benchmarks").glob("*.json"))}
    studies = {path.stem: load_table(path) for path in sorted((DATA / "studies").glob("*.csv"))}
    drawn = draw(metrics, pictures, tables, histories, lambdas, scalings, descents, classes, studies).items()
    pngs = {name: save_figure(REPORTS / "figures" / f"{name}.png", figure) for name, figure in drawn}
    page = render(params, metrics, certificates, histories, tables, pictures, pngs, benchmarks, studies)
    write_bytes(REPORTS / "index.html", page.encode())


if __name__ == "__main__":
    run_stage(main)
