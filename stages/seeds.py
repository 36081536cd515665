"""Add the scores of the whole pipeline with another seed, a git revision or a DVC experiment, to a table: python -m stages.seeds seed-1."""

from pathlib import Path

from gbc.params import Params, run_stage


def main(params: Params, revision: str) -> None:
    """reports/metrics.json and params.yaml of <revision> → data/studies/seeds.csv; a row for every generator, in place of that seed's."""
    import dvc.api
    import pandas as pd
    from dvc.exceptions import DvcException

    from gbc.artifacts import load_table, save_table
    from gbc.params import InputError

    path = Path("data/studies/seeds.csv")
    try:
        here, there = dvc.api.params_show("params.yaml"), dvc.api.params_show("params.yaml", rev=revision)
        metrics = dvc.api.metrics_show("reports/metrics.json", rev=revision)
    except DvcException as error:
        raise InputError(f"{revision}: {error}") from error
    seed = there["seed"]
    if changed := [key for key in here if here[key] != there.get(key) and key not in ("seed", "launch", "device")]:
        raise InputError(f"{revision} differs from params.yaml in {changed[0]}, not only in its seed")
    del metrics["certify"]
    rows = [{"variant": name, "seed": seed} | {k: v for k, v in scores.items() if k != "baselines"} for name, scores in metrics.items()]
    known = load_table(path) if path.is_file() else pd.DataFrame({"seed": []})
    save_table(path, pd.concat([known.loc[known["seed"] != seed], pd.DataFrame(rows)]))


if __name__ == "__main__":
    run_stage(main)
