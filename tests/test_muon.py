"""Muon against the singular value decomposition and against torch's own."""

from unittest import mock

import pytest
import torch

from gbc.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_orthogonalising_keeps_singular_vectors_and_makes_singular_values_about_one(shape: tuple[int, int]):
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), full_matrices=False)
    inside = u.T @ orthogonalised(u @ torch.diag(torch.linspace(1, 3, min(shape), dtype=torch.float64)) @ vh) @ vh.T
    values = inside.diagonal()
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (inside - torch.diag(values)).abs().max() < 1e-12


@pytest.mark.parametrize(("factors", "bound"), [(torch.float32, 0.02), (torch.bfloat16, 0.03)])  # of bfloat16, two roundings differ
def test_muon_steps_as_torchs_does_in_bfloat16(factors: torch.dtype, bound: float):
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(6, 20, generator=rng)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    optimisers = [Muon([ours], lr=0.01), torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        gradient = torch.randn(6, 20, generator=rng)
        for matrix, optimiser in zip((ours, theirs), optimisers, strict=True):
            matrix.grad = gradient.clone()
            with mock.patch("gbc.muon.factor_type", return_value=factors):
                optimiser.step()
    moved = (theirs - start).norm()
    assert moved > 0
    assert (ours - theirs).norm() < bound * moved


def test_a_matrix_without_a_gradient_stays():
    moved, stays = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    optimiser = Muon([moved, stays], lr=0.1)
    moved.square().sum().backward()
    optimiser.step()
    assert not moved.equal(torch.ones(3, 2))
    assert stays.equal(torch.ones(3, 2))
