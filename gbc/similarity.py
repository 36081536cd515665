"""Structural similarity of every image of one set with every image of another (Wang et al. 2004)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

C1, C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for images of data range 1
SIGMA, RADIUS = 1.5, 5  # of the Gaussian window; scikit-image cuts it at 3.5 σ


def _windows(images: Float[Tensor, "n *shape"]) -> Float[Tensor, "places n window"]:
    """Every window that lies inside the image, of every channel, flat; places = channels · positions."""
    size = 2 * RADIUS + 1
    height, width = images.shape[-2:]
    patches = F.unfold(images.reshape(-1, 1, height, width), size)  # [n·channels, window, positions]
    return patches.unflatten(0, (len(images), -1)).permute(1, 3, 0, 2).flatten(0, 1)


def _moments(images: Float[Tensor, "n *shape"]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For every window: weighted means [n], root-weighted deviations from them [n, window] and variances [n]."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=images.dtype)
    bell = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weight = torch.outer(bell, bell).flatten() / bell.sum() ** 2
    windows = _windows(images)
    mean = windows @ weight
    deviation = (windows - mean[..., None]) * weight.sqrt()
    return list(zip(mean, deviation, deviation.square().sum(-1), strict=True))


def ssim(a: Float[Tensor, "n *shape"], b: Float[Tensor, "m *shape"], chunk: int = 200) -> Float[Tensor, "n m"]:
    """SSIM of every pair of images, pixels in [0, 1], shape (height, width) or (channels, height, width); channels are averaged.

    Equal to scikit-image's `structural_similarity(..., gaussian_weights=True, use_sample_covariance=False, data_range=1)`.
    Local means and variances are per image; the covariance of all pairs is one matrix product per window. `chunk` images of `a`
    at a time keep what one window needs in the processor's cache.
    """
    moments_b = _moments(b)
    rows = []
    for part in a.split(chunk):
        total = a.new_zeros(len(part), len(b))
        for (mean_a, deviation_a, variance_a), (mean_b, deviation_b, variance_b) in zip(_moments(part), moments_b, strict=True):
            luminance = (2 * torch.outer(mean_a, mean_b)).add_(C1)
            luminance.div_((mean_a.square() + C1)[:, None] + mean_b.square())
            structure = (deviation_a @ deviation_b.T).mul_(2).add_(C2)
            structure.div_((variance_a + C2)[:, None] + variance_b)
            total.addcmul_(luminance, structure)
        rows.append(total / len(moments_b))
    return torch.cat(rows)
