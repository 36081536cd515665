"""Sums over the processes of a torchrun, which share one batch between them; alone, everything here does nothing."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm


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
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


class _Total(torch.autograd.Function):
    """Sum over processes; every process's loss is the whole loss, so a gradient comes back once from each."""

    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> Tensor:
        return _Total.apply(*grad_outputs)


def total(part: Tensor) -> Tensor:
    """Sum of `part` over all processes, differentiable (the mean of the processes' gradients is the gradient)."""
    return part if ranks() == 1 else _Total.apply(part)


def mean(part: Tensor) -> Tensor:
    """Mean over the samples, the first dimension, of all processes; each has as many."""
    return total(part.sum(0)) / (len(part) * ranks())


def moments(samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over the samples, the first dimension, of all processes, and this process's samples less the mean."""
    average = mean(samples)
    centred = samples - average
    return average, mean(centred.square()), centred


def share(whole: Tensor) -> Tensor:
    """This process's samples of a batch that every process has drawn."""
    return whole[rank() :: ranks()]


def gather(part: Tensor) -> Tensor:
    """The samples of all processes, one process's after another's; not differentiable. Each has as many."""
    if ranks() == 1:
        return part
    whole = part.new_empty(len(part) * ranks(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous())
    return whole


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, (flat / ranks()).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class _Shared(_BatchNorm):
    """Batch normalisation whose batch is that of all processes; `SyncBatchNorm` has no CPU version."""

    def forward(self, input: Tensor) -> Tensor:
        if ranks() == 1 or not self.training:
            return super().forward(input)
        channels_last = input.movedim(1, -1)
        average, variance, centred = moments(channels_last.flatten(0, -2))
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            count = len(centred) * ranks()
            self.running_mean.lerp_(average.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        normal = centred * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias, normal, self.weight).view_as(channels_last).movedim(-1, 1)


class BatchNorm1d(_Shared, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the batch of all processes."""


class BatchNorm2d(_Shared, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over the batch of all processes."""
