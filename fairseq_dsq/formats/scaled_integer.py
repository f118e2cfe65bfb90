"""Integers under a power of two: what block floating point, fixed point and MX's integers have in common.

With E the exponent of a group's scale, value = code * 2^(E - (bits - 2)).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairseq_dsq.formats.base import (
    SCALE_RULES,
    SIGNIFICAND_BITS,
    KernelSpec,
    Square,
    check_bits,
    kernel_box_size,
    rounded,
)
from fairseq_dsq.formats.power_of_two import EXPONENT_BIAS, PowerOfTwoScaled, descaled, scaled
from fairseq_dsq.text import check_choice


@dataclass(frozen=True)
class ScaledInteger(PowerOfTwoScaled):
    """Integer codes under a power of two that is stored as a biased exponent, a byte; 255 says NaN.

    Attributes:
        bits: bits of a code, sign included; 2 to 32.

    Raises:
        TypeError, ValueError: a width or a scale that is not defined.
    """

    # What ``scale`` may be.
    rules: ClassVar[tuple[str, ...]] = SCALE_RULES

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_choice("scale", self.scale, self.rules)

    @property
    @abstractmethod
    def scale(self) -> str:
        """``floor``: E follows from the power of two below the largest magnitude; ``fit``: twice that if it clips."""

    @property
    @abstractmethod
    def signed_zero(self) -> bool:
        """Whether codes are sign-magnitude, which keeps the sign of zero; two's complement has one zero."""

    @property
    def significand_bits(self) -> int:
        return self.bits - 1

    @property
    def integer_elements(self) -> bool:
        return True

    @property
    def mixes(self) -> bool:
        return self.group == "tensor" and self.fixed_exponent is None

    @property
    def max_code(self) -> int:
        """The largest magnitude that ``bits`` bits with the sign hold *and* a float32 can have."""
        magnitude_bits = self.bits - 1
        return (1 << magnitude_bits) - (1 << max(0, magnitude_bits - SIGNIFICAND_BITS))

    @property
    def min_code(self) -> int:
        """The smallest code."""
        return -self.max_code

    @property
    def headroom(self) -> int:
        """What is added to the bits of the largest magnitude, a float32, before its exponent is read.

        Above the largest code's value lie the last 2^(25-bits) - 1 significands of a binade: the sum carries into the
        next exponent for these. From 25 bits on no float32 lies there.
        """
        return (1 << max(0, SIGNIFICAND_BITS + 1 - self.bits)) - 1 if self.scale == "fit" else 0

    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        """Integers, as float32."""
        codes = rounded(descaled(groups, scale, self.bits - 2), noise).clamp_(self.min_code, self.max_code)
        return codes if self.signed_zero else codes.add_(0.0)  # -0 + 0 = +0

    def decode(self, elements: Tensor, scale: Tensor) -> Tensor:
        """Values of integers."""
        return scaled(elements, scale, self.bits - 2)

    def factorize(self, elements: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes times 2^-(bits - 2), and 2^E."""
        return elements.mul_(2.0 ** (2 - self.bits)), scaled(torch.ones_like(scale, dtype=torch.float32), scale)

    def to_codes(self, elements: Tensor) -> Tensor:
        """Sign-magnitude with the sign in the highest bit, or two's complement."""
        if not self.signed_zero:
            return elements.to(torch.int64) & ((1 << self.bits) - 1)
        negative = elements.signbit().to(torch.int64)
        return elements.abs_().to(torch.int64) | negative << (self.bits - 1)

    def from_codes(self, codes: Tensor) -> Tensor:
        """The inverse of :meth:`to_codes`."""
        sign = 1 << (self.bits - 1)
        if self.signed_zero:
            magnitudes = (codes & (sign - 1)).to(torch.float32)
            return magnitudes.copysign_(0.5 - (codes & sign).bool().to(torch.float32))
        wide = codes.to(torch.int64)
        return ((wide ^ sign) - sign).to(torch.float32)

    def kernel_spec(self) -> KernelSpec | None:
        """The kernels run every format of this kind but those of squares."""
        if isinstance(self.group, Square):
            return None
        exponent = 0 if self.fixed_exponent is None else self.fixed_exponent + EXPONENT_BIAS
        return KernelSpec(
            self.bits,
            int(self.signed_zero),
            kernel_box_size(self.group),
            exponent,
            min_code=float(self.min_code),
            max_code=float(self.max_code),
            headroom=self.headroom,
            element_exponent=self.element_exponent,
            least_exponent=self.least_exponent + EXPONENT_BIAS,
        )
