"""Products of matrices from bfloat16 factors, where "medium" precision asks for it and the CPU has it.

From float32 factors a CPU's product would convert the weights anew each time, which takes as long as the product.
"""

import torch
from torch import Tensor


def factor_type(weight: Tensor) -> torch.dtype:
    """Type of the factors of large products with this weight: bfloat16, or the weight's own."""
    medium = torch.get_float32_matmul_precision() == "medium" and weight.dtype == torch.float32
    return torch.bfloat16 if medium and weight.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else weight.dtype


def multiply(a: Tensor, b: Tensor, factors: torch.dtype) -> Tensor:
    """The matrix a b from factors of that type, and rounded to it."""
    return (a.to(factors) @ b.to(factors)).to(a.dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor, factors: torch.dtype, times: float = 1.0) -> None:
    """Add the matrix a b, from factors of that type and rounded to it, to `out`."""
    if factors == out.dtype:
        out.addmm_(a, b, alpha=times)
    else:
        out.add_(a.to(factors) @ b.to(factors), alpha=times)
