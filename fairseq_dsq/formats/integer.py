"""Symmetric integers under a float32 scale, as linear quantization has them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_dsq.formats.base import (
    FLOAT32_SCALE,
    SIGNIFICAND_BITS,
    FormatOptions,
    KernelSpec,
    RowKernel,
    kernel_box_size,
    register,
    rounded,
)
from fairseq_dsq.formats.float_scaled import FloatScaled, scale_for


@dataclass(frozen=True)
class Integer(FloatScaled):
    """Symmetric integers: ``int8/row``, ``int8/tensor``, ``int4/128``.

    scale = largest magnitude / (2^(bits-1) - 1), a float32; code = x / scale, rounded to nearest even, or
    stochastically. Nothing clips, and no value becomes Inf. A group that holds Inf or NaN has the scale NaN. Values are
    rounded twice where a product of code and scale is, so that rounding is not exactly idempotent.

    ``bits`` counts the sign.
    """

    family = "int"

    @property
    def max_code(self) -> int:
        """The largest code; the smallest is its negative."""
        return (1 << self.bits - 1) - 1

    @property
    def significand_bits(self) -> int:
        """Those of a code where the scale factors out, else those of a float32."""
        return self.bits - 1 if self.outer_scale else SIGNIFICAND_BITS

    @property
    def integer_elements(self) -> bool:
        return True

    @property
    def row_kernel(self) -> RowKernel | None:
        return "int8" if (self.bits, self.group_size, self.max_code) == (8, "row", 127) else None

    def kernel_spec(self) -> KernelSpec | None:
        return KernelSpec(
            self.bits,
            signed_zero=0,
            box_size=kernel_box_size(self.group),
            fixed_exponent=0,
            min_code=-self.max_code,
            max_code=self.max_code,
            headroom=0,
            scale=FLOAT32_SCALE,
        )

    def scale_of(self, groups: Tensor) -> Tensor:
        largest = groups.abs().amax(dim=-1, keepdim=True)
        return torch.where(largest.isfinite(), scale_for(largest, self.max_code), math.nan)

    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        codes = torch.where(scale > 0, groups / scale, 0.0)  # a scale of 0: all values are 0, or too small for one
        return rounded(codes, noise).clamp_(-self.max_code, self.max_code).add_(0.0)  # -0 + 0 = +0

    def to_codes(self, elements: Tensor) -> Tensor:
        """Two's complement."""
        return elements.to(torch.int32) & ((1 << self.bits) - 1)

    def from_codes(self, codes: Tensor) -> Tensor:
        sign = 1 << (self.bits - 1)
        return ((codes.to(torch.int32) ^ sign) - sign).to(torch.float32)


def _make(q: int, options: FormatOptions) -> Integer:
    return Integer(options.bits(q), options.group("row"))


register("int", _make, Integer.parsed, "int8/row, int8/tensor, int4/128")
