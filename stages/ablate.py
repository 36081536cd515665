"""Switch every term of a generator's loss off in turn, over three seeds: python -m stages.ablate mnist_10."""

from pathlib import Path

from gbc.params import Params, entry, run_stage

SEEDS = 3


def main(params: Params, name: str) -> None:
    """Datasets, classifiers and generators, all made anew → data/studies/ablation_<name>.csv; rows that are there are not made again."""
    import pandas as pd

    from gbc.ablation import ablate
    from gbc.artifacts import load_table, save_table

    entry(params.train_single, name)
    path = Path(f"data/studies/ablation_{name}.csv")
    rows = load_table(path).to_dict("records") if path.is_file() else []
    for seed in range(params.seed, params.seed + SEEDS):
        for row in ablate(params, name, seed, {row["variant"] for row in rows if row["seed"] == seed}):
            rows.append(row)
            save_table(path, pd.DataFrame(rows))


if __name__ == "__main__":
    run_stage(main)
