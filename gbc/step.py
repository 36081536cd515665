"""The step that training repeats: Eq. 5's residual of a batch, differentiable in the images and the multipliers.

A fully connected network's gradients are outer products, so its residual is written out in closed form, and one ordinary backward
pass serves. Any other network's is differentiated twice. `kkt` holds the plain form of both.
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
from gbc.distributed import gather, mean, moments, ranks, total
from gbc.homogeneity import Homogeneity
from gbc.kkt import inner, margin_gradient, relative_residual, stationarity, target

TINY_SPREAD = 1e-6  # of a class's features; keeps the root's derivative finite at its mean


class _Gate(torch.autograd.Function):
    """z → relu(z) and the smooth gate σ(sharpness·z), which is also the derivative that relu takes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, sharpness: float | None) -> tuple[Tensor, Tensor]:
        gate = (z > 0).to(z) if sharpness is None else (sharpness * z).sigmoid_()
        ctx.save_for_backward(gate)
        ctx.sharpness = sharpness or 0.0
        return z.clamp_min(0), gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_slope: Tensor, gate_slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gate,) = ctx.saved_tensors
        return gate_slope.addcmul(gate_slope, gate, value=-1).mul_(ctx.sharpness).add_(value_slope).mul_(gate), None


class _Normalise(torch.autograd.Function):
    """z → what batch normalisation makes of it before its weight and bias, with its inverse deviation, mean and variance."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        average, variance, centred = moments(z)
        scale = (variance + eps).rsqrt()
        normal = centred.mul_(scale)
        ctx.save_for_backward(normal, scale)
        return normal, scale, average, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, normal_slope: Tensor, scale_slope: Tensor, average_slope: Tensor, variance_slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        normal, scale = ctx.saved_tensors
        count = len(normal) * ranks()
        shift = total(average_slope - scale * normal_slope.sum(0)) / count
        stretch = total(2 * variance_slope / scale - scale**2 * scale_slope - scale * (normal_slope * normal).sum(0)) / count
        return torch.addcmul(shift, normal_slope, scale).addcmul_(normal, stretch), None


class _NormaliseBack(torch.autograd.Function):
    """The way back through batch normalisation, ∂/∂output → ∂/∂z, with the sums over samples that are the slopes of its weight and bias.

    `factor` is the inverse deviation times the weight.
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor, normal: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = len(delta) * ranks()
        along, slope = total((delta * normal).sum(0)), total(delta.sum(0))
        ctx.save_for_backward(delta, normal, factor, along / count, slope / count)
        return (delta - slope / count).addcmul_(normal, along / count, value=-1).mul_(factor), along, slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor, along_slope: Tensor, slope_slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        delta, normal, factor, along, slope = ctx.saved_tensors
        count = len(delta) * ranks()
        pull_along, pull_sum = (pull * normal).sum(0), pull.sum(0)
        factor_slope = (pull * delta).sum(0) - slope * pull_sum - along * pull_along
        along_slope = total(along_slope - factor * pull_along / count)
        slope_slope = total(slope_slope - factor * pull_sum / count)
        delta_slope = torch.addcmul(slope_slope, pull, factor).addcmul_(normal, along_slope)
        return delta_slope, (delta * along_slope).addcmul_(pull, factor * along, value=-1), factor_slope


