"""Vary the number of training images and the classifier's width, over three seeds: python -m stages.scale mnist."""

from pathlib import Path

from gbc.params import Params, entry, run_stage


def main(params: Params, name: str) -> None:
    """Datasets, classifiers and generators, all made anew → data/studies/scaling_<name>.csv; rows that are there are not made again."""
    from gbc.studies import alone, collect, scale

    collect(Path(f"data/studies/scaling_{name}.csv"), scale, params, alone(entry(params.train_single, name)), {})


if __name__ == "__main__":
    run_stage(main)
