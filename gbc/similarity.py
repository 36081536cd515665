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


def ssim(a: Float[Tensor, "n *shape"], b: Float[Tensor, "m *shape"], chunk: int = 20) -> Float[Tensor, "n m"]:
    """SSIM of every pair of images, pixels in [0, 1], shape (height, width) or (channels, height, width); channels are averaged.

    Equal to scikit-image's `structural_similarity(..., gaussian_weights=True, use_sample_covariance=False, data_range=1)`.
    Local means and variances are per image; the covariance of all pairs is one matrix product per window.
    """
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=a.dtype)
    bell = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weight = torch.outer(bell, bell).flatten() / bell.sum() ** 2
    windows_b = _windows(b)
    mean_b = windows_b @ weight
    variance_b = windows_b.square() @ weight - mean_b**2
    rows = []
    for part in a.split(chunk):
        windows_a = _windows(part)
        mean_a = windows_a @ weight
        variance_a = windows_a.square() @ weight - mean_a**2
        means = mean_a[:, :, None] * mean_b[:, None]  # [places, n, m]
        covariance = (windows_a * weight) @ windows_b.mT - means
        luminance = (2 * means + C1) / (mean_a.square()[:, :, None] + mean_b.square()[:, None] + C1)
        structure = (2 * covariance + C2) / (variance_a[:, :, None] + variance_b[:, None] + C2)
        rows.append((luminance * structure).mean(0))
    return torch.cat(rows)