class _GramNorm(torch.autograd.Function):
    """This process's share of ‖δᵀa‖² = Σ_ij (δ_i·δ_j)(a_i·a_j), in four products with matrices of its samples by all samples."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, a: Tensor) -> Tensor:
        all_delta, all_a = gather(delta), gather(a)
        gram_delta, gram_a = delta @ all_delta.T, a @ all_a.T
        ctx.save_for_backward(all_delta, all_a, gram_delta, gram_a)
        return (gram_delta * gram_a).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        all_delta, all_a, gram_delta, gram_a = ctx.saved_tensors
        return (2 * slope * gram_a) @ all_delta, (2 * slope * gram_delta) @ all_a if ctx.needs_input_grad[1] else None


def squared_norm(delta: Float[Tensor, "batch out"], a: Float[Tensor, "batch in"]) -> Float[Tensor, ""]:
    """‖Σ_i δ_i a_iᵀ‖² over the samples of all processes: by Gram matrices, or by the outer products, whichever takes less arithmetic."""
    samples, out, fan_in = len(delta) * ranks(), delta.shape[1], a.shape[1]
    if 2 * samples * (out + fan_in) < 3 * out * fan_in:
        return total(_GramNorm.apply(delta, a))
    return total(delta.T @ a).square().sum()


class Step(ABC):
    """One classifier as the generator's loss sees it: fixed weights, Λ̄ζ, and the statistics that batch normalisation keeps.

    `logits` looks at a batch; `stationarity`, `statistics_mismatch` and `collapse` speak of the batch that it last saw. Under torchrun
    that is the batch of all processes together. The last two are extensions of the paper.
    """

    def __init__(self, network: Classifier, homogeneity: Homogeneity, gate: float | None):
        self.network = network.freeze().set_gate(gate)
        self.labels = torch.tensor(network.labels, device=next(network.parameters()).device)
        self.goal = target(network, homogeneity)
        self.moments: list[tuple[_BatchNorm, Tensor, Tensor]] = []  # every batch normalisation with its input's mean and variance
        self.features: Tensor  # [batch, ...], what enters the last ReLU

    @abstractmethod
    def logits(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        """Φ(x), remembering what enters every batch normalisation and the last ReLU."""

    @abstractmethod
    def stationarity(self, own: Int[Tensor, " batch"], mu: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
        """Relative residual of Eq. 5 for samples of class index `own` with multipliers `mu`, differentiable in the samples and in `mu`."""

    def remember(self, module: _BatchNorm, average: Tensor, variance: Tensor, samples: int) -> None:
        """Keep a batch normalisation's moments, the variance unbiased, as its running one is."""
        count = samples * ranks()
        self.moments.append((module, average, variance * count / (count - 1)))

    def statistics_mismatch(self) -> Float[Tensor, ""]:
        """Mean squared difference of the batch's mean and deviation from the running ones, in running deviations; summed over layers.

        The running statistics are those of the training batch, and part of the weights file.
        """
        mismatch = torch.zeros((), dtype=next(self.network.parameters()).dtype, device=self.labels.device)
        for module, average, variance in self.moments:
            assert module.running_mean is not None
            assert module.running_var is not None
            shift = (average - module.running_mean).square() / module.running_var
            stretch = ((variance / module.running_var).clamp_min(1e-8).sqrt() - 1).square()
            mismatch = mismatch + shift.mean() + stretch.mean()
        return mismatch

    def collapse(self, own: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Mean distance of a sample's features from their class's mean, by the root mean square distance from the mean of all.

        Features are what enters the last ReLU. Deep in training they collapse: one point for all training images of
        a class (Papyan et al. 2020), but not for other images of it.
        """
        _, variance, centred = moments(self.features.flatten(1))
        member = nn.functional.one_hot(own, len(self.labels)).to(centred)
        means = total(member.T @ centred) / total(member.sum(0)).clamp_min(1)[:, None]
        spread = (centred - means[own]).square().sum(1) / variance.sum()
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
        average, variance, centred = moments(arguments[0].movedim(1, -1).flatten(0, -2))
        self.remember(module, average, variance, len(centred))

    def logits(self, x: Tensor) -> Tensor:
        """Φ(x)."""
        self.moments.clear()
        self.features = x
        self.last = self.network(x)
        return self.last

    def stationarity(self, own: Tensor, mu: Tensor) -> Tensor:
        """By `margin_gradient`."""
        gradient = margin_gradient(self.last, own, mu, list(self.network.parameters()), create_graph=True)
        return stationarity(list(self.goal.values()), [total(part) for part in gradient])


class ClosedForm(Step):
    """For fully connected classifiers: back-propagation written out, so that no weight needs a gradient.

    z_l = W_l a_{l−1} + b_l; δ_l = ∂(Σ μ m)/∂z_l; then ∇_{W_l} = δ_lᵀ a_{l−1}, whose product with W_l itself is Σ_i δ_i·(z_i − b).
    """

    def __init__(self, network: Classifier, homogeneity: Homogeneity, gate: float | None):
        super().__init__(network, homogeneity, gate)
        self.gate, self.z1 = gate, set(homogeneity.z1)
        self.size = inner(list(self.goal.values()), list(self.goal.values()))
        network.requires_grad_(False)
        self.tape: list[tuple[str, nn.Module, tuple[Any, ...]]] = []  # of the forward pass, for the way back

    def logits(self, x: Tensor) -> Tensor:
        """Φ(x)."""
        self.moments.clear()
        self.tape.clear()
        self.features = x
        for name, layer in self.network.layers.named_children():
            if isinstance(layer, nn.Linear):
                z = layer(x)
                self.tape.append((name, layer, (x, z if f"layers.{name}.weight" in self.z1 else None)))
                x = z
            elif isinstance(layer, _BatchNorm):
                normal, scale, average, variance = _Normalise.apply(x, layer.eps)
                self.remember(layer, average, variance, len(x))
                self.tape.append((name, layer, (normal, scale)))
                x = torch.addcmul(layer.bias, normal, layer.weight)
            elif isinstance(layer, SmoothGateReLU):
                self.features = x
                x, gate = _Gate.apply(x, self.gate)
                self.tape.append((name, layer, (gate,)))
            else:
                x = layer(x)
        return x

    def stationarity(self, own: Tensor, mu: Tensor) -> Tensor:
        """By Gram matrices or outer products, layer by layer."""
        pull = mu.scatter(1, own[:, None], 0.0)
        delta = (-pull).scatter(1, own[:, None], pull.sum(1, keepdim=True))
        product = norm = torch.zeros_like(self.size)

        def add(name: str, value: Tensor, slope: Tensor) -> None:
            """A vector among the parameters joins ⟨goal, gradient⟩ and ‖gradient‖²."""
            nonlocal product, norm
            norm = norm + slope.square().sum()
            if name in self.z1:
                product = product + (value * slope).sum()

        for name, layer, seen in reversed(self.tape):
            weight, bias = f"layers.{name}.weight", f"layers.{name}.bias"
            if isinstance(layer, nn.Linear):
                x, z = seen
                norm = norm + squared_norm(delta, x)
                if weight in self.z1:
                    product = product + total(torch.dot(delta.flatten(), z.flatten()))
                if layer.bias is not None:
                    slope = total(delta.sum(0))
                    add(bias, layer.bias, slope)
                    if weight in self.z1:
                        product = product - (layer.bias * slope).sum()
                if layer is not self.tape[0][1]:
                    delta = delta @ layer.weight
            elif isinstance(layer, _BatchNorm):
                normal, scale = seen
                delta, along, slope = _NormaliseBack.apply(delta, normal, scale * layer.weight)
                add(weight, layer.weight, along)
                add(bias, layer.bias, slope)
            else:
                delta = delta * seen[0]
        return relative_residual(product, self.size, norm)


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
        gradient = [total(part) for part in gradient]
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

    For any network whose samples do not meet, thus without batch normalisation in train mode, unless `chunk` is the whole bank.
    """
    return _Chunked.apply(x, mu, own, network, list(goal), chunk)


def step_of(network: Classifier, homogeneity: Homogeneity, gate: float | None) -> Step:
    """The faster of the two for this network."""
    written_out = all(isinstance(layer, nn.Flatten | nn.Linear | nn.BatchNorm1d | SmoothGateReLU) for layer in network.layers)
    return (ClosedForm if written_out else DoubleBackward)(network, homogeneity, gate)
