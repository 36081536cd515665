"""Structural similarity of every image of one set with every image of another (Wang et al. 2004)."""

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

C1, C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for images of data range 1
AGREED = 0.8  # SSIM above which two members of a mixture agree on an image
SIGMA, RADIUS = 1.5, 5  # of the Gaussian window; scikit-image cuts it at 3.5 σ


def _moments(images: Float[Tensor, "n *shape"]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """One image's share in every window of (2 μ_a μ_b + C₁)(2 σ_ab + C₂) / ((μ_a² + μ_b² + C₁)(σ_a² + σ_b² + C₂)), the SSIM of a pair.

    That is μ, μ² + C₁/2, vectors [n, window + 1] whose inner products are 2 σ_ab + C₂, and σ² + C₂/2, all with the Gaussian's weights.
    Windows are those that lie inside the image, of every channel.
    """
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=images.dtype)
    bell = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weight = torch.outer(bell, bell).flatten() / bell.sum() ** 2
    root, last = (2 * weight).sqrt(), images.new_full((len(images), 1), C2**0.5)
    channels = images.reshape(len(images), -1, *images.shape[-2:]).unbind(1)
    rows, columns = (range(side - 2 * RADIUS) for side in images.shape[-2:])
    for channel, top, left in itertools.product(channels, rows, columns):
        window = channel[:, top : top + 2 * RADIUS + 1, left : left + 2 * RADIUS + 1].flatten(1)
        mean = window @ weight
        vectors = torch.cat([(window - mean[:, None]) * root, last], 1)
        yield mean, mean.square() + C1 / 2, vectors, vectors.square().sum(1) / 2


def ssim(a: Float[Tensor, "n *shape"], b: Float[Tensor, "m *shape"], chunk: int = 400) -> Float[Tensor, "n m"]:
    """SSIM of every pair of images, pixels in [0, 1], shape (height, width) or (channels, height, width); channels are averaged.

    Equal to scikit-image's `structural_similarity(..., gaussian_weights=True, use_sample_covariance=False, data_range=1)`.
    Local means and variances are per image; the covariance of all pairs is one matrix product per window. `chunk` images of `a`
    at a time keep what one window needs in the processor's cache.
    """
    moments_b = list(_moments(b))
    rows = []
    for part in a.split(chunk):
        total = a.new_zeros(len(part), len(b))
        above, below, factor = (torch.empty_like(total) for _ in range(3))
        for (mean_a, square_a, vectors_a, variance_a), (mean_b, square_b, vectors_b, variance_b) in zip(
            _moments(part), moments_b, strict=True
        ):
            torch.outer(2 * mean_a, mean_b, out=above).add_(C1)
            above.mul_(torch.mm(vectors_a, vectors_b.T, out=factor))
            torch.add(square_a[:, None], square_b, out=below)
            below.mul_(torch.add(variance_a[:, None], variance_b, out=factor))
            total.addcdiv_(above, below)
        rows.append(total / len(moments_b))
    return torch.cat(rows)


def agreement(x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"], heard: Bool[Tensor, " n"], members: int) -> Float[Tensor, " n"]:
    """Best SSIM of every image of a mixture's bank to another member's of the same label; −1 if there is none. Only of those `heard`."""
    member, best = torch.arange(len(x)) % members, x.new_full((len(x),), -1)
    for same in ((y == label) & heard for label in y.unique()):
        others = member[same][:, None] != member[same]
        best[same] = torch.where(others, ssim(x[same], x[same]), -1.0).amax(1)
    return best


def surest(similarity: Float[Tensor, " n"], members: int) -> Int[Tensor, " first"]:
    """Places in a mixture's bank of the first member's codes, by their `agreement`, largest first: what they agree with is another's."""
    order = similarity.argsort(descending=True, stable=True)
    return order[order % members == 0]
