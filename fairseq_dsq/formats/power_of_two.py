"""Scales that are powers of two, stored as a biased exponent, a byte; 255 says NaN.

float32 arithmetic is exact throughout: a power of two is applied as two factors of half the exponent each, so that
neither over- nor underflows, and no element has more significant bits than a float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_dsq.formats.base import Format

# The exponent of float32's largest and smallest normal numbers.
MIN_EXPONENT, MAX_EXPONENT = -126, 127
EXPONENT_BIAS = 127
# The stored exponent of a group that held Inf or NaN.
NAN_EXPONENT = 255
# What is added to the bits of a float32 to reach the next exponent from any but a power of two.
NEXT_EXPONENT = (1 << 23) - 1


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, for int32 exponents of normal numbers."""
    return ((exponent + EXPONENT_BIAS) << 23).view(torch.float32)


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """float32 ``x`` times 2^exponent, for int32 exponents from -252 to 254, rounded once if at all."""
    half = exponent >> 1
    return (x * _power_of_two(half)).mul_(_power_of_two(exponent - half))


@dataclass(frozen=True)
class PowerOfTwoScaled(Format):
    """A format whose scale is a power of two that follows from the largest magnitude of a group, or is fixed."""

    @property
    def fixed_exponent(self) -> int | None:
        """The exponent of every scale; None where it follows from the values."""
        return None

    @property
    def headroom(self) -> int:
        """What is added to the bits of the largest magnitude, a float32, before its exponent is read."""
        return 0

    @property
    def element_exponent(self) -> int:
        """What is taken from that exponent: the exponent of the largest element under the scale."""
        return 0

    @property
    def least_exponent(self) -> int:
        """The smallest scale's exponent."""
        return MIN_EXPONENT

    def scale_of(self, groups: Tensor) -> Tensor:
        """Biased exponents, up to 254, or 255 for a group that holds Inf or NaN.

        Read from the exponent field of the largest magnitude, never through a logarithm, so that an exact power of two
        keeps its own exponent. Zero and subnormal maxima count as the smallest exponent, and float32's largest
        exponent stays what it is, so that no value rounds to Inf.
        """
        largest = groups.abs().amax(dim=-1, keepdim=True).view(torch.int32)
        exponent = (largest >> 23) & NAN_EXPONENT
        if self.fixed_exponent is None:
            found = ((largest & 0x7FFFFFFF) + self.headroom >> 23).clamp_(max=MAX_EXPONENT + EXPONENT_BIAS)
            found.sub_(self.element_exponent).clamp_(min=self.least_exponent + EXPONENT_BIAS)
        else:
            found = torch.full_like(exponent, self.fixed_exponent + EXPONENT_BIAS)
        return torch.where(exponent == NAN_EXPONENT, exponent, found).to(torch.uint8)


def scaled(elements: Tensor, scale: Tensor, fraction_bits: int = 0) -> Tensor:
    """Elements times 2^-fraction_bits and the power of two that ``scale`` stores, NaN where it says so; overwrites."""
    exponent = scale.to(torch.int32)
    shift = exponent - (fraction_bits + EXPONENT_BIAS)
    half = shift >> 1
    # NaN times anything is NaN: the mark needs no pass of its own.
    first = torch.where(exponent == NAN_EXPONENT, math.nan, _power_of_two(half))
    return elements.mul_(first).mul_(_power_of_two(shift - half))


def descaled(groups: Tensor, scale: Tensor, fraction_bits: int = 0) -> Tensor:
    """Values in units of 2^-fraction_bits times the power of two that ``scale`` stores."""
    return times_power_of_two(groups, (fraction_bits + EXPONENT_BIAS) - scale.to(torch.int32))
