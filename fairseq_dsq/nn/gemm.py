"""Exact GEMM dispatch: on which arithmetic a product of two quantized operands runs.

All of them multiply the operands' values exactly and accumulate in float32; they differ in speed::

    8 bits and less, one scale per tensor, both:    8-bit integers, sums in 32-bit integers
    9 bits and less (8 significant ones), both:     bfloat16 multipliers, or integers within a box
    10 to 16 bits times 9 and less:                 two bfloat16 terms, or 16-bit integers within a box
    else:                                           float32

On CPUs the kernels of quant/native/gemm.cpp round block floating point on the way, so that a quantized operand is never
written to memory. On AVX2 and on AVX-512 with VNNI they multiply codes, and take boxes of 16 along the reduction alone;
with AVX512-BF16, values in any format. On CUDA, bfloat16 tensor cores multiply (written to be right by construction: it
has not run on one). No process-wide setting of torch is changed, and none changes a product: where one lets float32
products lose bits, what would lose any is multiplied in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_dsq.formats import DEFAULT_BOX_SIZE, MIN_EXPONENT, BlockFloat, FixedPoint, Float32, Format
from fairseq_dsq.nn.context import GemmMode
from fairseq_dsq.quant import native, ops
from fairseq_dsq.quant.ops import BFLOAT16_BITS

# Sign and significand of two bfloat16 terms.
TWO_TERM_BITS = 16
# Sign and significand that float32 products keep under torch's settings (TF32: 10 stored bits, 1 implicit).
KEPT_BITS = {"tf32": 12, "bf16": BFLOAT16_BITS}
INT8_BITS = 8
# Below this many rows, columns or summands, converting to integers and back takes what they save.
INT8_LEAST = 128
# So many products of 8-bit numbers fit a 32-bit sum.
INT8_MOST_SUMMANDS = 2**31 // 2**14 - 1


class Operand(NamedTuple):
    """One operand of a GEMM.

    Attributes:
        tensor: (rows, columns) or (batch, rows, columns).
        fmt: what its values are rounded to.
        reduction: the dimension that the GEMM sums over, -1 or -2.
        boxed: boxes lie along ``reduction``: the product may round it to nearest, again if it is rounded already, which
            changes nothing and tells the kernel the boxes' scales.
    """

    tensor: Tensor
    fmt: Format
    reduction: int
    boxed: bool

    @property
    def rows(self) -> Tensor:
        """Seen with the reduction dimension last."""
        return self.tensor if self.reduction == -1 else self.tensor.mT


class Arithmetic(Enum):
    """Where a product runs."""

    FLOAT32 = "float32"
    KERNEL = "bfloat16 and integers within a box, native kernels"
    CUDA_BFLOAT16 = "bfloat16, CUDA"


def _terms(fmt: Format) -> int | None:
    """bfloat16 terms that hold a value of ``fmt`` exactly; None if two do not."""
    if isinstance(fmt, Float32):
        return None
    return 1 if fmt.bits <= BFLOAT16_BITS else 2 if fmt.bits <= TWO_TERM_BITS else None


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """bfloat16 ones, and a torch whose products of bfloat16 can stay float32."""
    return hasattr(torch.ops.aten.mm, "dtype") and torch.cuda.get_device_capability(device) >= (8, 0)


def arithmetic(x: Tensor, a: Format, b: Format, mode: GemmMode, boxed: bool) -> Arithmetic:
    """What multiplies operands of two formats; ``x`` is one of the tensors, ``boxed`` as both operands'."""
    if mode == "float32" or x.dtype is not torch.float32 or _terms(b) != 1 or _terms(a) is None:
        return Arithmetic.FLOAT32
    if x.device.type == "cpu":
        kernels = native.kernels
        codes = boxed and rounds_on_the_way(a, Arithmetic.KERNEL) and rounds_on_the_way(b, Arithmetic.KERNEL)
        kernel = kernels is not None and kernels.has_gemm and (codes or kernels.gemm_takes_values)
        return Arithmetic.KERNEL if kernel else Arithmetic.FLOAT32
    if x.device.type == "cuda" and torch.version.cuda is not None and _has_tensor_cores(x.device):
        return Arithmetic.CUDA_BFLOAT16
    return Arithmetic.FLOAT32


def _takes_int8(a: Operand, b: Operand) -> bool:
    """Whether two operands of one scale each go through 8-bit integers, and fast."""
    if not all(isinstance(x.fmt, FixedPoint) and x.fmt.box_size is None and x.fmt.bits <= INT8_BITS for x in (a, b)):
        return False
    sizes = (*a.rows.shape, *b.rows.shape)
    return (
        a.tensor.device.type == "cpu"
        and a.tensor.dtype is torch.float32
        and len(sizes) == 4
        and min(sizes) >= INT8_LEAST
        and a.rows.shape[-1] <= INT8_MOST_SUMMANDS
        and bool(torch.cpu._is_vnni_supported())
    )


def _codes(x: Tensor) -> tuple[Tensor, float] | None:
    """int8 codes and their scale of a tensor in fixed point of at most 8 bits; None where it has no such scale.

    The scale is found from the extremes; where the format's own is larger, the codes are multiples.
    """
    low, high = (float(value) for value in torch.aminmax(x))
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    # Two's complement: codes from -128 to 127, so that an exact power of two takes a bit less if it is negative.
    magnitudes = max(high, 0.0), math.nextafter(max(-low, 0.0), 0.0)
    exponent = max(math.frexp(magnitude)[1] for magnitude in magnitudes) - (INT8_BITS - 1)
    if exponent < MIN_EXPONENT and (low, high) != (0.0, 0.0):
        return None
    scale = 2.0 ** max(exponent, MIN_EXPONENT)
    return (x * (1 / scale)).to(torch.int8), scale


