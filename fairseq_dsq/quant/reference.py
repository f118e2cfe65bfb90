"""The definition of quantization, in plain torch: every other implementation must equal it bit for bit.

Works on boxes: a tensor is cut along one dimension into boxes whose last dimension is the box, see
:func:`split_boxes`. float32 arithmetic is exact throughout: scales are powers of two, applied as two factors of half
the exponent each so that neither over- nor underflows, and no code has more significant bits than a float32.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_dsq.formats import EXPONENT_BIAS, MAX_EXPONENT, MIN_EXPONENT, NAN_EXPONENT, ScaledInteger


class CodeSpec(NamedTuple):
    """All that quantization reads of a format; see :mod:`fairseq_dsq.formats` for what each property means."""

    bits: int
    box_size: int | None
    min_code: int
    max_code: int
    signed_zero: bool
    fixed_exponent: int | None
    headroom: int = 0


@cache
def code_spec(fmt: ScaledInteger) -> CodeSpec:
    """The spec of a format, registered by whomever."""
    given = {name: getattr(fmt, name) for name in CodeSpec._fields if name not in CodeSpec._field_defaults}
    return CodeSpec(**given, headroom=getattr(fmt, "headroom", 0))


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


def box_exponent(boxes: Tensor, spec: CodeSpec) -> Tensor:
    """The biased exponent of each box.

    Args:
        boxes: float32 (..., values).
        spec: decides whether the exponent follows from the box.

    Returns:
        int32 (..., 1): 1 to 254, or 255 for a box that holds Inf or NaN. Read from the exponent field of the largest
        magnitude, never through a logarithm, so that an exact power of two keeps its own exponent; the spec's headroom
        is added to its bits before. Zero and subnormal maxima count as the smallest normal exponent.
    """
    largest = boxes.abs().amax(dim=-1, keepdim=True).view(torch.int32)
    exponent = (largest >> 23) & NAN_EXPONENT
    if spec.fixed_exponent is None:
        raised = ((largest & 0x7FFFFFFF) + spec.headroom) >> 23
        raised.clamp_(MIN_EXPONENT + EXPONENT_BIAS, MAX_EXPONENT + EXPONENT_BIAS)
        return torch.where(exponent == NAN_EXPONENT, exponent, raised)
    fixed = torch.full_like(exponent, spec.fixed_exponent + EXPONENT_BIAS)
    return torch.where(exponent == NAN_EXPONENT, exponent, fixed)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, for int32 exponents of normal numbers."""
    return ((exponent + EXPONENT_BIAS) << 23).view(torch.float32)


def _mix(h: Tensor) -> Tensor:
    """A permutation of the integers below 2^32 (int64 tensor) that changes half the bits when one bit changes.

    Source: C. Wellons, "Prospecting for Hash Functions", 2018 (lowbias32). A product that overflows int64 is right
    in its lower 32 bits.
    """
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def noise(index: Tensor, seed: int) -> Tensor:
    """Uniform multiples of 2^-24 in [0, 1) for stochastic rounding.

    Args:
        index: int64, an element's place in the contiguous tensor. 2^32 elements apart the noise repeats.
        seed: 0 to 2^62 - 1, of one call.

    Returns:
        float32 of ``index``'s shape: a function of the two alone, so that every implementation and any order of work
        gives the same.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return (_mix(_mix((index + low) & 0xFFFFFFFF) ^ high) >> 8).to(torch.float32).mul_(2.0**-24)


def box_noise(x: Tensor, spec: CodeSpec, dim: int, seed: int | None) -> list[Tensor | None]:
    """The noise of each part of ``split_boxes(x, ...)``; None where ``seed`` is None: nearest rounding."""
    if seed is None:
        return [None] * len(split_boxes(x, spec.box_size, dim))
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    return [noise(part, seed) for part in split_boxes(index, spec.box_size, dim)]


def encode(boxes: Tensor, exponent: Tensor, spec: CodeSpec, noise: Tensor | None) -> Tensor:
    """Integer codes, as float32, of float32 ``boxes`` (..., values) under biased exponents (..., 1).

    Rounds to nearest even, or stochastically with the ``noise`` of each element. Codes of boxes marked NaN are
    unspecified.
    """
    shift = (spec.bits - 2 + EXPONENT_BIAS) - exponent
    half = shift >> 1
    codes = (boxes * _power_of_two(half)).mul_(_power_of_two(shift - half))
    if noise is None:
        codes.round_()
    else:
        # The fraction of a float32 is exact at any magnitude; noise comes in multiples of 2^-24, and so does the bias.
        floor = codes.floor()
        codes = floor.add_(noise < codes.sub_(floor))
        if spec.signed_zero:
            codes.copysign_(boxes)  # lost where a negative number rounds to zero
    codes = codes.clamp_(spec.min_code, spec.max_code)
    return codes if spec.signed_zero else codes.add_(0.0)  # -0 + 0 = +0


def decode(codes: Tensor, exponent: Tensor, spec: CodeSpec, out: Tensor) -> None:
    """Write the values of float32 ``codes``, which are overwritten, to ``out``; boxes of exponent 255 become NaN."""
    shift = exponent - (spec.bits - 2 + EXPONENT_BIAS)
    half = shift >> 1
    # NaN * anything is NaN: the mark needs no pass of its own.
    first = torch.where(exponent == NAN_EXPONENT, math.nan, _power_of_two(half))
    second = _power_of_two(shift - half)
    if out.dtype == torch.float32:
        torch.mul(codes.mul_(first), second, out=out)
    else:
        out.copy_(codes.mul_(first).mul_(second))


def fake_quantize(x: Tensor, spec: CodeSpec, dim: int, seed: int | None, dtype: torch.dtype) -> Tensor:
    """See :func:`fairseq_dsq.quant.fake_quantize`; ``seed`` None rounds to nearest."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    sources, targets = split_boxes(x, spec.box_size, dim), split_boxes(out, spec.box_size, dim)
    for source, target, random in zip(sources, targets, box_noise(x, spec, dim, seed), strict=True):
        boxes = source.float()
        exponent = box_exponent(boxes, spec)
        decode(encode(boxes, exponent, spec, random), exponent, spec, target)
    return out
