"""Fixed point: one power-of-two scale for the whole tensor, or for each row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fairseq_dsq.formats.base import FormatOptions, Group, ScaleRule, register
from fairseq_dsq.formats.scaled_integer import ScaledInteger


@dataclass(frozen=True)
class FixedPoint(ScaledInteger):
    """Fixed point in two's complement: ``fixed8``, ``fixed8.4``, ``fixed8/row``, ``fixed8-fit``.

    Where the scale follows from the tensor, all that a batch holds shares it: a sentence's result then depends on the
    others, and a position's on later ones. A scale per row has no such dependence.

    Attributes:
        bits: bits of an element, sign included; 2 to 32.
        fraction_bits: scale = 2^-fraction_bits, whatever the tensor holds; None takes the scale from the largest
            magnitude, as :class:`~fairseq_dsq.formats.bfp.BlockFloat` does for a box.
        per_row: one scale for each row along the dimension that a GEMM sums over, not for the tensor.
        scale: how it is taken from there, ``floor`` or ``fit``, as for block floating point.

    Raises:
        TypeError, ValueError: a width or a scale that is not defined.
    """

    fraction_bits: int | None = None
    per_row: bool = False
    scale: ScaleRule = "floor"

    family = "fixed"
    signed_zero = False

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction = self.fraction_bits
        if fraction is None:
            return
        if self.scale != "floor":
            raise ValueError(f"scale: got {self.scale!r} beside fraction_bits, which is the scale, expected floor")
        if self.per_row:
            raise ValueError(f"per_row: got True with fraction_bits {fraction!r}, expected None: a scale that follows")
        if isinstance(fraction, bool) or not isinstance(fraction, int):
            raise TypeError(f"fraction_bits: got {fraction!r}, expected an integer from 0 to {self.bits}")
        if not 0 <= fraction <= self.bits:
            raise ValueError(f"fraction_bits: got {self.fraction_bits!r}, expected 0 to {self.bits}")

    @property
    def group(self) -> Group:
        return "row" if self.per_row else "tensor"

    def by_row(self) -> FixedPoint | None:
        return self if self.per_row else None

    @property
    def min_code(self) -> int:
        """Where the scale follows from the tensor, two's complement's odd code out, -2^(bits-1), stays unused.

        It would double the largest magnitude, and with it the scale of whoever quantizes the result again.
        """
        return -self.max_code if self.fraction_bits is None else -(2 ** (self.bits - 1))

    @property
    def fixed_exponent(self) -> int | None:
        return None if self.fraction_bits is None else self.bits - 2 - self.fraction_bits

    def __str__(self) -> str:
        if self.fraction_bits is None:
            return f"fixed{self.bits}{'/row' if self.per_row else ''}{'-fit' if self.scale == 'fit' else ''}"
        return f"fixed{self.bits}.{self.fraction_bits}"


def _make(q: int, options: FormatOptions) -> FixedPoint:
    bits = options.bits(q)
    fraction_bits = bits // 2 if options.fixed_scale == "static" else None
    return FixedPoint(bits, fraction_bits, options.fixed_scale == "row", options.scale)


def _parse(text: str) -> FixedPoint | None:
    if match := re.fullmatch(r"fixed([0-9]+)(/row)?(-fit)?", text):
        return FixedPoint(int(match[1]), per_row=bool(match[2]), scale="fit" if match[3] else "floor")
    match = re.fullmatch(r"fixed([0-9]+)\.([0-9]+)", text)
    return FixedPoint(int(match[1]), int(match[2])) if match else None


register("fixed", _make, _parse, "fixed8, fixed16, fixed8.4, fixed8/row")
