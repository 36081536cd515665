"""Add the scores of a run with another seed to a table: python -m stages.seeds <git revision or DVC experiment>."""

from pathlib import Path

from gbc.params import InputError, Params, load_params, run_stage


def main(params: Params, revision: str) -> None:
    """reports/metrics.json of <revision> → data/studies/seeds.csv: a row for every generator, in place of the one of its seed."""
    from gbc.studies import add_run

    if params != load_params([]):
        raise InputError("seeds.csv is for the parameters of params.yaml and dvc.lock; change them there, not here")
    print(f"{revision}: {', '.join(add_run(Path('data/studies/seeds.csv'), revision))}")


if __name__ == "__main__":
    run_stage(main)
