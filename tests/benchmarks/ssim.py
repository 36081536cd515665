"""SSIM of 2,000 images with 500: ours, a loop over scikit-image's function, and torchmetrics over batches of pairs.

The other two take too long for a million pairs; they are timed on some of them, and the time of a pair is multiplied.
"""

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from gbc.datasets import sample
from gbc.params import load_params
from gbc.similarity import ssim
from tests.benchmarks import interleaved, peak_bytes, show

MANY, FEW, PAIRS, BATCH = 2000, 500, 500, 500


def main() -> None:
    """Print the result."""
    images = sample(load_params([]).sample["mnist"], 0)["train_x"]
    rng = torch.Generator().manual_seed(0)
    a = (images.repeat(4, 1, 1)[:MANY] + 0.1 * torch.rand(MANY, 28, 28, generator=rng)).clamp(0, 1)
    b = images[:FEW]
    rows, columns = torch.randint(MANY, (PAIRS,), generator=rng), torch.randint(FEW, (PAIRS,), generator=rng)

    def scikit_image() -> np.ndarray:
        settings = {"gaussian_weights": True, "use_sample_covariance": False, "data_range": 1.0}
        pairs = zip(a[rows].double().numpy(), b[columns].double().numpy(), strict=True)
        return np.array([structural_similarity(left, right, **settings) for left, right in pairs])

    def torchmetrics() -> object:
        left, right = a[rows[:BATCH], None], b[columns[:BATCH], None]
        return structural_similarity_index_measure(left, right, data_range=1.0, sigma=1.5, reduction="none")

    seconds = interleaved({"ours": lambda: ssim(a, b), "scikit_image": scikit_image, "torchmetrics": torchmetrics}, 3)
    error = np.abs(ssim(a, b)[rows, columns].numpy() - scikit_image()).max()
    show(
        {
            "speedup_skimage": seconds["scikit_image"] / PAIRS * MANY * FEW / seconds["ours"],
            "speedup_torchmetrics": seconds["torchmetrics"] / BATCH * MANY * FEW / seconds["ours"],
            "max_error": float(error),
            "peak_gib": peak_bytes(lambda: ssim(a, b)) / 2**30,
            "seconds": seconds["ours"],
        }
    )


if __name__ == "__main__":
    main()
