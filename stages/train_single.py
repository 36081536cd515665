"""Train one generator on the weights of one classifier: python -m stages.train_single mnist."""

from pathlib import Path

from gbc.artifacts import save_json, save_table
from gbc.classifier import load_classifier
from gbc.generator import save_generator
from gbc.homogeneity import load_homogeneity
from gbc.params import Params, device, entry, run_stage
from gbc.training import train


def main(params: Params, name: str) -> None:
    """data/classifiers/ and data/lambda/ of its classifier → data/generators/<name>/ and data/histories/<name>/."""
    task = entry(params.train_single, name)
    classifiers = [load_classifier(Path(f"data/classifiers/{classifier}")) for classifier in task.classifiers]
    homogeneities = [load_homogeneity(Path(f"data/lambda/{classifier}/lambda.json")) for classifier in task.classifiers]
    generator, history, seconds = train(params, task, classifiers, homogeneities, device(params))
    save_generator(Path(f"data/generators/{name}"), generator)
    save_table(Path(f"data/histories/{name}/history.csv"), history)
    save_json(Path(f"data/histories/{name}/seconds.json"), round(seconds, 1))


if __name__ == "__main__":
    run_stage(main)
