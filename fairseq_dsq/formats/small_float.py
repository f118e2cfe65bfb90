"""Floats without a scale: bfloat16, float16 and any others of up to 16 bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairseq_dsq.formats.base import Format, Group, check_bits, register
from fairseq_dsq.formats.minifloat import E2M1, E2M3, E3M2, E4M3, Minifloat, MinifloatElements

MOST_BITS = 16
_NAMES = {(8, 7): "bf16", (5, 10): "fp16"}
# E4M3 is OFP8's. Those without a code for NaN cannot stand alone.
_OFP8 = {(4, 3): E4M3}
_WITHOUT_NAN = {(kind.exponent_bits, kind.mantissa_bits): kind for kind in (E2M1, E2M3, E3M2)}


@dataclass(frozen=True)
class SmallFloat(MinifloatElements, Format):
    """Floats as they are: ``bf16``, ``fp16``, ``e5m2``, ``e4m3``, ``e6m9``; nothing is shared.

    IEEE 754 at any width: subnormals, Inf and NaN, which stay what they are; nearest even; what rounds past the largest
    value becomes Inf. ``e8m7`` is bfloat16 and ``e5m10`` float16. ``e4m3`` is OFP8's instead, largest 448, in its
    saturating mode: finite values saturate, and Inf, of which it has none, becomes NaN, where OFP8 has the largest
    value. Stochastic rounding is unbiased between neighbours.

    Source: IEEE 754-2019; "OCP 8-bit Floating Point Specification (OFP8)", 1.0.

    Attributes:
        bits: of a code, sign included: 1 + exponent_bits + mantissa_bits.
        exponent_bits: 2 to 8.

    Raises:
        TypeError, ValueError: a width that is not defined; e2m1, e2m3 and e3m2, which the OCP gives no NaN: they need a
            scale.
    """

    bits: int
    exponent_bits: int

    family = "float"
    scale_bytes = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        exponent, mantissa = self.exponent_bits, self.mantissa_bits
        if not (isinstance(exponent, int) and 2 <= exponent <= 8):
            raise ValueError(f"exponent_bits: got {exponent!r}, expected 2 to 8")
        if mantissa < 1 or self.bits > MOST_BITS:
            raise ValueError(f"mantissa_bits: got {mantissa}, expected 1 to {MOST_BITS - 1 - exponent}")
        if (exponent, mantissa) in _WITHOUT_NAN:
            bits, name = self.bits, f"e{exponent}m{mantissa}"
            scaled = "mxfp4 or nvfp4" if bits == 4 else f"mxfp6{name}"
            raise ValueError(f"got {name}, which has no NaN, expected it under a scale: {scaled}")

    @property
    def mantissa_bits(self) -> int:
        """Those of a code that are neither sign nor exponent."""
        return self.bits - 1 - self.exponent_bits

    @cached_property
    def element(self) -> Minifloat:
        """The grid."""
        key = self.exponent_bits, self.mantissa_bits
        return _OFP8.get(key) or Minifloat(*key)

    @property
    def group(self) -> Group:
        return "tensor"

    @property
    def mixes(self) -> bool:
        return False

    @property
    def significand_bits(self) -> int:
        return self.element.significand_bits

    def scale_of(self, groups: Tensor) -> Tensor:
        """None: a tensor without elements."""
        return groups.new_empty(*groups.shape[:-1], 0, dtype=self.scale_dtype)

    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        values, largest = self.element.round(groups, noise), self.element.largest
        if self.element == E4M3:
            return torch.where(groups.isfinite(), values.clamp_(-largest, largest), torch.nan)
        infinite = torch.full_like(values, torch.inf).copysign_(values)
        return torch.where(values.abs() > largest, infinite, values)

    def decode(self, elements: Tensor, scale: Tensor) -> Tensor:
        return elements

    def factorize(self, elements: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return elements, elements.new_ones(*elements.shape[:-1], 1)

    def __str__(self) -> str:
        key = self.exponent_bits, self.mantissa_bits
        return _NAMES.get(key, f"e{key[0]}m{key[1]}")


def _parse(text: str) -> SmallFloat | None:
    if named := {name: key for key, name in _NAMES.items()}.get(text):
        return SmallFloat(1 + sum(named), named[0])
    match = re.fullmatch(r"e([0-9]+)m([0-9]+)", text)
    return SmallFloat(1 + int(match[1]) + int(match[2]), int(match[1])) if match else None


register("float", None, _parse, "bf16, fp16, e4m3, e5m2")
