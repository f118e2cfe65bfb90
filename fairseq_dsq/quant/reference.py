"""The definition of quantization, in plain torch: every other implementation must equal it bit for bit.

Works on boxes: a tensor is cut along one dimension into boxes whose last dimension is the box, see
:func:`split_boxes`. float32 arithmetic is exact throughout: scales are powers of two, applied as two factors of half
the exponent each so that neither over- nor underflows, and no code has more significant bits than a float32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fairseq_dsq.formats import EXPONENT_BIAS, MIN_EXPONENT, NAN_EXPONENT, ScaledInteger

Rounding = Literal["nearest", "stochastic"]


def split_boxes(x: Tensor, box_size: int | None, dim: int) -> list[Tensor]:
    """Cut ``x`` into boxes along ``dim``.

    Args:
        x: any shape.
        box_size: values in a box; None makes the whole tensor one box.
        dim: the dimension along which the boxes lie.

    Returns:
        Tensors (before, boxes, after, values), ``before`` and ``after`` being the elements in front of and behind
        ``dim``: first all full boxes, then the short last ones. Parts without elements are left out. Views of a
        contiguous ``x``: writing to them fills it.
    """
    if x.numel() == 0:
        return []
    if box_size is None:
        return [x.reshape(1, 1, 1, -1)]
    if x.dim() == 0:
        x = x.reshape(1)
    dim = dim % x.dim()
    length = x.shape[dim]
    x = x.reshape(math.prod(x.shape[:dim]), length, -1)
    full = length // box_size
    parts = []
    if full:
        boxes = x[:, : full * box_size].unflatten(1, (full, box_size))
        parts.append(boxes.transpose(2, 3))
    if length % box_size:
        parts.append(x[:, full * box_size :].unsqueeze(1).transpose(2, 3))
    return parts


def box_exponent(boxes: Tensor, fmt: ScaledInteger) -> Tensor:
    """The biased exponent of each box.

    Args:
        boxes: float32 (..., values).
        fmt: decides whether the exponent follows from the box.

    Returns:
        int32 (..., 1): 1 to 254, or 255 for a box that holds Inf or NaN. Read from the exponent field of the largest
        magnitude, never through a logarithm, so that an exact power of two keeps its own exponent. Zero and
        subnormal maxima count as the smallest normal exponent.
    """
    largest = boxes.abs().amax(dim=-1, keepdim=True)
    exponent = (largest.view(torch.int32) >> 23) & NAN_EXPONENT
    if fmt.fixed_exponent is None:
        return exponent.clamp_(min=MIN_EXPONENT + EXPONENT_BIAS)
    fixed = torch.full_like(exponent, fmt.fixed_exponent + EXPONENT_BIAS)
    return torch.where(exponent == NAN_EXPONENT, exponent, fixed)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, for int32 exponents of normal numbers."""
    return ((exponent + EXPONENT_BIAS) << 23).view(torch.float32)


def _round(x: Tensor, rounding: Rounding, generator: torch.Generator | None) -> Tensor:
    """Round float32 ``x``, which is overwritten, to integers."""
    if rounding == "nearest":
        return x.round_()
    if rounding == "stochastic":
        # The fraction of a float32 is exact at any magnitude; draws are multiples of 2^-24, and so is the bias.
        floor = x.floor()
        draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        rounded = floor.add_(draw < x.sub_(floor))
        return rounded
    raise ValueError(f"rounding: got {rounding!r}, expected nearest or stochastic")


def encode(
    boxes: Tensor, exponent: Tensor, fmt: ScaledInteger, rounding: Rounding, generator: torch.Generator | None
) -> Tensor:
    """Integer codes, as float32, of float32 ``boxes`` (..., values) under biased exponents (..., 1).

    Codes of boxes marked NaN are unspecified.
    """
    shift = (fmt.bits - 2 + EXPONENT_BIAS) - exponent
    half = shift >> 1
    codes = (boxes * _power_of_two(half)).mul_(_power_of_two(shift - half))
    if fmt.signed_zero and rounding == "stochastic":
        # floor and the draw lose the sign of what rounds up to zero.
        codes = _round(codes, rounding, generator).copysign_(boxes)
    else:
        codes = _round(codes, rounding, generator)
    codes = codes.clamp_(fmt.min_code, fmt.max_code)
    return codes if fmt.signed_zero else codes.add_(0.0)  # -0 + 0 = +0


def decode(codes: Tensor, exponent: Tensor, fmt: ScaledInteger, out: Tensor) -> None:
    """Write the values of float32 ``codes``, which are overwritten, to ``out``; boxes of exponent 255 become NaN."""
    shift = exponent - (fmt.bits - 2 + EXPONENT_BIAS)
    half = shift >> 1
    # NaN * anything is NaN: the mark needs no pass of its own.
    first = torch.where(exponent == NAN_EXPONENT, math.nan, _power_of_two(half))
    second = _power_of_two(shift - half)
    if out.dtype == torch.float32:
        torch.mul(codes.mul_(first), second, out=out)
    else:
        out.copy_(codes.mul_(first).mul_(second))


def fake_quantize(
    x: Tensor, fmt: ScaledInteger, dim: int, rounding: Rounding, generator: torch.Generator | None
) -> Tensor:
    """See :func:`fairseq_dsq.quant.fake_quantize`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for source, target in zip(split_boxes(x, fmt.box_size, dim), split_boxes(out, fmt.box_size, dim), strict=True):
        boxes = source.float()
        exponent = box_exponent(boxes, fmt)
        decode(encode(boxes, exponent, fmt, rounding, generator), exponent, fmt, target)
    return out
