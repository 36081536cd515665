"""Free images in the place of a generator, over three seeds: python -m stages.pixels faces."""

from pathlib import Path

from gbc.params import Params, entry, run_stage


def main(params: Params, name: str) -> None:
    """Datasets and classifiers, all made anew, and pixels under the same loss → data/studies/pixels_<name>.csv.

    As many draws as the generator has members, in about as many seconds. Rows that are there are not made again.
    """
    from gbc.studies import collect, rival
    from gbc.training import FIT_STEPS, PIXEL_RATE

    constants = {"pixel_rate": PIXEL_RATE, "fit_steps": FIT_STEPS}
    collect(Path(f"data/studies/pixels_{name}.csv"), rival, params, entry(params.train, name), constants)


if __name__ == "__main__":
    run_stage(main)
