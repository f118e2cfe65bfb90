"""Minifloats: the elements of MX, NVFP4, scaled FP8 and small floats. Sign, exponent, mantissa; subnormals; two zeros.

With M mantissa bits a value of exponent e is a multiple of 2^(e - M); below the smallest exponent the step stays.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairseq_dsq.formats.base import Group, KernelSpec, Square, kernel_box_size, rounded
from fairseq_dsq.formats.power_of_two import EXPONENT_BIAS, times_power_of_two

# Of a float32.
_MANTISSA_BITS = 23


@dataclass(frozen=True)
class Minifloat:
    """A grid of floats, with codes of ``1 + exponent_bits + mantissa_bits`` bits.

    The bias is 2^(exponent_bits - 1) - 1. Codes above that of the largest value are Inf where the mantissa is zero and
    NaN elsewhere.

    Attributes:
        exponent_bits: 2 to 8.
        mantissa_bits: at least 1.
        greatest: the largest value; None as IEEE 754 has it, with the highest exponent for Inf and NaN.
    """

    exponent_bits: int
    mantissa_bits: int
    greatest: float | None = None

    @property
    def bits(self) -> int:
        """Of a code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def significand_bits(self) -> int:
        """Significant bits of a value: the mantissa's, and the leading one."""
        return self.mantissa_bits + 1

    @property
    def _bias(self) -> int:
        return (1 << self.exponent_bits - 1) - 1

    @property
    def least_exponent(self) -> int:
        """Of the smallest normal number."""
        return 1 - self._bias

    @cached_property
    def largest(self) -> float:
        """The largest value."""
        return self.greatest or (2.0 - 2.0**-self.mantissa_bits) * 2.0**self._bias

    @property
    def largest_exponent(self) -> int:
        """Of the largest value."""
        return math.frexp(self.largest)[1] - 1

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal number."""
        return 2.0 ** (self.least_exponent - self.mantissa_bits)

    def round(self, values: Tensor, noise: Tensor | None) -> Tensor:
        """float32 values on the grid, which goes on above the largest: not clipped. Inf and NaN stay.

        Rounds to nearest, ties to the even mantissa; with ``noise``, uniform in [0, 1), to one of the two neighbours,
        the expected value being the value itself.
        """
        exponent = (values.view(torch.int32) >> _MANTISSA_BITS & 0xFF) - EXPONENT_BIAS
        step = exponent.clamp_(self.least_exponent, self.largest_exponent).sub_(self.mantissa_bits)
        units = times_power_of_two(values, -step)
        return times_power_of_two(rounded(units, noise), step)

    def kernel_spec(self, group: Group, headroom: int = 0, **rest: int) -> KernelSpec | None:
        """That of a format of such elements; None for squares, which no kernel runs.

        Args:
            group: the values that share a scale.
            headroom, rest: fields of the spec that tell of the scale.
        """
        if isinstance(group, Square):
            return None
        return KernelSpec(
            self.bits,
            signed_zero=1,
            box_size=kernel_box_size(group),
            fixed_exponent=0,
            min_code=-self.largest,
            max_code=self.largest,
            headroom=headroom,
            exponent_bits=self.exponent_bits,
            **rest,
        )

    @property
    def _offset(self) -> int:
        """The code that would have float32's exponent 0."""
        return EXPONENT_BIAS - self._bias << self.mantissa_bits

    def to_codes(self, values: Tensor) -> Tensor:
        """Integers below 2^bits, of float32 values on the grid."""
        magnitudes, highest = values.abs(), (1 << self.bits - 1) - 1
        normal = (magnitudes.view(torch.int32) >> _MANTISSA_BITS - self.mantissa_bits) - self._offset
        least = 2.0**self.least_exponent
        fraction_bits = torch.full_like(normal, self.mantissa_bits - self.least_exponent)
        subnormal = times_power_of_two(magnitudes.clamp(max=least), fraction_bits).to(torch.int32)
        codes = torch.where(magnitudes < least, subnormal, normal)
        codes = torch.where(magnitudes.isinf(), highest >> self.mantissa_bits << self.mantissa_bits, codes)
        codes = torch.where(magnitudes.isnan(), highest, codes)
        return codes | values.signbit().to(torch.int32) << self.bits - 1

    def from_codes(self, codes: Tensor) -> Tensor:
        """The float32 values of codes, Inf and NaN among them."""
        codes, sign = codes.to(torch.int32), 1 << self.bits - 1
        magnitudes = codes & sign - 1
        mantissas = magnitudes & (1 << self.mantissa_bits) - 1
        normal = (magnitudes + self._offset << _MANTISSA_BITS - self.mantissa_bits).view(torch.float32)
        exponent = torch.full_like(codes, self.least_exponent - self.mantissa_bits)
        subnormal = times_power_of_two(mantissas.to(torch.float32), exponent)
        values = torch.where(magnitudes == mantissas, subnormal, normal)
        infinite = (values > self.largest) & (mantissas == 0)
        values = torch.where(values <= self.largest, values, math.nan).masked_fill_(infinite, math.inf)
        return values.copysign_(0.5 - (codes & sign).to(torch.float32))


# The OCP's: "8-bit Floating Point Specification (OFP8)", 1.0, and "Microscaling Formats (MX)", 1.0. E4M3 has two codes
# for NaN and none for Inf, those of 4 and 6 bits neither; E5M2 is IEEE 754's at 8 bits.
E2M1, E2M3, E3M2 = Minifloat(2, 1, 6.0), Minifloat(2, 3, 7.5), Minifloat(3, 2, 28.0)
E4M3, E5M2 = Minifloat(4, 3, 448.0), Minifloat(5, 2)


class MinifloatElements:
    """What a format is, whose elements lie on a minifloat's grid; beside :class:`Format`, in front of it."""

    @property
    @abstractmethod
    def element(self) -> Minifloat:
        """The grid."""

    def to_codes(self, elements: Tensor) -> Tensor:
        return self.element.to_codes(elements)

    def from_codes(self, codes: Tensor) -> Tensor:
        return self.element.from_codes(codes)
