"""What the operators of :mod:`fairseq_dsq.kernels.ops` refuse, in every implementation and with the same words.

Kernels read and write memory as they are told: nothing reaches them that the functions here have not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_dsq.formats import MIN_BITS, Format, parse
from fairseq_dsq.kernels import masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = "float32, bfloat16 or float16"
# The widest codes that a product rounds its operands to: two bfloat16 terms hold them.
GEMM_BITS = 16
# Seeds are drawn below this.
SEEDS = 2**62


def tensor(x: Tensor) -> None:
    """Refuse what is no float32, bfloat16 or float16.

    Raises:
        TypeError: another dtype, or no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__module__}.{type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected {_NAMES}")


def on_one_device(**tensors: Tensor | None) -> None:
    """Refuse tensors on several devices: a kernel would read the memory of one by the address of another.

    Raises:
        RuntimeError: one line names them.
    """
    if len({x.device for x in tensors.values() if x is not None}) > 1:
        got = ", ".join(f"{name} on {x.device}" for name, x in tensors.items() if x is not None)
        raise RuntimeError(f"got {got}, expected all on one device")


def along(shape: Sequence[int], dim: int) -> None:
    """Refuse a dimension that a tensor of ``shape`` lacks.

    Raises:
        IndexError: as torch's operations do.
    """
    axes = max(1, len(shape))
    if not -axes <= dim < axes:
        raise IndexError(f"dim: got {dim}, expected one of a tensor with {len(shape)} dimensions")


def _seed(value: int | None) -> None:
    if value is not None and not 0 <= value < SEEDS:
        raise ValueError(f"seed: got {value}, expected 0 to 2^62 - 1, or None for nearest rounding")


def _result(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected {_NAMES}")


def _row_of_bytes(data: Tensor, nbytes: int) -> None:
    if data.dtype is not torch.uint8 or data.numel() != nbytes:
        raise ValueError(f"data: got {data.numel()} of {data.dtype}, expected {nbytes} of torch.uint8")
    if data.dim() != 1:
        raise ValueError(f"data: got {data.dim()} dimensions, expected 1")


def quantize(x: Tensor, dim: int, seed: int | None, dtype: torch.dtype) -> None:
    """Refuse what cannot be quantized to ``dtype``.

    Raises:
        TypeError, IndexError, ValueError: one line names the argument.
    """
    tensor(x)
    along(x.shape, dim)
    _seed(seed)
    _result(dtype)


def factorize(x: Tensor, dim: int, seed: int | None) -> None:
    """Refuse what has no rows along ``dim``.

    Raises:
        TypeError, IndexError, ValueError: one line names the argument.
    """
    quantize(x, dim, seed, torch.float32)
    if not x.numel():
        raise ValueError("x: got a tensor without elements, expected some")
    if not x.dim():
        raise ValueError("x: got a tensor without dimensions, expected at least one")


def packed(data: Tensor, shape: Sequence[int], dim: int, fmt: Format, dtype: torch.dtype) -> None:
    """Refuse bytes that are not those of a tensor of ``shape``.

    Raises:
        IndexError, ValueError: one line names the argument.
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: got {list(shape)}, expected no negative size")
    along(shape, dim)
    _result(dtype)
    _row_of_bytes(data, fmt.nbytes(shape, dim))


def quantize_and_pack(x: Tensor, operand: Format, stash: Format, dtype: torch.dtype) -> None:
    """Refuse what cannot be read once for both.

    Raises:
        TypeError, IndexError, ValueError: one line names the argument.
    """
    quantize(x, -1, None, dtype)
    along(x.shape, -2)
    if "tensor" in (operand.group, stash.group):
        raise ValueError("quantize_and_pack: expected formats with a box size: a whole tensor cannot go tile by tile")


def quantize_both(
    x: Tensor, first: Format | None, second: Format | None, stash: Format | None, dtype: torch.dtype, in_terms: bool
) -> None:
    """Refuse what cannot be read once for two directions.

    Raises:
        TypeError, IndexError, ValueError: one line names the argument.
    """
    quantize(x, -1, None, dtype)
    along(x.shape, -2)
    if in_terms and dtype is not torch.float32:
        raise ValueError(f"in_terms: got True with {dtype}, expected torch.float32, of which terms are the sum")
    for fmt in (first, second, stash):
        if fmt is not None and not isinstance(fmt.group, int) and fmt.group != "tensor":
            raise ValueError(f"quantize_both: got {fmt}, expected formats with a box size or one scale for the tensor")


def stacked(xs: Sequence[Tensor], fmts: Sequence[str]) -> None:
    """Refuse tensors that cannot be stacked, and what rounds a stack otherwise than each of them.

    Raises:
        ValueError: one line names the tensors, or the format.
    """
    for fmt in filter(None, fmts):
        if len(xs) > 1 and parse(fmt).mixes:
            raise ValueError(f"quantize_both: got {fmt} for {len(xs)} tensors, expected one, which shares its scale")
    kinds = dict.fromkeys((tuple(x.shape), x.dtype, x.device) for x in xs)
    if len(kinds) != 1:
        got = ", ".join(f"{list(shape)} of {dtype} on {device}" for shape, dtype, device in kinds) or "none"
        raise ValueError(f"xs: got {got}, expected tensors of one shape, dtype and device")


def dropout(x: Tensor, p: float, seed: int) -> None:
    """Refuse a probability or seed that is none."""
    tensor(x)
    if not 0 <= p <= 1:
        raise ValueError(f"p: got {p}, expected 0 to 1")
    _seed(seed)


def mask(x: Tensor, data: Tensor) -> None:
    """Refuse bytes that are no mask of ``x``."""
    tensor(x)
    on_one_device(x=x, data=data)
    _row_of_bytes(data, masks.nbytes(x.numel()))


def gemm(bits: tuple[int, int], terms: tuple[int, int], **tensors: Tensor | None) -> None:
    """Refuse widths that the GEMM kernel does not round to, values that it does not hold, and several devices."""
    on_one_device(**tensors)
    for name, width, count in zip("ab", bits, terms, strict=True):
        if width and not MIN_BITS <= width <= GEMM_BITS:
            raise ValueError(
                f"{name}_bits: got {width}, expected {MIN_BITS} to {GEMM_BITS}, or 0 for values as they are"
            )
        if count not in (1, 2):
            raise ValueError(f"{name}_terms: got {count}, expected 1 or 2")
