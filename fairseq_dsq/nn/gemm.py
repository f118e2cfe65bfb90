"""Exact GEMM dispatch: on which arithmetic a product of two quantized operands runs.

All of them multiply the operands' values exactly and accumulate in float32; they differ in speed::

    8 bits and less, one scale per tensor, both:    8-bit integers, sums in 32-bit integers
    9 bits and less (8 significant ones), both:     bfloat16 multipliers, or integers within a box
    10 to 16 bits times 9 and less:                 two bfloat16 terms, or 16-bit integers within a box
    else:                                           float32

On CPUs the kernels of quant/native/gemm.cpp round block floating point on the way, so that a quantized operand is never
written to memory. On AVX2 and on AVX-512 with VNNI they multiply codes, and take boxes of 16 along the reduction alone;
with AVX512-BF16, values in any format. On CPUs with AMX, oneDNN multiplies float32 tensors in bfloat16 where that takes
one term; on CUDA, bfloat16 and TF32 tensor cores do (written to be right by construction: neither has run on such
hardware).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_dsq.formats import MIN_EXPONENT, BlockFloat, FixedPoint, Float32, Format
from fairseq_dsq.nn.context import GemmMode
from fairseq_dsq.quant import native, ops
from fairseq_dsq.quant.ops import BFLOAT16_BITS

# Sign and significand of two bfloat16 terms; of TF32, which has 10 stored and one implicit bit.
TWO_TERM_BITS, TF32_BITS = 16, 12
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
    INTERNAL_BFLOAT16 = "bfloat16 inside float32, oneDNN on AMX"
    CUDA_BFLOAT16 = "bfloat16, CUDA"
    CUDA_TF32 = "TF32, CUDA"


def _terms(fmt: Format) -> int | None:
    """bfloat16 terms that hold a value of ``fmt`` exactly; None if two do not."""
    if isinstance(fmt, Float32):
        return None
    return 1 if fmt.bits <= BFLOAT16_BITS else 2 if fmt.bits <= TWO_TERM_BITS else None


@cache
def _has_amx() -> bool:
    return hasattr(torch.backends.mkldnn, "matmul") and bool(torch.cpu._is_amx_tile_supported())


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """bfloat16 and TF32, and a torch that can ask for them by the product."""
    return hasattr(torch.backends.cuda.matmul, "fp32_precision") and torch.cuda.get_device_capability(device) >= (8, 0)


def arithmetic(x: Tensor, a: Format, b: Format, mode: GemmMode, boxed: bool) -> Arithmetic:
    """What multiplies operands of two formats; ``x`` is one of the tensors, ``boxed`` as both operands'."""
    if mode == "float32" or x.dtype is not torch.float32 or _terms(b) != 1 or _terms(a) is None:
        return Arithmetic.FLOAT32
    if x.device.type == "cpu":
        kernels = native.kernels
        codes = boxed and rounds_on_the_way(a, Arithmetic.KERNEL) and rounds_on_the_way(b, Arithmetic.KERNEL)
        kernel = kernels is not None and kernels.has_gemm and (codes or kernels.gemm_takes_values)
        # AMX multiplies one term several times as fast as the kernel, two terms and their split no faster.
        if _has_amx() and not (kernel and codes and _terms(a) == 2):
            return Arithmetic.INTERNAL_BFLOAT16
        return Arithmetic.KERNEL if kernel else Arithmetic.FLOAT32
    if x.device.type == "cuda" and torch.version.cuda is not None and _has_tensor_cores(x.device):
        if _terms(a) == 1:
            return Arithmetic.CUDA_BFLOAT16
        if a.bits <= TF32_BITS:
            return Arithmetic.CUDA_TF32
    return Arithmetic.FLOAT32


def _takes_int8(a: Operand, b: Operand) -> bool:
    """Whether two operands of one scale each go through 8-bit integers, and fast."""
    if not all(isinstance(each.fmt, FixedPoint) and each.fmt.bits <= INT8_BITS for each in (a, b)):
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

    The scale is found from the largest magnitude; where the format's own is larger, the codes are multiples.
    """
    low, high = (float(value) for value in torch.aminmax(x))
    largest = max(-low, high)
    if not math.isfinite(largest):
        return None
    # -128 * scale is the one value whose magnitude is a power of two beyond the codes.
    exponent = math.frexp(largest if -low < high else math.nextafter(largest, 0.0))[1] - (INT8_BITS - 1)
    if exponent < MIN_EXPONENT and largest > 0:
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
    return how is Arithmetic.KERNEL and isinstance(fmt, BlockFloat) and fmt == BlockFloat(fmt.bits)


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
    if how is Arithmetic.FLOAT32 and bias is not None and add_to is None and b.tensor.dim() == 2:
        return torch.nn.functional.linear(a.rows, b.rows, bias)  # half precision rounds once
    return _finish(_PRODUCTS[how](a.rows, b.rows.mT, _terms(a.fmt) or 1), bias, add_to)


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


@contextlib.contextmanager
def _internal(backend: object, precision: str) -> Iterator[None]:
    """A backend's float32 products in another precision while this lasts."""
    before = backend.fp32_precision  # type: ignore[attr-defined]
    backend.fp32_precision = precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        backend.fp32_precision = before  # type: ignore[attr-defined]


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``x`` of at most 16 significant bits as the exact sum of two bfloat16 values, held in float32."""
    high = (x.view(torch.int32) & -0x10000).view(torch.float32)
    # Inf - Inf is NaN: what is not finite stays in the first.
    return high, torch.where(high.isfinite(), x - high, 0.0)


def _float32(a: Tensor, b: Tensor, terms: int) -> Tensor:
    return a @ b


def _amx(a: Tensor, b: Tensor, terms: int) -> Tensor:
    with _internal(torch.backends.mkldnn.matmul, "bf16"):  # type: ignore[attr-defined]
        if terms == 1:
            return a @ b
        high, low = split(a)
        return (high @ b).add_(low @ b)


def _cuda_bfloat16(a: Tensor, b: Tensor, terms: int) -> Tensor:
    low = a.bfloat16(), b.bfloat16()
    if a.dim() == 3:
        return torch.bmm(*low, out_dtype=torch.float32)
    return torch.mm(*low, out_dtype=torch.float32)


def _cuda_tf32(a: Tensor, b: Tensor, terms: int) -> Tensor:
    with _internal(torch.backends.cuda.matmul, "tf32"):
        return a @ b


_PRODUCTS: dict[Arithmetic, Callable[[Tensor, Tensor, int], Tensor]] = {
    Arithmetic.FLOAT32: _float32,
    Arithmetic.INTERNAL_BFLOAT16: _amx,
    Arithmetic.CUDA_BFLOAT16: _cuda_bfloat16,
    Arithmetic.CUDA_TF32: _cuda_tf32,
}
