"""The step in closed form, for fully connected classifiers: back-propagation and its derivative written out.

A fully connected network's gradients are outer products, so its residual is written out too, and one ordinary backward pass serves.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gbc.classifier import Classifier, SmoothGateReLU
from gbc.distributed import gather, loss_totals, normalise, ranks, total
from gbc.homogeneity import Homogeneity
from gbc.kkt import inner, relative_residual
from gbc.precision import add_product, factor_type, multiply
from gbc.step import DoubleBackward, Step

BLOCK = 240_000  # numbers at a time: so many neurons times samples
STRIP = 300  # samples in a strip of rows of a Gram matrix, of which what lies above the diagonal's block is copied
NARROW = 16  # a layer so many times narrower than the one below sends δ back anew rather than keep what it sent


class Hidden(NamedTuple):
    """A hidden layer from u, which is z or, under batch normalisation, z normalised; and the weights above it."""

    weight_above: Tensor  # its type is that of the products' factors
    bias_above: Tensor | None
    norm: nn.BatchNorm1d | None
    sharpness: float | None

    def before(self, u: Tensor, block: slice = slice(None)) -> Tensor:
        """What enters the ReLU of these neurons."""
        return u if self.norm is None else torch.addcmul(self.norm.bias[block], u, self.norm.weight[block])

    def gate(self, y: Tensor) -> Tensor:
        """The derivative that ReLU takes."""
        return (y > 0).to(y) if self.sharpness is None else (self.sharpness * y).sigmoid_()

    def down(self, y_slope: Tensor, block: slice) -> Tensor:
        """∂/∂y → ∂/∂u, in place."""
        return y_slope if self.norm is None else y_slope.mul_(self.norm.weight[block])


def slices(length: int, width: int) -> list[slice]:
    """0 … length, `width` at a time."""
    return [slice(start, start + width) for start in range(0, length, width)]


def blocks(u: Tensor) -> list[slice]:
    """A layer's neurons, `BLOCK` numbers of u at a time."""
    return slices(u.shape[1], max(1, BLOCK // len(u)))


def add_gram(out: Tensor, a: Tensor, everyone: Tensor) -> None:
    """Add a aᵀ, of this process's samples by all, to `out`; if these are the same, only to what `mirror` does not fill."""
    for strip in slices(len(a), STRIP):
        seen = everyone[: strip.stop if len(a) == len(everyone) else None]
        add_product(out[strip, : len(seen)], a[strip], seen.T, everyone.dtype)


def mirror(gram: Tensor) -> Tensor:
    """A square Gram matrix's strips below the diagonal also above it, in place."""
    for strip in slices(len(gram), STRIP) if len(gram) == gram.shape[1] else []:
        gram[: strip.start, strip] = gram[strip, : strip.start].T
    return gram


class _Gram(torch.autograd.Function):
    """a → a aᵀ, of this process's samples by all. Its slope has to be symmetric, as that of ⟨δ δᵀ, a aᵀ⟩ is."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, factors: torch.dtype) -> Tensor:
        out, a = a.new_zeros(len(a), len(a) * ranks()), a.to(factors)
        everyone = gather(a)
        ctx.save_for_backward(everyone)
        add_gram(out, a, everyone)
        return mirror(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (everyone,) = ctx.saved_tensors
        return multiply(2 * slope, everyone, everyone.dtype), None


class _Ahead(torch.autograd.Function):
    """u → the z of the layer above and, if `gram`, a aᵀ, whose slope has to be symmetric; keeps u alone."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, layer: Hidden, gram: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u)
        ctx.layer, ctx.gram, factors = layer, gram, layer.weight_above.dtype
        z = u.new_zeros(len(u), len(layer.weight_above)) if layer.bias_above is None else layer.bias_above.repeat(len(u), 1)
        seen = u.new_zeros(len(u), len(u) * ranks() * gram)
        for block in blocks(u):
            a = layer.before(u[:, block], block).clamp_min(0).to(factors)
            add_product(z, a, layer.weight_above[:, block].T, factors)
            if gram:
                add_gram(seen, a, gather(a))
        return z, mirror(seen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, z_slope: Tensor, seen_slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (u,), layer, factors = ctx.saved_tensors, ctx.layer, ctx.layer.weight_above.dtype
        u_slope = torch.empty_like(u)
        for block in blocks(u):
            y = layer.before(u[:, block], block)
            push = multiply(z_slope, layer.weight_above[:, block], factors)
            if ctx.gram:
                add_product(push, seen_slope, gather(y.clamp_min(0).to(factors)), factors, 2.0)
            layer.down(torch.mul(push, layer.gate(y), out=u_slope[:, block]), block)
        return u_slope, None, None


class _Back(torch.autograd.Function):
    """u and δ of the layer above → δ = ∂/∂z or, if `gram`, δ δᵀ; if `outer`, δᵀ a of the weights above; and Σ d·u and Σ d.

    The sums are over this process's samples, and d = ∂/∂(what enters the ReLU). Without batch normalisation it is δ; with it,
    δ = (d − ⟨d⟩ − u·⟨d·u⟩)·factor, where factor is the inverse deviation times the weight, and the sums are this process's share of
    the slopes of its weight and bias. The slope of δ δᵀ has to be symmetric. In `backward` d, δ and pull = ∂/∂a are still slopes of
    Σ μ m; push = ∂/∂δ, pulls, stretch, shift and whatever ends in _slope are of the loss.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, above: Tensor, factor: Tensor | None, layer: Hidden, gram: bool, outer: bool) -> tuple[Tensor, ...]:
        weight, factors, count = layer.weight_above, layer.weight_above.dtype, len(u) * ranks()
        kept = multiply(above, weight, factors) if NARROW * len(weight) > weight.shape[1] else None
        seen = u.new_zeros(len(u), count) if gram else torch.empty_like(u)
        products, sums, means = u.new_empty(weight.shape if outer else 0), u.new_empty(2, u.shape[1]), u.new_zeros(2, u.shape[1])
        for block in blocks(u):
            u_block, y = u[:, block], layer.before(u[:, block], block)
            delta = (multiply(above, weight[:, block], factors) if kept is None else kept[:, block]) * layer.gate(y)
            sums[:, block] = torch.stack([(delta * u_block).sum(0), delta.sum(0)])
            if factor is not None:
                mean_du, mean_d = means[:, block] = total(sums[:, block]) / count
                delta = delta.sub_(mean_d).addcmul_(u_block, mean_du, value=-1).mul_(factor[block])
            if gram:
                mine = delta.to(factors)
                add_gram(seen, mine, gather(mine))
            else:
                seen[:, block] = delta
            if outer:
                products[:, block] = multiply(above.T, y.clamp_min(0), factors)
        ctx.save_for_backward(u, above, factor, kept, means)
        ctx.layer, ctx.gram, ctx.outer = layer, gram, outer
        return mirror(seen) if gram else seen, products, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seen_slope: Tensor, products_slope: Tensor, sums_slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        u, above, factor, kept, means = ctx.saved_tensors
        layer, weight, factors, count = ctx.layer, ctx.layer.weight_above, ctx.layer.weight_above.dtype, len(u) * ranks()
        u_slope, above_slope = torch.empty_like(u), torch.zeros_like(above)
        kept_slope = torch.empty_like(kept) if kept is not None else None
        factor_slope = torch.empty_like(u[0])
        if ctx.gram:
            seen_slope = 2 * seen_slope
        for block in blocks(u):
            u_block, y = u[:, block], layer.before(u[:, block], block)
            gate, pull = layer.gate(y), multiply(above, weight[:, block], factors) if kept is None else kept[:, block]
            d, (mean_du, mean_d), (stretch, shift) = pull * gate, means[:, block], sums_slope[:, block]
            if ctx.gram:
                delta = d if factor is None else (d - mean_d).addcmul_(u_block, mean_du, value=-1).mul_(factor[block])
                push = multiply(seen_slope, gather(delta.to(factors)), factors)
            else:
                push = seen_slope[:, block]
            if factor is not None:
                pulls = torch.stack([(push * u_block).sum(0), push.sum(0)])
                factor_slope[block] = (push * d).sum(0) - (means[:, block] * pulls).sum(0)
                push = push * factor[block]
                stretch, shift = sums_slope[:, block] - total(factor[block] * pulls / count)
            d_slope, u_block_slope = (push + shift).addcmul_(u_block, stretch), d * stretch
            if factor is not None:
                u_block_slope.addcmul_(push, mean_du, value=-1)
            # d = pull · gate(y)
            y_slope = torch.ops.aten.sigmoid_backward(d_slope * pull, gate)
            pull_slope = d_slope.mul_(gate)
            if ctx.outer:
                add_product(above_slope, y.clamp_min(0), products_slope[:, block].T, factors)
                u_block_slope += layer.down(multiply(above, products_slope[:, block], factors).mul_(gate), block)
            torch.add(u_block_slope, layer.down(y_slope, block), alpha=layer.sharpness or 0.0, out=u_slope[:, block])
            if kept_slope is None:
                add_product(above_slope, pull_slope, weight[:, block].T, factors)
            else:
                kept_slope[:, block] = pull_slope
        if kept_slope is not None:
            add_product(above_slope, kept_slope, weight.T, factors)
        return u_slope, above_slope, None if factor is None else factor_slope, None, None, None


class ClosedForm(Step):
    """For fully connected classifiers, (linear, batch normalisation or none, ReLU) … linear: back-propagation written out.

    No weight needs a gradient. A linear layer below batch normalisation has no bias.

    z_l = W_l a_{l−1} + b_l; δ_l = ∂(Σ μ m)/∂z_l; then ∇_{W_l} = δ_lᵀ a_{l−1}, whose product with W_l itself is Σ_i δ_i·(z_i − b), and
    whose square is ‖Σ_i δ_i a_iᵀ‖² = Σ_ij (δ_i·δ_j)(a_i·a_j): by outer products or by Gram matrices, whichever takes less arithmetic.
    """

    def __init__(self, network: Classifier, homogeneity: Homogeneity, gate: float | None):
        super().__init__(network, homogeneity, gate)
        self.z1 = set(homogeneity.z1)
        self.goal_square = inner(list(self.goal.values()), list(self.goal.values()))
        network.requires_grad_(False)
        children = [(f"layers.{name}", layer) for name, layer in network.layers.named_children()]
        self.linears = [(name, layer) for name, layer in children if isinstance(layer, nn.Linear)]
        after = [(name, layer) for (_, linear), (name, layer) in pairwise(children) if isinstance(linear, nn.Linear)]
        self.norms = [(name, layer if isinstance(layer, nn.BatchNorm1d) else None) for name, layer in after]
        weights = [layer.weight.to(factor_type(layer.weight)) for _, layer in self.linears]
        biases = [layer.bias for _, layer in self.linears]
        self.first, self.factors = weights[0], weights[0].dtype
        self.hidden = [Hidden(w, b, norm, gate) for w, b, (_, norm) in zip(weights[1:], biases[1:], self.norms, strict=True)]

    def by_gram(self, layer: nn.Linear) -> bool:
        """Whether Gram matrices of the batch take less arithmetic than outer products."""
        fan_in, out = layer.in_features, layer.out_features
        return 2 * len(self.features) * ranks() * (out + fan_in) < 3 * out * fan_in

    def logits(self, x: Tensor) -> Tensor:
        """Φ(x)."""
        self.moments.clear()
        self.features = x = x.flatten(1)
        self.tape: list[tuple[Tensor, Tensor | None]] = []  # of every hidden layer: u, and with batch normalisation its inverse deviation
        (_, lowest), *others = self.linears
        z = x.new_zeros(len(x), len(self.first)) if lowest.bias is None else lowest.bias.repeat(len(x), 1)
        add_product(z, x, self.first.T, self.factors)
        self.inputs = [_Gram.apply(x, self.factors) if self.by_gram(lowest) else x]  # a aᵀ of what enters a layer, if the residual takes it
        for layer, (_, above) in zip(self.hidden, others, strict=True):
            scale = None
            if layer.norm is not None:
                z, scale, average, variance = normalise(z, layer.norm.eps)
                self.moments.append((layer.norm, average, variance, 1))
            self.tape.append((z, scale))
            z, seen = _Ahead.apply(z, layer, self.by_gram(above))
            self.inputs.append(seen)
        if self.hidden:
            self.features = self.hidden[-1].before(self.tape[-1][0])
        self.last = z
        return z

    def stationarity(self, own: Tensor, mu: Tensor) -> Tensor:
        """Layer by layer, from the last."""
        # The slopes of Σ μ m at the logits: Σ_c μ_c at the sample's own class, −μ_c at the others.
        pull = mu.scatter(1, own[:, None], 0.0)
        delta = (-pull).scatter(1, own[:, None], pull.sum(1, keepdim=True))
        vectors, gradients = [torch.stack([(delta * self.last).sum(0), delta.sum(0)])], []  # of this process
        for depth in reversed(range(len(self.linears))):
            gram = self.by_gram(self.linears[depth][1])
            if gram:  # the lowest layer's δ is needed for nothing else, and _Back has made δ δᵀ of it
                pairs = delta if depth == 0 and self.hidden else _Gram.apply(delta, self.factors)
                gradients.append((pairs * self.inputs[depth]).sum())
            elif depth == 0:
                gradients.append(multiply(delta.T, self.inputs[0], self.factors))
            if depth:
                layer, (u, scale) = self.hidden[depth - 1], self.tape[depth - 1]
                factor = None if scale is None or layer.norm is None else scale * layer.norm.weight
                gram_below = depth == 1 and self.by_gram(self.linears[0][1])
                delta, products, sums = _Back.apply(u, delta, factor, layer, gram_below, not gram)
                gradients += [] if gram else [products]
                vectors.append(sums)
        whole = loss_totals([*vectors, *gradients])
        return self._residual(whole[: len(vectors)], whole[len(vectors) :])

    def _residual(self, vectors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Eq. 5 from ⟨Λ̄ζ, G⟩ and ‖G‖², where G = Σ μ ∇m.

        For every linear layer from the last down, `vectors` are Σ δ·z and Σ δ, or the slopes of the weight and bias of the batch
        normalisation that follows it; `gradients` are ∇_W, or ‖∇_W‖² alone.
        """
        product = norm = torch.zeros_like(self.goal_square)

        def add(name: str, value: Tensor, slope: Tensor) -> None:
            """A vector among the parameters joins ⟨Λ̄ζ, G⟩, which is on Z₁ ζ itself, and ‖G‖²."""
            nonlocal product, norm
            norm = norm + slope.square().sum()
            if name in self.z1:
                product = product + (value * slope).sum()

        for depth, (along, slope), gradient in zip(reversed(range(len(self.linears))), vectors, gradients, strict=True):
            name, linear = self.linears[depth]
            norm_name, normed = self.norms[depth] if depth < len(self.norms) else ("", None)
            if normed is not None and (scale := self.tape[depth][1]) is not None:
                add(f"{norm_name}.weight", normed.weight, along)
                add(f"{norm_name}.bias", normed.bias, slope)
                along = normed.weight * along * normed.eps * scale.square()  # Σ δ·z, for the mean of u² is 1 − ε·scale²
            norm = norm + (gradient.square().sum() if gradient.ndim else gradient)
            if f"{name}.weight" in self.z1:
                product = product + along.sum()  # ⟨W, ∇_W⟩ = Σ δ·(z − b)
            if linear.bias is not None:
                add(f"{name}.bias", linear.bias, slope)
                if f"{name}.weight" in self.z1:
                    product = product - (linear.bias * slope).sum()
        return relative_residual(product, self.goal_square, norm)


def step_of(network: Classifier, homogeneity: Homogeneity, gate: float | None) -> Step:
    """The faster of the two for this network."""
    written_out = all(isinstance(layer, nn.Flatten | nn.Linear | nn.BatchNorm1d | SmoothGateReLU) for layer in network.layers)
    return (ClosedForm if written_out else DoubleBackward)(network, homogeneity, gate)
