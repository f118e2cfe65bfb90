"""bfloat16 tensor cores: one term times one or two, written to be right by construction."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fairseq_dsq.gemm.base import Engine, Operand, Side, finish, terms


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """bfloat16 ones, and a torch whose products of bfloat16 can stay float32."""
    return hasattr(torch.ops.aten.mm, "dtype") and torch.cuda.get_device_capability(device) >= (8, 0)


class CudaEngine(Engine):
    """float32 tensors on NVIDIA GPUs; b of one bfloat16 term, a of one or two."""

    name = "cuda"

    def unavailable(self) -> str | None:
        return None if torch.cuda.is_available() else "torch finds no CUDA device"

    def accepts(self, a: Side, b: Side, device: torch.device, dtype: torch.dtype) -> bool:
        fits = terms(a.significand_bits) is not None and terms(b.significand_bits) == 1
        on_nvidia = device.type == "cuda" and torch.version.cuda is not None
        return fits and on_nvidia and dtype is torch.float32 and _has_tensor_cores(device)

    def multiply(self, a: Operand, b: Operand, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
        product = torch.bmm if a.tensor.dim() == 3 else torch.mm
        columns = b.rows.mT.bfloat16()
        parts = (a.rows,) if terms(a.side.significand_bits) == 1 else split(a.rows)
        first, *second = (product(part.bfloat16(), columns, out_dtype=torch.float32) for part in parts)
        return finish(first.add_(second[0]) if second else first, bias, add_to)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``x`` of at most 16 significant bits as the exact sum of two bfloat16 values, held in float32."""
    high = (x.view(torch.int32) & -0x10000).view(torch.float32)
    # Inf - Inf is NaN: what is not finite stays in the first.
    return high, torch.where(high.isfinite(), x - high, 0.0)
