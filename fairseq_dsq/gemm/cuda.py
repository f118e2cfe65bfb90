"""bfloat16 tensor cores, written to be right by construction: operands are exact sums of bfloat16 terms.

Eight significant bits are one term, 16 two, 24 three; the product of two sums is the sum of the terms' products, each
exact, accumulated in float32. No setting of torch cuts a bfloat16 operand, as TF32 cuts a float32 one. What lies below
the smallest bfloat16, 2^-133, is lost. Half precision is multiplied as it is, into float32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fairseq_dsq.formats import Float32
from fairseq_dsq.gemm.base import Engine, Operand, Side, finish
from fairseq_dsq.kernels import ops

# Products of terms for one of operands: 1x1, 2x1, 3x1, 2x2. More cost more than float32 on its own units.
MOST_PRODUCTS = 4


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """An NVIDIA GPU with bfloat16 ones, and a torch whose products of half precision can stay float32."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch.ops.aten.mm, "dtype"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class CudaEngine(Engine):
    """Quantized operands of 1x1, 2x1, 2x2 or 3x1 bfloat16 terms on NVIDIA GPUs; half precision."""

    name = "cuda"
    in_terms = True

    def unavailable(self) -> str | None:
        return None if torch.cuda.is_available() else "torch finds no CUDA device"

    def accepts(self, a: Side, b: Side, device: torch.device, dtype: torch.dtype) -> bool:
        if not has_tensor_cores(device) or any(isinstance(side.fmt, Float32) for side in (a, b)):
            return False
        if dtype is not torch.float32:
            return dtype in (torch.bfloat16, torch.float16)
        return ops.terms(a.significand_bits) * ops.terms(b.significand_bits) <= MOST_PRODUCTS

    def multiply(self, a: Operand, b: Operand, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
        halves = a.tensor.dtype is b.tensor.dtype is not torch.float32 and not (a.terms or b.terms)
        first, second = ((operand.rows,) for operand in (a, b)) if halves else (_terms(a), _terms(b))
        product = torch.bmm if first[0].dim() == 3 else torch.mm
        columns = [term.mT for term in second]
        total: Tensor | None = None
        for i, j in _pairs(len(first), len(columns)):
            part = product(first[i], columns[j], out_dtype=torch.float32)
            total = part if total is None else total.add_(part)
        assert total is not None
        total = finish(total, bias, add_to)
        return total.to(a.tensor.dtype) if halves else total


@cache
def _pairs(first: int, second: int) -> list[tuple[int, int]]:
    """Of terms to multiply, the small ones first: less is lost of them."""
    return sorted(((i, j) for i in range(first) for j in range(second)), key=lambda ij: -sum(ij))


def _terms(operand: Operand) -> Sequence[Tensor]:
    """The bfloat16 terms of an operand, seen with the reduction last, the largest first."""
    rows = operand.rows
    if operand.terms:
        return rows.unbind(0)
    if rows.dtype is torch.bfloat16:
        return (rows,)
    count = ops.terms(operand.side.significand_bits)
    return (rows.bfloat16(),) if count == 1 else ops.split(rows.float(), count).unbind(0)
