"""Train one generator on the weights of several classifiers (Eq. 12): python -m stages.train_multi mnist_pair."""

from gbc.params import Params, entry, run_stage


def main(params: Params, name: str) -> None:
    """data/classifiers/ and data/lambda/ of its classifiers → data/generators/<name>/ and data/histories/<name>/."""
    from gbc.training import train_and_save

    train_and_save(params, entry(params.train_multi, name), name)


if __name__ == "__main__":
    run_stage(main)
