"""Vary the number of training images and the classifier's width, over three seeds: python -m stages.scale mnist."""

from pathlib import Path

from gbc.params import Params, run_stage


def main(params: Params, name: str) -> None:
    """Datasets, classifiers and generators, all made anew → data/studies/scaling_<name>.csv; rows that are there are not made again."""
    from gbc.studies import collect, scale

    collect(Path(f"data/studies/scaling_{name}.csv"), scale, params, name)


if __name__ == "__main__":
    run_stage(main)
