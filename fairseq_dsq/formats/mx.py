"""Microscaling (MX): blocks of minifloats or integers under a power of two, as the Open Compute Project has them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from fairseq_dsq.formats.base import (
    BOXES,
    SIGNIFICAND_BITS,
    Format,
    FormatOptions,
    Group,
    KernelSpec,
    box_of,
    check_bits,
    check_box_size,
    register,
)
from fairseq_dsq.formats.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, MinifloatElements
from fairseq_dsq.formats.power_of_two import EXPONENT_BIAS, NEXT_EXPONENT, PowerOfTwoScaled, descaled, scaled
from fairseq_dsq.formats.scaled_integer import ScaledInteger
from fairseq_dsq.text import check_choice

BLOCK_SIZE = 32
# The smallest scale is 2^-127.
LEAST_EXPONENT = -EXPONENT_BIAS

MXRule = Literal["floor", "ceil", "even", "rceil"]
MX_RULES: tuple[MXRule, ...] = ("floor", "ceil", "even", "rceil")
# --dsq-scale, for these formats.
_RULES: dict[str, MXRule] = {"floor": "floor", "fit": "rceil"}


def _headroom(rule: str, mantissa_bits: int, largest_significand: float) -> int:
    """What is added to the bits of a block's largest magnitude before its exponent is read, of a rule.

    Args:
        mantissa_bits: of an element.
        largest_significand: of the largest element, 1 <= it < 2.
    """
    if rule == "ceil":
        return NEXT_EXPONENT
    if rule == "even":
        return 1 << SIGNIFICAND_BITS - 2 - mantissa_bits
    if rule == "rceil":
        return NEXT_EXPONENT - int((largest_significand - 1.0) * (NEXT_EXPONENT + 1))
    return 0


def _check(fmt: Any, bits: int) -> None:
    check_bits(fmt.bits)
    if fmt.bits != bits:
        raise ValueError(f"bits: got {fmt.bits}, expected {bits} for {fmt.family}")
    if fmt.box_size != "row":
        check_box_size(fmt.box_size)
    check_choice("scale", fmt.scale, MX_RULES)


def _text(fmt: Any) -> str:
    blocks = "" if fmt.box_size == BLOCK_SIZE else f"/{fmt.box_size}"
    return f"{fmt.family}{blocks}{'' if fmt.scale == 'floor' else '-' + fmt.scale}"


@dataclass(frozen=True)
class MXFloat(MinifloatElements, PowerOfTwoScaled):
    """Minifloats under a power of two: ``mxfp4``, ``mxfp8e4m3/16``, ``mxfp6e2m3/row``, ``mxfp4/32x32``,
    ``mxfp4-rceil``.

    With m the largest magnitude of a block, P the exponent of the largest element and X that of the scale, 2^X,
    clamped to [-127, 127] and stored in a byte (E8M0)::

        floor    X = floor(log2 m) - P                  the OCP's; values above the largest element's clip
        ceil     X = ceil(log2 m) - P
        even     X = floor(log2 of m, rounded to an element's mantissa, ties up) - P
        rceil    the smallest X at which m does not clip

    From 2^127 on every rule is ``floor``, so that nothing rounds to Inf.

    Elements round to nearest even, or stochastically between neighbours, and saturate. The OCP leaves open what
    becomes of Inf and NaN: a block that holds one has the scale NaN (255) and is NaN throughout. Elements never hold
    the Inf and NaN of E4M3 and E5M2; from_codes knows them.

    Source: "OCP Microscaling Formats (MX) Specification", version 1.0, sections 5 and 6. ``rceil``: NVIDIA's
    conversion of scales, as in cuBLAS.

    Attributes:
        bits: of an element; fixed by the family.
        box_size: values that share a scale; ``row``: all along the reduction; or a square of them.
        scale: the rule.

    Raises:
        TypeError, ValueError: another width, a block size or a rule that is not defined.
    """

    bits: int
    box_size: Group = BLOCK_SIZE
    scale: MXRule = "floor"

    def __post_init__(self) -> None:
        _check(self, self.element.bits)

    @property
    def group(self) -> Group:
        return self.box_size

    def by_row(self) -> MXFloat:
        return replace(self, box_size="row")

    @property
    def significand_bits(self) -> int:
        return self.element.significand_bits

    @property
    def headroom(self) -> int:
        significand = self.element.largest / 2.0**self.element.largest_exponent
        return _headroom(self.scale, self.element.mantissa_bits, significand)

    @property
    def element_exponent(self) -> int:
        return self.element.largest_exponent

    @property
    def least_exponent(self) -> int:
        return LEAST_EXPONENT

    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        """Minifloats."""
        largest = self.element.largest
        return self.element.round(descaled(groups, scale), noise).clamp_(-largest, largest)

    def decode(self, elements: Tensor, scale: Tensor) -> Tensor:
        return scaled(elements, scale)

    def factorize(self, elements: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return elements, scaled(scale.new_ones(scale.shape, dtype=elements.dtype), scale)

    def kernel_spec(self) -> KernelSpec | None:
        return self.element.kernel_spec(
            self.group,
            self.headroom,
            element_exponent=self.element_exponent,
            least_exponent=self.least_exponent + EXPONENT_BIAS,
        )

    def __str__(self) -> str:
        return _text(self)


@dataclass(frozen=True)
class MXFP4(MXFloat):
    """``mxfp4``: E2M1, largest 6."""

    bits: int = 4
    family = "mxfp4"
    element = E2M1


@dataclass(frozen=True)
class MXFP6E2M3(MXFloat):
    """``mxfp6e2m3``: largest 7.5."""

    bits: int = 6
    family = "mxfp6e2m3"
    element = E2M3


@dataclass(frozen=True)
class MXFP6E3M2(MXFloat):
    """``mxfp6e3m2``: largest 28."""

    bits: int = 6
    family = "mxfp6e3m2"
    element = E3M2


@dataclass(frozen=True)
class MXFP8E4M3(MXFloat):
    """``mxfp8e4m3``: largest 448."""

    bits: int = 8
    family = "mxfp8e4m3"
    element = E4M3


@dataclass(frozen=True)
class MXFP8E5M2(MXFloat):
    """``mxfp8e5m2``: largest 57,344; Inf is no element, and values saturate."""

    bits: int = 8
    family = "mxfp8e5m2"
    element = E5M2


@dataclass(frozen=True)
class MXInt8(ScaledInteger):
    """Integers under a power of two: ``mxint8``, ``mxint8/16``, ``mxint8/row``, ``mxint8-rceil``.

    Two's complement codes of 6 fraction bits; -128 stays unused, which the OCP allows. With P = 0 the rule for the
    scale, its byte and its NaN are those of :class:`MXFloat`, as are the attributes and errors; rules other than
    ``floor`` may take 2^-126 for a block below that. Beside ``bfp8/32`` it has one zero.
    """

    bits: int = 8
    box_size: Group = BLOCK_SIZE
    scale: MXRule = "floor"

    family = "mxint8"
    signed_zero = False

    def __post_init__(self) -> None:
        _check(self, 8)

    @property
    def group(self) -> Group:
        return self.box_size

    def by_row(self) -> MXInt8:
        return replace(self, box_size="row")

    @property
    def headroom(self) -> int:
        return _headroom(self.scale, self.bits - 2, self.max_code / (1 << self.bits - 2))

    @property
    def least_exponent(self) -> int:
        return LEAST_EXPONENT

    def __str__(self) -> str:
        return _text(self)


def _register(kind: Any) -> None:
    def make(q: int, options: FormatOptions) -> Format:
        return kind(options.bits(q), options.group(BLOCK_SIZE), _RULES[options.scale])  # type: ignore[no-any-return]

    def parse(text: str) -> Format | None:
        match = re.fullmatch(rf"{kind.family}{BOXES}(?:-(?P<rule>ceil|even|rceil))?", text)
        if match is None:
            return None
        return kind(box_size=box_of(match, BLOCK_SIZE), scale=match["rule"] or "floor")  # type: ignore[no-any-return]

    register(kind.family, make, parse, kind.family)


for _kind in (MXFP4, MXFP6E2M3, MXFP6E3M2, MXFP8E4M3, MXFP8E5M2, MXInt8):
    _register(_kind)
