"""Two processes that share a batch do what one does alone, and several give one another their tensors."""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from gbc import distributed
from gbc.artifacts import load_tensors

ROOT = Path(__file__).resolve().parent.parent


TOLERANCES = {
    "homogeneous-40": 1e-10,
    "biased-40": 1e-10,  # by outer products in every layer
    "residual-40": 1e-10,
    "convolutional-40": 1e-10,
    "batchnorm-1": 1e-10,
    "batchnorm-200": 1e-6,
    "batchnorm-40-polished": 1e-6,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of processes, the folder of what they trained; each run starts once, for most of its time goes into imports."""
    folders = {}
    for ranks, launch in {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}.items():
        folders[ranks] = tmp_path_factory.mktemp("ranks")
        command = [sys.executable, *launch, "-m", "tests.ranks", str(folders[ranks]), *TOLERANCES]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("name", TOLERANCES)
def test_two_ranks_train_as_one(trained: dict[int, Path], name: str):
    alone, shared = (load_tensors(trained[ranks] / f"{name}.safetensors") for ranks in (1, 2))
    steps = int(name.split("-")[1])
    rows = 2 * steps + 1 if name.endswith("polished") else steps
    assert alone["curve"].shape == (2 * rows, 8)
    if steps > 1:  # at first Σ μ ∇m may point away from Λ̄ζ; the residual is then 1 and has no slope
        assert (alone["curve"].unflatten(0, (rows, 2))[..., 3] < 1).double().mean(0).min() > 0.5
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=TOLERANCES[name], atol=TOLERANCES[name])


def exchange(rank: int, port: int):
    """What a process started by torchrun on one machine does in `test_everyone_gets_everyones_tensors`."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    kinds = torch.float64, torch.float32, torch.bfloat16, torch.int64
    with distributed.processes(torch.device("cpu")):
        for turn in range(400):
            rows = random.Random(turn).choice([0, 1, 7, 500, 2**18, 2**18 + 1])  # of 16 bytes; the last does not fit
            parts = [torch.arange(rows * 2).view(rows, 2).add(turn + 1000 * one).to(kinds[turn % 4]) for one in range(3)]
            time.sleep(random.Random(f"{rank} {turn}").choice([0, 0, 0, 1e-3]))
            assert torch.equal(distributed.gather(parts[rank]), torch.cat(parts)), (turn, rows)
            torch.testing.assert_close(distributed.total(parts[rank]), torch.stack(parts).sum(0))


def test_everyone_gets_everyones_tensors():
    assert distributed.WINDOW == 2**18 * 16
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    spawn(exchange, (port,), nprocs=3)
