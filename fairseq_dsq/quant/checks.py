"""What the operators of :mod:`fairseq_dsq.quant.ops` refuse, in every implementation and with the same words.

Kernels read and write memory as they are told: nothing reaches them that the functions here have not seen. The last
ones take an operator's arguments each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fairseq_dsq.formats import MAX_EXPONENT, MIN_BITS, MIN_EXPONENT, SIGNIFICAND_BITS, check_bits, packed_nbytes
from fairseq_dsq.quant import masks
from fairseq_dsq.quant.reference import CodeSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = "float32, bfloat16 or float16"
_NUMBERS = len(CodeSpec._fields)
# The widths that a product rounds its operands to: two bfloat16 terms hold the first's codes, one the second's.
GEMM_BITS = 16, 9
# Seeds are drawn below this.
SEEDS = 2**62


@cache
def spec(numbers: CodeSpec) -> None:
    """Refuse numbers that no format of scaled integers has.

    Raises:
        ValueError: one line names the number.
    """
    check_bits(numbers.bits)
    if numbers.box_size is not None and numbers.box_size < 1:
        raise ValueError(f"box_size: got {numbers.box_size}, expected an integer >= 1, or None for the whole tensor")
    magnitudes = 1 << (numbers.bits - 1)
    smallest = 1 - magnitudes if numbers.signed_zero else -magnitudes
    for name, code, low, high in (
        ("min_code", numbers.min_code, smallest, 0),
        ("max_code", numbers.max_code, 0, magnitudes - 1),
    ):
        if not low <= code <= high:
            raise ValueError(f"{name}: got {code}, expected {low} to {high} in {numbers.bits} bits")
        magnitude = abs(code)
        if magnitude.bit_length() - (magnitude & -magnitude).bit_length() >= SIGNIFICAND_BITS:
            raise ValueError(f"{name}: got {code}, expected at most {SIGNIFICAND_BITS} significant bits")
    exponent = numbers.fixed_exponent
    if exponent is not None and not MIN_EXPONENT <= exponent <= MAX_EXPONENT:
        raise ValueError(f"fixed_exponent: got {exponent}, expected {MIN_EXPONENT} to {MAX_EXPONENT}, or None")
    if not 0 <= numbers.headroom < 1 << (SIGNIFICAND_BITS - 1):
        raise ValueError(f"headroom: got {numbers.headroom}, expected 0 to {(1 << (SIGNIFICAND_BITS - 1)) - 1}")


def tensor(x: Tensor) -> None:
    """Refuse what is no float32, bfloat16 or float16.

    Raises:
        TypeError: another dtype.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected {_NAMES}")


def along(shape: Sequence[int], dim: int) -> None:
    """Refuse a dimension that a tensor of ``shape`` lacks.

    Raises:
        IndexError: as torch's operations do.
    """
    axes = max(1, len(shape))
    if not -axes <= dim < axes:
        raise IndexError(f"dim: got {dim}, expected one of a tensor with {len(shape)} dimensions")


def seed(value: int | None) -> None:
    """Refuse a seed that no implementation draws.

    Raises:
        ValueError: it is negative or too large.
    """
    if value is not None and not 0 <= value < SEEDS:
        raise ValueError(f"seed: got {value}, expected 0 to 2^62 - 1, or None for nearest rounding")


def result(dtype: torch.dtype) -> None:
    """Refuse a result's dtype.

    Raises:
        ValueError: it is none of float32, bfloat16 and float16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected {_NAMES}")


def row_of_bytes(data: Tensor, nbytes: int) -> None:
    """Refuse bytes that are not as many as a tensor takes, in a row.

    Raises:
        ValueError: another count, dtype or number of dimensions.
    """
    if data.dtype is not torch.uint8 or data.numel() != nbytes:
        raise ValueError(f"data: got {data.numel()} of {data.dtype}, expected {nbytes} of torch.uint8")
    if data.dim() != 1:
        raise ValueError(f"data: got {data.dim()} dimensions, expected 1")


def fake_quantize(x: Tensor, dim: int, *arguments: Any) -> None:
    *numbers, draw, dtype = arguments
    spec(CodeSpec._make(numbers))
    tensor(x)
    along(x.shape, dim)
    seed(draw)
    result(dtype)


def pack(x: Tensor, dim: int, *arguments: Any) -> None:
    fake_quantize(x, dim, *arguments, torch.float32)


def unpack(data: Tensor, shape: Sequence[int], dim: int, *arguments: Any) -> None:
    *numbers, dtype = arguments
    packed = CodeSpec._make(numbers)
    spec(packed)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: got {list(shape)}, expected no negative size")
    along(shape, dim)
    result(dtype)
    row_of_bytes(data, packed_nbytes(shape, dim, packed.bits, packed.box_size))


def quantize_and_pack(x: Tensor, *arguments: Any) -> None:
    operand, stash = (CodeSpec._make(arguments[start : start + _NUMBERS]) for start in (0, _NUMBERS))
    operand_seed, stash_seed, dtype = arguments[2 * _NUMBERS :]
    fake_quantize(x, -1, *operand, operand_seed, dtype)
    fake_quantize(x, -2, *stash, stash_seed, dtype)
    if x.dim() < 2:
        raise ValueError(f"x: got {x.dim()} dimensions, expected at least 2")
    if operand.box_size is None or stash.box_size is None:
        raise ValueError("quantize_and_pack: expected formats with a box size: a whole tensor cannot go tile by tile")
    if (operand_seed is None) != (stash_seed is None):
        raise ValueError(f"seeds: got {operand_seed} and {stash_seed}, expected both or none")


def dropout(x: Tensor, p: float, scale: float, draw: int) -> None:
    tensor(x)
    if not 0 <= p <= 1:
        raise ValueError(f"p: got {p}, expected 0 to 1")
    seed(draw)


def pack_positive(x: Tensor) -> None:
    tensor(x)


def mask(x: Tensor, data: Tensor) -> None:
    tensor(x)
    row_of_bytes(data, masks.nbytes(x.numel()))


def gemm(
    out: Tensor, a: Tensor, b: Tensor, a_bits: int, b_bits: int, terms: int, bias: Tensor | None, accumulate: bool
) -> None:
    for name, bits, most in (("a_bits", a_bits, GEMM_BITS[0]), ("b_bits", b_bits, GEMM_BITS[1])):
        if bits and not MIN_BITS <= bits <= most:
            raise ValueError(f"{name}: got {bits}, expected {MIN_BITS} to {most}, or 0 for values as they are")
    if terms not in (1, 2):
        raise ValueError(f"terms: got {terms}, expected 1 or 2")
