"""Draw one dataset's training, control and reference images: python -m stages.sample mnist."""

from pathlib import Path

from gbc.params import Params, entry, run_stage


def main(params: Params, name: str) -> None:
    """params.yaml → data/samples/<name>.safetensors."""
    from gbc.artifacts import save_tensors
    from gbc.datasets import sample

    save_tensors(Path(f"data/samples/{name}.safetensors"), sample(entry(params.sample, name), params.seed))


if __name__ == "__main__":
    run_stage(main)
