"""A step's residual and gradient in chunks: time and memory against the size of the bank and the width of layer 1; and two processes."""

import os
import subprocess
import sys
from collections.abc import Callable

import torch

from gbc.step import chunked_stationarity
from tests.benchmarks import interleaved, peak_bytes, random_network, show

CHUNK, BANKS, WIDTHS, STEPS = 1000, (100, 1000, 5000, 10_000), (500, 2000, 8000), 60


def banked(width: int, bank: int) -> Callable[[], None]:
    """One step on random images for a 784-width-100-10 network."""
    network, _ = random_network("homogeneous", (width, 100))
    network.set_gate(50.0)
    goal = [p.detach() for p in network.parameters()]
    x, mu = torch.rand(bank, 28, 28).requires_grad_(), torch.rand(bank, 10).requires_grad_()
    own = torch.arange(bank) % 10

    def run() -> None:
        x.grad = mu.grad = None
        chunked_stationarity(network, goal, x, own, mu, CHUNK).backward(inputs=[x, mu])

    return run


def ranks(count: int) -> float:
    """Seconds that `STEPS` steps of training take `count` processes of 2 / count threads."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launch, "-m", "tests.benchmarks.ranks", str(STEPS)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(2 // count)}, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the result."""
    steps = {bank: banked(3000, bank) for bank in BANKS}
    seconds = interleaved({str(bank): step for bank, step in steps.items()}, 5)
    peaks = {bank: peak_bytes(steps[bank]) for bank in (CHUNK, 10_000)}
    wide = interleaved({str(width): banked(width, 1000) for width in WIDTHS}, 3)
    turns = [(ranks(1), ranks(2)) for _ in range(3)]
    show(
        {
            "memory_ratio_10k": peaks[10_000] / peaks[CHUNK],
            "time_slope": seconds["10000"] / seconds["1000"] / 10,
            "rank2_ratio": sorted(two / one for one, two in turns)[1],
            "seconds_by_bank": seconds,
            "seconds_by_width": wide,
        }
    )


if __name__ == "__main__":
    main()
