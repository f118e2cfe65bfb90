"""8-bit floats under a float32 scale, as mixed FP8 training has them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_dsq.formats.base import (
    FLOAT32_SCALE,
    SIGNIFICAND_BITS,
    Format,
    FormatOptions,
    Group,
    KernelSpec,
    register,
)
from fairseq_dsq.formats.float_scaled import FloatScaled, group_of, scale_for
from fairseq_dsq.formats.minifloat import E4M3, E5M2, MinifloatElements


@dataclass(frozen=True)
class ScaledFP8(MinifloatElements, FloatScaled):
    """OFP8 under a float32 scale: ``fp8e4m3/tensor``, ``fp8e5m2/row``, ``fp8e4m3/128``.

    scale = largest magnitude / the largest element, 448 or 57,344; element = x / scale, rounded to nearest even, or
    stochastically between neighbours. Nothing clips, and no value becomes Inf. A group that holds Inf or NaN has the
    scale NaN, where OFP8 would saturate Inf or keep it; elements never hold the Inf and NaN of OFP8. Values are rounded
    twice where a product of element and scale is, so that rounding is not exactly idempotent.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433.

    Attributes:
        bits: 8.
        group_size: as for :class:`FloatScaled`.

    Raises:
        TypeError, ValueError: another width, or a group that is not defined.
    """

    bits: int = 8
    group_size: Group = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != self.element.bits:
            raise ValueError(f"bits: got {self.bits}, expected {self.element.bits} for {self.family}")

    @property
    def significand_bits(self) -> int:
        """Those of an element where the scale factors out, else those of a float32."""
        return self.element.significand_bits if self.outer_scale else SIGNIFICAND_BITS

    def kernel_spec(self) -> KernelSpec | None:
        return self.element.kernel_spec(self.group, scale=FLOAT32_SCALE)

    def scale_of(self, groups: Tensor) -> Tensor:
        largest = groups.abs().amax(dim=-1, keepdim=True)
        return torch.where(largest.isfinite(), scale_for(largest, self.element.largest), math.nan)

    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        # A scale of 0: all values are 0, or too small for one.
        values = torch.where(scale > 0, groups / scale, groups * 0.0)
        return self.element.round(values, noise).clamp_(-self.element.largest, self.element.largest)

    def __str__(self) -> str:
        return f"{self.family}/{self.group_size}"


@dataclass(frozen=True)
class ScaledE4M3(ScaledFP8):
    """``fp8e4m3``."""

    family = "fp8e4m3"
    element = E4M3


@dataclass(frozen=True)
class ScaledE5M2(ScaledFP8):
    """``fp8e5m2``."""

    family = "fp8e5m2"
    element = E5M2


def _register(kind: Any) -> None:
    def make(q: int, options: FormatOptions) -> Format:
        return kind(options.bits(q), options.group("tensor"))  # type: ignore[no-any-return]

    def parse(text: str) -> Format | None:
        match = re.fullmatch(rf"{kind.family}/([0-9]+|row|tensor)", text)
        return kind(group_size=group_of(match[1])) if match else None

    register(kind.family, make, parse, f"{kind.family}/tensor, {kind.family}/row")


for _kind in (ScaledE4M3, ScaledE5M2):
    _register(_kind)
