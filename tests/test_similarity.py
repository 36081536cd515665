"""SSIM against scikit-image's."""

import pytest
import torch
from skimage.metrics import structural_similarity

from gbc.similarity import agreement, ssim


@pytest.mark.parametrize("shape", [(28, 28), (25, 25), (3, 16, 14)])
def test_ssim_of_all_pairs_equals_scikit_image(shape):
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(5, *shape, generator=rng, dtype=torch.float64), torch.rand(4, *shape, generator=rng, dtype=torch.float64)
    b[0] = a[1]
    b[1] = a[2] * 0.5
    similarity = ssim(a, b, chunk=2)
    for i in range(len(a)):
        for j in range(len(b)):
            expected = structural_similarity(
                a[i].numpy(),
                b[j].numpy(),
                gaussian_weights=True,
                use_sample_covariance=False,
                data_range=1,
                channel_axis=0 if len(shape) == 3 else None,
            )
            assert similarity[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_members_agree_on_what_another_member_makes_of_the_same_label():
    x = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    bank, y = x[[0, 2, 0, 1, 1, 0]], torch.tensor([0, 0, 0, 1, 1, 1])  # two members in turn
    heard = torch.ones(6, dtype=torch.bool)
    similarity = agreement(bank, y, heard, 2)
    torch.testing.assert_close(similarity[[3, 4]], torch.ones(2))
    assert similarity[[0, 2, 5]].max() < 0.8  # its equals are a code of the same member, and one of another label
    assert (agreement(bank, y, heard, 1) == -1).all()
    heard[3] = False
    assert agreement(bank, y, heard, 2)[3] == -1
    assert agreement(bank, y, heard, 2)[4] < 0.8
