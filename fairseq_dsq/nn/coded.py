"""Weights that exist as codes only: no float copy is held, and an update adds integers to the codes.

With a weight of integer codes under a scale that stays what it was at first::

    delta = -step / scale                                     what an optimizer would subtract, in codes
    code' = clamp(code + SR(delta))                           SR rounds stochastically, to one of delta's neighbours

A code is an integer, so that rounding delta alone is exact, and the expected code is code + delta where nothing clips.

Source: "Direct Quantized Training of Language Models with Stochastic Rounding", arXiv 2412.04787, whose scale is
implied by the codes, whose noise differs between replicas, and whose weights are held as floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fairseq_dsq.formats import Integer, definition, parse
from fairseq_dsq.formats.float_scaled import scale_for
from fairseq_dsq.gemm import Operand, Side
from fairseq_dsq.text import check_choice

WeightScale = Literal["own", "absmean", "absmax", "mse"]
WEIGHT_SCALES: tuple[WeightScale, ...] = ("own", "absmean", "absmax", "mse")
# The largest code's value, in multiples of the mean magnitude, that are tried for the least squared error.
_MULTIPLES = [tenth / 10 for tenth in range(8, 81)]


def weight_format(text: str) -> Integer:
    """The format of a weight's codes.

    Raises:
        ValueError: text that names no format, or one without integers under a float32 scale of a row or of the tensor.
    """
    fmt = parse(text)
    if not (isinstance(fmt, Integer) and fmt.integer_elements and fmt.outer_scale):
        raise ValueError(f"got {fmt}, expected integers with a scale by row or tensor: int8/row, int4/tensor, ternary")
    return fmt


def code_limits(fmt: Integer, rule: WeightScale) -> tuple[int, int]:
    """The smallest and the largest code; integers under ``absmean`` use two's complement's odd code, as published."""
    return (-fmt.max_code - 1 if rule == "absmean" and fmt.family == "int" else -fmt.max_code), fmt.max_code


def weight_scale(weight: Tensor, fmt: Integer, rule: WeightScale) -> Tensor:
    """The scales that a weight's codes get, float32, N x 1 or 1 x 1.

    A row of zeros, from whose values none follows, has the others' mean.

    Args:
        weight: N x K.
        fmt: one of :func:`weight_format`.
        rule: ``absmax``, the largest magnitude is the largest code; ``absmean``, the mean magnitude is; ``mse``, the
            multiple of the mean magnitude is that has the least squared error; ``own``, as the format does.

    Raises:
        ValueError: nothing but zeros, or another rule.
    """
    check_choice("rule", rule, WEIGHT_SCALES)
    groups = weight.detach().float().reshape(1 if fmt.group == "tensor" else len(weight), -1)
    mean = groups.abs().mean(-1, keepdim=True, dtype=torch.float64).float()
    if rule == "own":
        scale = fmt.scale_of(groups)
    elif rule == "absmax":
        scale = scale_for(groups.abs().amax(-1, keepdim=True), fmt.max_code)
    elif rule == "absmean":
        scale = mean / fmt.max_code
    else:
        largest = groups.abs().amax(-1, keepdim=True)
        scale = _least_squared_error(groups, fmt, [*(mean * multiple for multiple in _MULTIPLES), largest])
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    if scale.is_meta:  # a shape without values
        return scale
    if not (scale != 0).any():
        raise ValueError("holds nothing but zeros, expected values that a scale follows from")
    return torch.where(scale == 0, scale[scale != 0].mean(), scale)


def _least_squared_error(groups: Tensor, fmt: Integer, largest: list[Tensor]) -> Tensor:
    """The scales among those that make ``largest`` the largest code's value, chosen for each group."""
    best, least = largest[0], torch.full_like(largest[0], torch.inf)
    for candidate in largest:
        scale = scale_for(candidate, fmt.max_code)
        error = (fmt.decode(fmt.encode(groups, scale, None), scale) - groups).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return torch.where(least.isfinite(), best, torch.nan)


@dataclass(frozen=True)
class CodedWeight:
    """A weight, N x K, as integer codes and their scale.

    Attributes:
        codes: uint8, N x bytes of K codes, each row starting on a byte.
        scale: float32, N x 1, or 1 x 1.
        shape: (N, K).
        fmt: its format.
    """

    codes: Tensor
    scale: Tensor
    shape: torch.Size
    fmt: Integer

    @classmethod
    def of(cls, weight: Tensor, fmt: Integer, rule: WeightScale = "own") -> CodedWeight:
        """A float weight, rounded to nearest; errors as :func:`weight_scale`."""
        scale = weight_scale(weight, fmt, rule)
        elements = (weight.detach().float() / scale).nan_to_num_(0.0).round_().clamp_(*code_limits(fmt, rule))
        return cls(to_bytes(elements, fmt), scale, weight.shape, fmt)

    @property
    def nbytes(self) -> int:
        """Bytes held: of each row its codes, rounded up to whole bytes, and four of each scale."""
        return self.codes.numel() + 4 * self.scale.numel()

    def integers(self) -> Tensor:
        """The codes as float32, N x K."""
        return integers(self.codes, self.shape[1], self.fmt)

    def dequantize(self) -> Tensor:
        """The weight as float32."""
        return self.integers().mul_(self.scale)

    @property
    def spec(self) -> tuple[torch.Size, Integer]:
        """All but the tensors: ``CodedWeight(codes, scale, *spec)`` puts a weight together again."""
        return self.shape, self.fmt

    def operand(self, side: Side, reduction: int, dtype: torch.dtype) -> Operand:
        """The operand of a GEMM; the codes as they are where the scale stays out of the product."""
        if not side.factored:
            return Operand(self.dequantize().to(dtype), side, reduction)
        return Operand(self.integers(), side, reduction, scale=self.scale)  # across rows one number


def to_bytes(elements: Tensor, fmt: Integer) -> Tensor:
    if fmt.bits == 8:
        return elements.to(torch.int8).view(torch.uint8)
    return definition.to_bytes(fmt.to_codes(elements), fmt.bits)


def integers(codes: Tensor, values: int, fmt: Integer) -> Tensor:
    if fmt.bits == 8:
        return codes.view(torch.int8).float()
    return fmt.from_codes(definition.from_bytes(codes, values, fmt.bits))


def update_codes(codes: Tensor, delta: Tensor, limits: tuple[int, int], seed: int, first: int = 0) -> Tensor:
    """``clamp(codes + SR(delta))``: a function of its arguments alone, on every machine and every replica.

    Args:
        codes: float32 integers.
        delta: finite float32 of their shape.
        limits: the smallest and the largest code.
        seed: of the noise, 0 to 2^62 - 1.
        first: the place of the first of these codes among the weight's.

    Returns:
        float32 integers. The probability of the neighbour that lies away from zero is delta's fraction, to 2^-32.
    """
    places = torch.arange(first, first + codes.numel(), device=codes.device).view(codes.shape)
    whole = delta.trunc()
    threshold = (delta - whole).abs_().mul_(2.0**32).to(torch.int64)  # the fraction of a float32 is exact
    away = (definition.random_bits(places, seed) < threshold).to(torch.float32)
    return whole.add_(away.copysign_(delta)).add_(codes).clamp_(*limits)
