"""Score one generator against its classifiers' images and baselines: python -m stages.evaluate mnist."""

from pathlib import Path

from gbc.params import Params, entry, run_stage


def main(params: Params, name: str) -> None:
    """data/generators/<name>/ and data/{samples,classifiers,oracles}/ of its classifiers → data/evaluations/<name>/."""
    from gbc.artifacts import load_json, load_network, load_table, load_tensors, save_json, save_table, save_tensors
    from gbc.classifier import Classifier
    from gbc.evaluation import evaluate, final_residual
    from gbc.generator import Mixture

    names = entry(params.train, name).classifiers
    oracles = [load_json(Path(f"data/oracles/{classifier}/oracle.json")) for classifier in names]
    metrics, table, pictures = evaluate(
        load_network(Path(f"data/generators/{name}"), Mixture),
        [load_network(Path(f"data/classifiers/{classifier}"), Classifier) for classifier in names],
        [load_tensors(Path(f"data/samples/{classifier}.safetensors")) for classifier in names],
        [oracle["active"] for oracle in oracles],
        params.evaluate.samples,
        params.seed,
    )
    history = load_table(Path(f"data/histories/{name}/history.csv"))
    metrics["kkt_residual"] = final_residual(history)
    metrics["oracle_residual"] = sum(oracle["everywhere"]["residual"] for oracle in oracles) / len(oracles)
    folder = Path(f"data/evaluations/{name}")
    save_json(folder / "metrics.json", metrics)
    save_table(folder / "best_ssim.csv", table)
    save_tensors(folder / "pictures.safetensors", pictures)


if __name__ == "__main__":
    run_stage(main)
