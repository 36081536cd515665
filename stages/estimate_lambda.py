"""Estimate one classifier's Λ from its weights: python -m stages.estimate_lambda mnist."""

from pathlib import Path

from gbc.params import Params, run_stage


def main(params: Params, name: str) -> None:
    """data/classifiers/<name>/ → data/lambda/<name>/."""
    import torch

    from gbc.artifacts import load_network, save_json, save_table
    from gbc.classifier import Classifier
    from gbc.homogeneity import estimate, scaling_table

    classifier = load_network(Path(f"data/classifiers/{name}"), Classifier)
    shape = classifier.input_shape
    homogeneity = estimate(classifier, shape, params.estimate_lambda, torch.Generator().manual_seed(params.seed))
    save_json(Path(f"data/lambda/{name}/lambda.json"), vars(homogeneity))
    save_table(Path(f"data/lambda/{name}/scaling.csv"), scaling_table(classifier, shape, homogeneity))


if __name__ == "__main__":
    run_stage(main)
