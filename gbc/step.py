"""The step that training repeats: Eq. 5's residual of a batch, differentiable in the images and the multipliers.

Here for any network, differentiated twice; `closed_form` has the fully connected ones. `kkt` holds the plain form of both.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from gbc.classifier import Classifier, SmoothGateReLU
from gbc.distributed import loss_totals, mean, normalise, total
from gbc.homogeneity import Homogeneity
from gbc.kkt import inner, margin_gradient, stationarity, target

TINY_SPREAD = 1e-6  # of a class's features; keeps the root's derivative finite at its mean


class Step(ABC):
    """One classifier as the generator's loss sees it: fixed weights, Λ̄ζ, and the statistics that batch normalisation keeps.

    `logits` looks at a batch; `stationarity`, `statistics_mismatch` and `collapse` speak of the batch that it last saw. Under torchrun
    that is the batch of all processes together. The last two are extensions of the paper.
    """

    def __init__(self, network: Classifier, homogeneity: Homogeneity, gate: float | None):
        self.network = network.freeze().set_gate(gate)
        self.labels = torch.tensor(network.labels, device=next(network.parameters()).device)
        self.goal = target(network, homogeneity)
        self.moments: list[tuple[_BatchNorm, Tensor, Tensor, int]] = []  # each with its input's mean, variance and places in an image
        self.features: Tensor  # [batch, ...], what enters the last ReLU

    @abstractmethod
    def logits(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        """Φ(x), remembering what enters every batch normalisation and the last ReLU."""

    @abstractmethod
    def stationarity(self, own: Int[Tensor, " batch"], mu: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
        """Relative residual of Eq. 5 for samples of class index `own` with multipliers `mu`, differentiable in the samples and in `mu`."""

    def statistics_mismatch(self, images: int) -> Float[Tensor, ""]:
        """Mean squared difference of the batch's mean and deviation from the running ones, in running deviations; summed over layers.

        The running statistics are those of the training batch, and part of the weights file. Their variance is the unbiased one, n/(n − 1)
        times the mean square, where n counts the training `images`, or the places of all in their feature maps. For a batch of another
        size than theirs it has to be said: of 9 points it is an eighth.
        """
        mismatch = torch.zeros((), dtype=next(self.network.parameters()).dtype, device=self.labels.device)
        for module, average, variance, places in self.moments:
            count = images * places
            variance = variance * count / (count - 1)
            assert module.running_mean is not None
            assert module.running_var is not None
            known = module.running_var.clamp_min(module.eps)  # an input that is constant has none
            shift = (average - module.running_mean).square() / known
            stretch = ((variance / known).clamp_min(1e-8).sqrt() - (module.running_var / known).sqrt()).square()
            mismatch = mismatch + shift.mean() + stretch.mean()
        return mismatch

    def collapse(self, own: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Mean distance of a sample's features from their class's mean, by the root mean square distance from the mean of all.

        Features are what enters the last ReLU. Deep in training they collapse: one point for all training images of
        a class (Papyan et al. 2020), but not for other images of it.
        """
        features = self.features.flatten(1)
        member = nn.functional.one_hot(own, len(self.labels)).to(features)
        sums, sizes = total(torch.cat([member.T @ features, member.sum(0)[:, None]], 1)).split([features.shape[1], 1], 1)
        means, shares = sums / sizes.clamp_min(1), sizes / sizes.sum()
        between = (shares * (means - (shares * means).sum(0)).square()).sum()
        within = (features - means[own]).square().sum(1)
        spread = within / (mean(within) + between)
        return mean((spread + TINY_SPREAD).sqrt())


class DoubleBackward(Step):
    """For any classifier: autograd's gradient of the margins, differentiated again."""

    def __init__(self, network: Classifier, homogeneity: Homogeneity, gate: float | None):
        super().__init__(network, homogeneity, gate)
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(self._remember)
            if isinstance(module, SmoothGateReLU):
                module.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        (self.features,) = arguments

    def _remember(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(module, _BatchNorm)
        (z,) = arguments
        _, _, average, variance = normalise(z, module.eps)
        self.moments.append((module, average, variance, z[0, 0].numel()))

    def logits(self, x: Tensor) -> Tensor:
        """Φ(x)."""
        self.moments.clear()
        self.features = x
        self.last = self.network(x)
        return self.last

    def stationarity(self, own: Tensor, mu: Tensor) -> Tensor:
        """By `margin_gradient`."""
        gradient = margin_gradient(self.last, own, mu, list(self.network.parameters()), create_graph=True)
        return stationarity(list(self.goal.values()), loss_totals(gradient))


class _Chunked(torch.autograd.Function):
    """Two passes over the bank: Σ μ ∇m without a graph, then each chunk's share of the residual's gradient along it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mu: Tensor, own: Tensor, network: nn.Module, goal: list[Tensor], chunk: int) -> Tensor:
        zeta = list(network.parameters())
        gradient = [torch.zeros_like(part) for part in goal]
        for part, labels, push in zip(x.split(chunk), own.split(chunk), mu.split(chunk), strict=True):
            with torch.enable_grad():
                pieces = margin_gradient(network(part), labels, push, zeta)
            for whole, piece in zip(gradient, pieces, strict=True):
                whole.add_(piece)
        with torch.enable_grad():
            leaves = [part.requires_grad_() for part in gradient]
            residual = stationarity(goal, leaves)
            ctx.along = torch.autograd.grad(residual, leaves)
        ctx.save_for_backward(x, mu, own)
        ctx.network, ctx.chunk = network, chunk
        return residual.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mu, own = ctx.saved_tensors
        slopes = torch.empty_like(x), torch.empty_like(mu)
        zeta = list(ctx.network.parameters())
        chunks = zip(x.split(ctx.chunk), own.split(ctx.chunk), mu.split(ctx.chunk), *(s.split(ctx.chunk) for s in slopes), strict=True)
        for part, labels, push, part_slope, push_slope in chunks:
            with torch.enable_grad():
                leaves = part.detach().requires_grad_(), push.detach().requires_grad_()
                share = inner(ctx.along, margin_gradient(ctx.network(leaves[0]), labels, leaves[1], zeta, create_graph=True))
                for out, value in zip((part_slope, push_slope), torch.autograd.grad(share * slope, leaves), strict=True):
                    out.copy_(value)
        return *slopes, None, None, None, None


def chunked_stationarity(
    network: nn.Module,
    goal: Sequence[Tensor],
    x: Float[Tensor, "bank *shape"],
    own: Int[Tensor, " bank"],
    mu: Float[Tensor, "bank classes"],
    chunk: int,
) -> Float[Tensor, ""]:
    """`kkt.stationarity` of a bank of any size in the memory of one `chunk` of samples, differentiable once in `x` and `mu`.

    For any network whose samples do not meet, thus without batch normalisation in train mode, unless `chunk` is the whole bank; in one
    process. Training has banks of some hundred samples, which fit.
    """
    return _Chunked.apply(x, mu, own, network, list(goal), chunk)
