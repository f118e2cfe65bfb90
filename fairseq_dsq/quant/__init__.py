"""Quantizers: ``fake_quantize`` (float to float) and ``pack`` / ``unpack`` (float to bytes and back)."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_dsq.formats import Float32, Format
from fairseq_dsq.quant import reference
from fairseq_dsq.quant.packing import Packed, pack_tensor
from fairseq_dsq.quant.reference import Rounding

__all__ = ["ROUNDINGS", "Packed", "Rounding", "fake_quantize", "pack"]

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(x: Tensor, dim: int, rounding: str) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected float32, bfloat16 or float16")
    if not -max(1, x.dim()) <= dim < max(1, x.dim()):
        raise IndexError(f"dim: got {dim}, expected one of a tensor with {x.dim()} dimensions")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: got {rounding!r}, expected one of {', '.join(ROUNDINGS)}")


@torch.no_grad()
def fake_quantize(
    x: Tensor,
    fmt: Format,
    dim: int = -1,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round ``x`` to the values that ``fmt`` can hold.

    Args:
        x: any shape and strides; float32, bfloat16 or float16.
        fmt: the number format.
        dim: the dimension along which the boxes lie: the reduction dimension of the GEMM that reads the result.
        rounding: ``nearest`` (ties to even) or ``stochastic`` (unbiased).
        generator: draws for stochastic rounding; None takes torch's default.

    Returns:
        A tensor of ``x``'s shape and dtype, without gradient; ``x`` itself for :class:`Float32`. A box that holds Inf
        or NaN comes back as NaN throughout. Exact in each dtype: rounding to a coarser grid never needs more
        significant bits than the input had.

    Raises:
        TypeError, IndexError, ValueError: a dtype, dim or rounding that is not supported.
    """
    _check(x, dim, rounding)
    if isinstance(fmt, Float32):
        return x
    return reference.fake_quantize(x, fmt, dim, rounding, generator)


@torch.no_grad()
def pack(
    x: Tensor,
    fmt: Format,
    dim: int = -1,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Packed:
    """Quantize ``x`` and hold it in ``fmt.nbytes(x.shape, dim)`` bytes.

    ``pack(x, fmt, dim).unpack()`` equals ``fake_quantize(x, fmt, dim)`` bit for bit, also under stochastic rounding
    with generators of equal state. Arguments and errors as for :func:`fake_quantize`.
    """
    _check(x, dim, rounding)
    return pack_tensor(x, fmt, dim, rounding, generator)
