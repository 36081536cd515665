"""Sums over the processes of a torchrun, which share one batch between them; alone, everything here does nothing."""

import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gbc.params import InputError

SMALL = 2**16  # numbers from all processes together; a sum of so few takes half the time if every process gathers and adds them
WINDOW = 2**22  # bytes that a process can show the others of its machine at a time
LINE = 64  # bytes of a processor's cache line


def ranks() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes, if torchrun started this one, and leave them at the end; yields the device of this process."""
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        if (number := int(os.environ["LOCAL_RANK"])) >= (count := torch.cuda.device_count()):
            raise InputError(
                f"process {number} of torchrun, counted from 0, has no GPU: here are {count}; start as many, or set device=cpu"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with _open_windows(device):
            yield device
    finally:
        dist.destroy_process_group()


class _Windows:
    """Memory that the processes of one machine share: each shows the others a tensor, and looks, awake, until all have shown theirs.

    gloo's processes sleep until a message comes, and take half a millisecond or more to wake; a step has twenty messages, most of some
    hundred numbers. The count that announces a tensor is seen after the tensor, for x86 keeps the order of writes.
    """

    def __init__(self, path: str):
        count = ranks()
        memory = torch.from_file(path, shared=True, size=count * (LINE + 2 * WINDOW), dtype=torch.uint8)
        counts, windows = memory.split([count * LINE, 2 * count * WINDOW])
        self.shown = counts.view(torch.int64).numpy().data[:: LINE // 8]  # how often, by each
        self.sides = windows.view(2, count, WINDOW)  # in turn: when a side is written anew, all have read it
        self.turn = 0

    def gather(self, part: Tensor) -> Tensor:
        """The samples of all processes, one process's after another's, of at most `WINDOW` bytes each."""
        self.turn += 1
        raw, side = part.flatten().view(torch.uint8), self.sides[self.turn % 2]
        side[rank(), : len(raw)] = raw
        self.shown[rank()] = self.turn
        while min(self.shown) < self.turn:
            os.sched_yield()
        everyone = torch.cat(side[:, : len(raw)].unbind()).view(part.dtype)
        return everyone.view(len(part) * ranks(), *part.shape[1:])


_windows: _Windows | None = None


@contextmanager
def _open_windows(device: torch.device) -> Iterator[None]:
    """Windows between the processes, if all are on the x86 processors of one machine."""
    global _windows
    near = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks())  # this machine has all of them
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64") or not near:
        yield
        return
    with tempfile.NamedTemporaryFile(prefix="gbc-") as file:
        path = [file.name]
        dist.broadcast_object_list(path)
        _windows = _Windows(path[0])
        dist.barrier()  # before rank 0's file, which is everyone's, loses its name
    try:
        yield
    finally:
        _windows = None


def _add(part: Tensor) -> Tensor:
    """Sum over the processes."""
    if part.numel() * ranks() <= SMALL or (_windows and part.nbytes <= WINDOW):
        return gather(part[None]).sum(0)
    whole = part.clone()
    dist.all_reduce(whole)
    return whole


class _Total(torch.autograd.Function):
    """Sum over processes. Every process's loss is the whole loss, so its slope is the sum of all processes' slopes.

    Where these are `alike`, it is one of them times their number, and nothing is sent.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, alike: bool) -> Tensor:
        ctx.alike = alike
        return _add(part)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return slope * ranks() if ctx.alike else total(slope), None


def total(part: Tensor) -> Tensor:
    """Sum of `part` over all processes, differentiable (the mean of the processes' gradients is the gradient)."""
    return part if ranks() == 1 else _Total.apply(part, False)


def loss_totals(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sum of every part over all processes, in one message, differentiable as `total` is.

    Only for sums of which every process makes the same, without its own samples, as for a term of the loss: then all slopes are equal.
    """
    if ranks() == 1:
        return parts
    whole = _Total.apply(torch.cat([part.flatten() for part in parts]), True)
    return [flat.view_as(part) for flat, part in zip(whole.split([part.numel() for part in parts]), parts, strict=True)]


def mean(part: Tensor) -> Tensor:
    """Mean over the samples, the first dimension, of all processes; each has as many."""
    return total(part.sum(0)) / (len(part) * ranks())


def share(whole: Tensor) -> Tensor:
    """This process's samples of a batch that every process has drawn."""
    return whole[rank() :: ranks()].contiguous()


def gather(part: Tensor) -> Tensor:
    """The samples of all processes, one process's after another's; not differentiable. Each has as many."""
    if ranks() == 1:
        return part
    if _windows and part.nbytes <= WINDOW:
        return _windows.gather(part)
    whole = part.new_empty(len(part) * ranks(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous())
    return whole


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over the processes, in one message; not differentiable."""
    if ranks() == 1 or not tensors:
        return
    flat = _add(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    add_up(gradients)
    for gradient in gradients:
        gradient.div_(ranks())


class _Normalise(torch.autograd.Function):
    """`normalise`, in one message each way, and differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        samples, wide = [0, *range(2, z.ndim)], (-1, *[1] * (z.ndim - 2))
        average = z.mean(samples)
        centred = z - average.view(wide)
        variance = centred.square().mean(samples)
        if ranks() > 1:
            averages, variances = gather(torch.stack([average, variance])[None]).unbind(1)
            centred.add_((average - averages.mean(0)).view(wide))
            average = averages.mean(0)
            variance = (variances + (averages - average).square()).mean(0)
        scale = (variance + eps).rsqrt()
        normal = centred.mul_(scale.view(wide))
        ctx.save_for_backward(normal, scale)
        return normal, scale, average, variance

    @staticmethod
    def backward(ctx: Any, normal_slope: Tensor, scale_slope: Tensor, average_slope: Tensor, variance_slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        normal, scale = ctx.saved_tensors
        samples, wide = [0, *range(2, normal.ndim)], (-1, *[1] * (normal.ndim - 2))
        count = normal.numel() / len(scale) * ranks()
        shift = average_slope - scale * normal_slope.sum(samples)
        stretch = 2 * variance_slope / scale - scale**2 * scale_slope - scale * (normal_slope * normal).sum(samples)
        shift, stretch = total(torch.stack([shift, stretch])) / count
        return torch.addcmul(shift.view(wide), normal_slope, scale.view(wide)) + normal * stretch.view(wide), None


def normalise(
    z: Float[Tensor, "samples channels *sides"], eps: float
) -> tuple[Float[Tensor, "samples channels *sides"], Float[Tensor, " channels"], Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """What batch normalisation makes of z before its weight and bias, and the inverse deviation, mean and biased variance of each channel.

    Over the samples of all processes.
    """
    return _Normalise.apply(z, eps)


class _Shared(_BatchNorm):
    """Batch normalisation whose batch is that of all processes; `SyncBatchNorm` has no CPU version."""

    def forward(self, input: Tensor) -> Tensor:
        if ranks() == 1 or not self.training:
            return super().forward(input)
        normal, _, average, variance = normalise(input, self.eps)
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            count = input.numel() // len(average) * ranks()
            self.running_mean.lerp_(average.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        wide = (-1, *[1] * (input.ndim - 2))
        return torch.addcmul(self.bias.view(wide), normal, self.weight.view(wide))


class BatchNorm1d(_Shared, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the batch of all processes."""


class BatchNorm2d(_Shared, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over the batch of all processes."""
