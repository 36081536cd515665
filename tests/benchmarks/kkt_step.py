"""One step's stationarity and its gradient with respect to images and multipliers: ours, autograd's, and a gradient per sample.

Autograd's double backward comes in two forms: as published codes have it, where the backward pass goes on into the classifier's
weights, and the best eager one, which stops at the images and multipliers. The share of the machine's matrix-product speed counts
the products that the chosen form needs, two operations for each multiplication. Homogeneous: 784-3000-100-10 and 600 samples;
batch_norm: the committed `mnist`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gbc.closed_form import step_of
from gbc.kkt import stationarity, target
from gbc.params import load_params
from gbc.step import DoubleBackward, Step
from tests.benchmarks import interleaved, peak_bytes, random_network, show

ROUNDS, VMAP_SAMPLES, SQUARE = 15, 20, 2048


def products(widths: list[int], samples: int) -> int:
    """Multiplications of one closed-form step.

    For every layer those of the way forward and back, of δ and its adjoint, and of ‖δᵀa‖² by the cheaper way.
    """
    count = 0
    for layer, (fan_in, out) in enumerate(zip(widths, widths[1:], strict=False)):
        count += samples * fan_in * out * (4 if layer else 2)
        count += min(2 * samples**2 * (fan_in + out), 3 * samples * fan_in * out)
    return count


def measure(architecture: str, hidden: list[int], samples: int) -> dict[str, float]:
    """The keys of the contract for one classifier and number of samples."""
    rng = torch.Generator().manual_seed(0)
    (network, homogeneity), (twin, _), (single, _) = (random_network(architecture, hidden) for _ in range(3))
    x = torch.rand(samples, 28, 28, generator=rng).requires_grad_()
    mu = torch.rand(samples, 10, generator=rng).requires_grad_()
    own = torch.randint(10, (samples,), generator=rng)
    ours, eager = step_of(network, homogeneity, 50.0), DoubleBackward(twin, homogeneity, 50.0)

    def one(step: Step, inputs: list[Tensor] | None = None) -> Callable[[], None]:
        def run() -> None:
            x.grad = mu.grad = None
            step.logits(x)
            step.stationarity(own, mu).backward(inputs=inputs)
            eager.network.zero_grad()

        return run

    single.eval().set_gate(50.0)
    names, zeta = zip(*single.named_parameters(), strict=True)
    buffers = dict(single.named_buffers())
    goal = list(target(single, homogeneity).values())

    def per_sample() -> None:
        few, push, labels = x[:VMAP_SAMPLES].detach().requires_grad_(), mu[:VMAP_SAMPLES].detach().requires_grad_(), own[:VMAP_SAMPLES]

        def margin(parameters: tuple[Tensor, ...], image: Tensor, label: Tensor, weight: Tensor) -> Tensor:
            state = dict(zip(names, parameters, strict=True)) | buffers
            logits = torch.func.functional_call(single, state, (image[None],))
            return (weight * (logits.gather(1, label[None, None]) - logits)[0]).sum()

        gradients = torch.func.vmap(torch.func.grad(margin), (None, 0, 0, 0))(zeta, few, labels, push)
        stationarity(goal, [gradient.sum(0) for gradient in gradients]).backward(inputs=[few, push])

    left, right = (torch.rand(SQUARE, SQUARE) for _ in range(2))
    functions: dict[str, Callable[[], object]] = {
        "ours": one(ours, [x, mu]),
        "published": one(eager),
        "eager": one(eager, [x, mu]),
        "square": lambda: left @ right,
    }
    seconds = interleaved(functions, ROUNDS)
    vmap = interleaved({"vmap": per_sample}, 3)["vmap"] / VMAP_SAMPLES * samples if architecture == "homogeneous" else None
    peak = {name: peak_bytes(functions[name]) for name in ("ours", "published")}
    speed = SQUARE**3 / seconds["square"]
    result = {
        "speedup_published": seconds["published"] / seconds["ours"],
        "speedup_eager": seconds["eager"] / seconds["ours"],
        "matmul_share": products([784, *hidden, 10], samples) / speed / seconds["ours"],
        "memory_ratio": peak["ours"] / peak["published"],
        "gflop_per_second": 2 * speed / 1e9,
        "seconds": seconds["ours"],
    }
    return result | ({"speedup_vmap": vmap / seconds["ours"]} if vmap else {})


if __name__ == "__main__":
    params = load_params([])
    mnist = measure("batchnorm", params.pretrain["mnist"].hidden, params.train["mnist"].batch)
    show(measure("homogeneous", [3000, 100], 600) | {"batch_norm": mnist})
