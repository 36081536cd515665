"""Switch the terms of a generator's loss off in turn, over three seeds: python -m stages.ablate faces."""

from pathlib import Path

from gbc.params import Params, entry, run_stage


def main(params: Params, name: str) -> None:
    """Datasets, classifiers and generators, all made anew → data/studies/ablation_<name>.csv; rows that are there are not made again."""
    from gbc.studies import ablate, alone, collect
    from gbc.training import PIXEL_RATE

    path = Path(f"data/studies/ablation_{name}.csv")
    collect(path, ablate, params, alone(entry(params.train, name)), {"pixel_rate": PIXEL_RATE})


if __name__ == "__main__":
    run_stage(main)
