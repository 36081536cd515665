"""Two processes that share a batch do what one does alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gbc.artifacts import load_tensors

ROOT = Path(__file__).resolve().parent.parent


def trained(ranks: int, architecture: str, steps: int, path: Path) -> dict[str, torch.Tensor]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "tests.ranks", architecture, str(steps), str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_tensors(path)


@pytest.mark.parametrize(
    ("architecture", "steps", "tolerance"),
    [("homogeneous", 1, 1e-10), ("residual", 1, 1e-10), ("convolutional", 1, 1e-10), ("batchnorm", 1, 1e-10), ("batchnorm", 200, 1e-6)],
)
def test_two_ranks_train_as_one(architecture: str, steps: int, tolerance: float, tmp_path: Path):
    alone = trained(1, architecture, steps, tmp_path / "alone.safetensors")
    shared = trained(2, architecture, steps, tmp_path / "shared.safetensors")
    assert alone["curve"].shape == (2 * min(steps, 200), 8)
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=tolerance, atol=tolerance)
