"""The CPU kernels of kernels/native/gemm.cpp: block floating point is rounded on the way to the multipliers.

On AVX2 and on AVX-512 with VNNI they multiply codes, and take boxes of 16 along the reduction alone; with AMX or
AVX512-BF16, values in any format. Either operand may have one or two bfloat16 terms.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fairseq_dsq.formats import DEFAULT_BOX_SIZE, BlockFloat, Format
from fairseq_dsq.gemm.base import Engine, Operand, Side
from fairseq_dsq.kernels import checks, native, ops

# Of the kernels: bfloat16 terms of an operand.
MOST_TERMS = 2


def isa() -> str:
    """The instruction set of the CPU's kernels, or none."""
    return native.kernels.isa if native.kernels else "none"


class NativeEngine(Engine):
    """float32 tensors on the CPU, of one or two bfloat16 terms."""

    name = "native"

    def unavailable(self) -> str | None:
        if native.kernels is None:
            return native.unavailable or "no kernels"
        return None if native.kernels.has_gemm else f"{native.kernels.isa} kernels have no GEMM"

    def accepts(self, a: Side, b: Side, device: torch.device, dtype: torch.dtype) -> bool:
        kernels = native.kernels
        if kernels is None or not kernels.has_gemm or device.type != "cpu" or dtype is not torch.float32:
            return False
        if any(ops.terms(side.significand_bits) > MOST_TERMS for side in (a, b)):
            return False
        return kernels.gemm_takes_values or all(side.along and self.fuses_rounding(side.fmt) for side in (a, b))

    def fuses_rounding(self, fmt: Format) -> bool:
        spec = fmt.spec
        if spec is None or spec.bits > checks.GEMM_BITS or spec.box_size != DEFAULT_BOX_SIZE:
            return False
        return spec == BlockFloat(spec.bits).spec

    def multiply(self, a: Operand, b: Operand, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
        rows, columns = a.rows, b.rows
        out = rows.new_empty(*rows.shape[:-1], columns.shape[-2]) if add_to is None else add_to
        batched = rows.dim() == 3
        ops.gemm(
            out if batched else out[None],
            rows if batched else rows[None],
            columns if batched else columns[None],
            *_numbers(a.side, b.side), bias, add_to is not None,
        )  # fmt: skip
        return out


@cache
def _numbers(a: Side, b: Side) -> tuple[int, ...]:
    """The widths that the kernel rounds to, 0 for values as they are, and the bfloat16 terms of each operand.

    It rounds what is rounded already too: once more changes nothing, and tells it the boxes' scales.
    """
    fuses = NativeEngine().fuses_rounding
    bits = (side.fmt.bits if side.along and fuses(side.fmt) else 0 for side in (a, b))
    return *bits, *(ops.terms(side.significand_bits) for side in (a, b))
