"""Train one classifier into the maximum-margin regime: python -m stages.pretrain mnist."""

from pathlib import Path

from gbc.params import Params, device, entry, run_stage


def main(params: Params, name: str) -> None:
    """data/samples/<name>.safetensors → data/classifiers/<name>/ and data/oracles/<name>/."""
    from gbc.artifacts import load_tensors, save_json, save_network, save_table
    from gbc.pretraining import pretrain

    task = entry(params.pretrain, name)
    data = load_tensors(Path(f"data/samples/{name}.safetensors"))
    classifier, curve, oracle = pretrain(task, data, params.seed, device(params))
    save_network(Path(f"data/classifiers/{name}"), classifier)
    save_table(Path(f"data/oracles/{name}/curve.csv"), curve)
    save_json(Path(f"data/oracles/{name}/oracle.json"), oracle)


if __name__ == "__main__":
    run_stage(main)