def _int8(a: Operand, b: Operand) -> Tensor | None:
    """The product in integers; None where an operand is not finite, or next to nothing."""
    codes_a, codes_b = _codes(a.rows), _codes(b.rows)
    if codes_a is None or codes_b is None:
        return None
    return torch._int_mm(codes_a[0], codes_b[0].mT).to(torch.float32).mul_(codes_a[1]).mul_(codes_b[1])


def rounds_on_the_way(fmt: Format, how: Arithmetic) -> bool:
    """Whether the product itself rounds an operand of this format, to nearest, in boxes along the reduction."""
    return (
        how is Arithmetic.KERNEL
        and isinstance(fmt, BlockFloat)
        and fmt.box_size == DEFAULT_BOX_SIZE
        and fmt.scale == "floor"
    )


def multiply(
    a: Operand, b: Operand, mode: GemmMode, bias: Tensor | None = None, add_to: Tensor | None = None
) -> Tensor:
    """The product of two operands over their reduction dimensions, exact products accumulated in float32.

    Args:
        a: M x K, or K x M with reduction -2; maybe a batch of them.
        b: N x K, or K x N with reduction -2; likewise.
        mode: ``auto``, or ``float32`` for that arithmetic throughout.
        bias: N values added to every row.
        add_to: the product is added to this tensor, which is returned.

    Returns:
        (batch,) M x N.
    """
    how = arithmetic(a.tensor, a.fmt, b.fmt, mode, a.boxed and b.boxed)
    if mode == "auto" and _takes_int8(a, b):
        product = _int8(a, b)
        if product is not None:
            return _finish(product, bias, add_to)
    if how is Arithmetic.KERNEL:
        return _kernel(a, b, bias, add_to)
    if how is Arithmetic.FLOAT32:
        if _loses_bits(a, b):
            return _finish((a.rows.double() @ b.rows.mT.double()).float(), bias, add_to)
        if bias is not None and add_to is None and b.tensor.dim() == 2:
            return torch.nn.functional.linear(a.rows, b.rows, bias)  # half precision rounds once
    return _finish(_PRODUCTS[how](a.rows, b.rows.mT, _terms(a.fmt) or 1), bias, add_to)


def _float32_precision(device: str) -> str:
    """What a process-wide setting of torch makes of float32 products on a device: ``ieee``, ``tf32`` or ``bf16``."""
    backend = {"cpu": "mkldnn", "cuda": "cuda"}.get(device)
    if backend is None:
        return "ieee"
    if hasattr(torch._C, "_get_fp32_precision_getter"):  # since torch 2.9; reading the old names may raise there
        return str(torch._C._get_fp32_precision_getter(backend, "matmul"))
    names = {"highest": "ieee", "high": "tf32", "medium": "bf16" if backend == "mkldnn" else "tf32"}
    return names[torch.get_float32_matmul_precision()]


def _loses_bits(a: Operand, b: Operand) -> bool:
    """Whether torch may cut an operand's quantized values before it multiplies; said once."""
    if a.tensor.dtype is not torch.float32 or any(isinstance(operand.fmt, Float32) for operand in (a, b)):
        return False
    precision = _float32_precision(a.tensor.device.type)
    if max(a.fmt.bits, b.fmt.bits) <= KEPT_BITS.get(precision, 32):
        return False
    _say_float64(precision)
    return True


@cache
def _say_float64(precision: str) -> None:
    warnings.warn(
        f"torch multiplies float32 in {precision} here (torch.set_float32_matmul_precision), which would cut quantized "
        f"operands of more than {KEPT_BITS[precision]} bits: they are multiplied in float64, which is slower",
        stacklevel=2,
    )


def _finish(product: Tensor, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
    if bias is not None:
        product += bias
    return product if add_to is None else add_to.add_(product)


def _kernel(a: Operand, b: Operand, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
    def bits(operand: Operand) -> int:
        return operand.fmt.bits if operand.boxed and rounds_on_the_way(operand.fmt, Arithmetic.KERNEL) else 0

    rows, columns = a.rows, b.rows
    out = rows.new_empty(*rows.shape[:-1], columns.shape[-2]) if add_to is None else add_to
    batched = rows.dim() == 3
    ops.gemm(
        out if batched else out[None],
        rows if batched else rows[None],
        columns if batched else columns[None],
        bits(a), bits(b), _terms(a.fmt) or 1, bias, add_to is not None,
    )  # fmt: skip
    return out


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``x`` of at most 16 significant bits as the exact sum of two bfloat16 values, held in float32."""
    high = (x.view(torch.int32) & -0x10000).view(torch.float32)
    # Inf - Inf is NaN: what is not finite stays in the first.
    return high, torch.where(high.isfinite(), x - high, 0.0)


def _float32(a: Tensor, b: Tensor, terms: int) -> Tensor:
    return a @ b


def _cuda_bfloat16(a: Tensor, b: Tensor, terms: int) -> Tensor:
    product = torch.bmm if a.dim() == 3 else torch.mm
    b = b.bfloat16()
    if terms == 1:
        return product(a.bfloat16(), b, out_dtype=torch.float32)
    high, low = (product(part.bfloat16(), b, out_dtype=torch.float32) for part in split(a))
    return high.add_(low)


_PRODUCTS: dict[Arithmetic, Callable[[Tensor, Tensor, int], Tensor]] = {
    Arithmetic.FLOAT32: _float32,
    Arithmetic.CUDA_BFLOAT16: _cuda_bfloat16,
}
