"""float32 products of torch, for any operands; in float64 where a process-wide setting would cut quantized ones."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from fairseq_dsq.formats import Float32
from fairseq_dsq.gemm.base import Engine, Operand, Side, finish
from fairseq_dsq.kernels.ops import BFLOAT16_SIGNIFICAND_BITS

# Significant bits that float32 products keep under torch's settings (TF32: 10 stored bits, 1 implicit).
KEPT_BITS = {"tf32": 11, "bf16": BFLOAT16_SIGNIFICAND_BITS}
# torch's name for what multiplies float32 on a type of device, by which it keeps its settings.
_BACKENDS = {"cpu": "mkldnn", "cuda": "cuda"}


class Float32Engine(Engine):
    """Accepts everything and rounds nothing."""

    name = "float32"

    def accepts(self, a: Side, b: Side, device: torch.device, dtype: torch.dtype) -> bool:
        return True

    def multiply(self, a: Operand, b: Operand, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
        if _loses_bits(a, b):
            return finish((a.rows.double() @ b.rows.mT.double()).float(), bias, add_to)
        rows, columns = a.rows, b.rows
        factored = a.scale is not None or b.scale is not None
        if factored and rows.dtype is not columns.dtype:  # elements are float32, whatever the other operand is
            rows, columns = rows.float(), columns.float()
        elif bias is not None and add_to is None and b.tensor.dim() == 2:
            return torch.nn.functional.linear(rows, columns, bias)  # half precision rounds once
        return finish(rows @ columns.mT, bias, add_to)


def _float32_precision(device: str) -> str:
    """What a process-wide setting of torch makes of float32 products on a device: ``ieee``, ``tf32`` or ``bf16``."""
    backend = _BACKENDS.get(device)
    if backend is None:
        return "ieee"
    if hasattr(torch._C, "_get_fp32_precision_getter"):  # since torch 2.9; reading the old names may raise there
        return str(torch._C._get_fp32_precision_getter(backend, "matmul"))
    names = {"highest": "ieee", "high": "tf32", "medium": "bf16" if backend == "mkldnn" else "tf32"}
    return names[torch.get_float32_matmul_precision()]


def _loses_bits(a: Operand, b: Operand) -> bool:
    """Whether torch may cut an operand's quantized values before it multiplies; said once."""
    if a.tensor.dtype is not torch.float32 or any(isinstance(operand.side.fmt, Float32) for operand in (a, b)):
        return False
    precision = _float32_precision(a.tensor.device.type)
    if max(a.side.significand_bits, b.side.significand_bits) <= KEPT_BITS.get(precision, 32):
        return False
    _say_float64(precision)
    return True


@cache
def _say_float64(precision: str) -> None:
    warnings.warn(
        f"torch multiplies float32 in {precision} here (torch.set_float32_matmul_precision), which would cut quantized "
        f"operands of more than {KEPT_BITS[precision]} significant bits: they are multiplied in float64, which is "
        "slower",
        stacklevel=2,
    )
