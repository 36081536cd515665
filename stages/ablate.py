"""Switch every term of a generator's loss off in turn, over three seeds: python -m stages.ablate mnist_10."""

from pathlib import Path

from gbc.params import InputError, Params, entry, run_stage

SEEDS = 3


def main(params: Params, name: str) -> None:
    """Datasets, classifiers and generators, all made anew → data/studies/ablation_<name>.csv; rows that are there are not made again."""
    import pandas as pd

    from gbc.ablation import ablate
    from gbc.artifacts import load_table, save_table

    task = entry(params.train_single, name)
    path = Path(f"data/studies/ablation_{name}.csv")
    rows = load_table(path).to_dict("records") if path.is_file() else []
    if any(row["variant"] == "all terms" and row["steps"] != max(1, round(params.steps * task.length)) for row in rows):
        raise InputError(f"{path} has trainings of another length; delete it, or set steps as they were")
    for seed in range(params.seed, params.seed + SEEDS):
        for row in ablate(params, name, seed, {row["variant"] for row in rows if row["seed"] == seed}):
            rows.append(row)
            save_table(path, pd.DataFrame(rows))


if __name__ == "__main__":
    run_stage(main)
