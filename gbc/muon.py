"""Muon, the optimiser of the matrices of g and h."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gbc.distributed import add_up, rank, ranks
from gbc.precision import factor_type


def orthogonalised(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """About U Vᵀ of the singular value decomposition U S Vᵀ: singular values between 0.7 and 1.2, by five Newton–Schulz iterations."""
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    wide = (wide / wide.norm().clamp_min(1e-7)).to(factor_type(matrix))
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return (wide.T if len(matrix) > matrix.shape[1] else wide).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al. 2024), with steps of the size that Adam's would have (Liu et al. 2025).

    `torch.optim.Muon` is the same in bfloat16 always, which makes a training step twice as long on a CPU without it.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: object = None) -> Any:
        """Move along the orthogonalised Nesterov momentum of the gradients, shared out between processes; one without a gradient stays."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            directions = []
            for turn, matrix in enumerate(matrices):
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                mine = turn % ranks() == rank()
                directions.append(orthogonalised(matrix.grad.lerp(average, group["momentum"])) if mine else torch.zeros_like(matrix))
            add_up(directions)
            for matrix, direction in zip(matrices, directions, strict=True):
                matrix.sub_(direction, alpha=0.2 * math.sqrt(max(matrix.shape)) * group["lr"])
