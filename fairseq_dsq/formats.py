"""Number formats: what a value is rounded to and how many bytes it takes.

A format is a frozen dataclass. All of them are *scaled integers*: ``value = code * scale``, where the
power-of-two scale is shared by a box of values. What distinguishes one from another stands in its properties;
:mod:`fairseq_dsq.quant` reads nothing else (``reference.CodeSpec`` is the list), so a new format of this kind is one
dataclass and one :func:`register`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fairseq_dsq.text import LONGEST, quoted

MIN_BITS, MAX_BITS = 2, 32
# float32 has 24 significant bits: no larger code can come out of one.
SIGNIFICAND_BITS = 24
# The exponent of float32's largest and smallest normal numbers.
MIN_EXPONENT, MAX_EXPONENT = -126, 127
EXPONENT_BIAS = 127
DEFAULT_BOX_SIZE = 16
# The kernels count in 64 bits: a box of 32-bit codes is far from that.
MAX_BOX_SIZE = 2**31 - 1
# A box that no row fills.
ROW = MAX_BOX_SIZE
# The stored exponent of a box that held Inf or NaN.
NAN_EXPONENT = 255
Scale = Literal["floor", "fit"]
_FIT = "-fit"  # ends a format's text
SCALES: tuple[Scale, ...] = ("floor", "fit")


def check_bits(bits: int) -> None:
    """Refuse a width that no format has.

    Raises:
        TypeError, ValueError: it is no integer, or out of range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits: got {bits!r}, expected an integer from {MIN_BITS} to {MAX_BITS}")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits: got {bits}, expected {MIN_BITS} to {MAX_BITS} (the sign counts)")


def _largest_code(bits: int) -> int:
    """The largest magnitude ``bits`` bits with the sign hold *and* a float32 can have."""
    magnitude_bits = bits - 1
    return (1 << magnitude_bits) - (1 << max(0, magnitude_bits - SIGNIFICAND_BITS))


def _headroom(bits: int, scale: Scale) -> int:
    """What is added to the bits of the largest magnitude, a float32, before its exponent is read.

    Above the largest code's value lie the last 2^(25-bits) - 1 significands of a binade: the sum carries into the next
    exponent for these. From 25 bits on no float32 lies there.
    """
    return (1 << max(0, SIGNIFICAND_BITS + 1 - bits)) - 1 if scale == "fit" else 0


def _check_scale(scale: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(SCALES)}")


def box_nbytes(values: int, bits: int) -> int:
    """Bytes of a box's codes, its exponent not among them."""
    return -(-values * bits // 8)


def packed_nbytes(shape: Sequence[int], dim: int, bits: int, box_size: int | None) -> int:
    """Bytes of a packed tensor: per box one exponent and its codes, rounded up to whole bytes.

    Args:
        shape: the tensor's shape.
        dim: the dimension along which the boxes lie.
        bits: bits of a code.
        box_size: values that share an exponent; None makes the whole tensor one box, along any ``dim``.
    """
    count = math.prod(shape)
    if count == 0:
        return 0
    length = shape[dim] if shape and box_size is not None else count
    values = length if box_size is None else box_size
    full, rest = length // values, length % values
    per_fibre = full * (1 + box_nbytes(values, bits))
    if rest:
        per_fibre += 1 + box_nbytes(rest, bits)
    return count // length * per_fibre


@dataclass(frozen=True)
class Float32:
    """IEEE float32: the identity. Nothing is rounded and the stash is the tensor itself."""

    bits: int = 32

    def __post_init__(self) -> None:
        if self.bits != 32:
            raise ValueError(f"bits: got {self.bits!r}, expected 32 for float32")

    @property
    def box_size(self) -> None:
        """None: nothing is shared."""
        return None

    def nbytes(self, shape: Sequence[int], dim: int = -1) -> int:
        """Bytes of a float32 tensor of ``shape``; ``dim`` does not matter."""
        return 4 * math.prod(shape)

    def __str__(self) -> str:
        return "float32"


@dataclass(frozen=True)
class BlockFloat:
    """Block floating point: boxes of ``box_size`` values share one exponent (Microsoft floating point).

    With E = floor(log2 of the box's largest magnitude), clamped to float32's normal range: scale =
    2^(E - (bits - 2)) and codes are sign-magnitude integers of up to 2^(bits-1) - 1. Two bits are ternary.
    Values above the largest code's clip to it: at 2 bits those from 2^E to 2^(E+1), at 8 the last 1.6 % of these. With
    the scale ``fit``, E is one more where the largest magnitude would clip.
    Source: Rouhani et al., "Pushing the Limits of Narrow Precision Inferencing at Cloud Scale with Microsoft
    Floating Point", NeurIPS 2020.

    Attributes:
        bits: bits of an element, sign included; 2 to 32.
        box_size: values that share an exponent.
        shared_exponent_bits: bits of the stored exponent; only 8 (float32's own) is defined.
        scale: ``floor``, or ``fit``, under which nothing clips but what is within a step of float32's largest number.

    Raises:
        TypeError, ValueError: a width, box size or exponent width that is not defined.
    """

    bits: int
    box_size: int = DEFAULT_BOX_SIZE
    shared_exponent_bits: int = 8
    scale: Scale = "floor"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if isinstance(self.box_size, bool) or not isinstance(self.box_size, int) or self.box_size < 1:
            raise ValueError(f"box_size: got {self.box_size!r}, expected an integer >= 1")
        if self.box_size > MAX_BOX_SIZE:
            raise ValueError(f"box_size: got more than {MAX_BOX_SIZE}, expected at most that")
        if self.shared_exponent_bits != 8:
            raise ValueError(f"shared_exponent_bits: got {self.shared_exponent_bits!r}, expected 8")
        _check_scale(self.scale)

    @property
    def max_code(self) -> int:
        return _largest_code(self.bits)

    @property
    def min_code(self) -> int:
        return -self.max_code

    @property
    def signed_zero(self) -> bool:
        """Sign-magnitude codes keep the sign of zero."""
        return True

    @property
    def fixed_exponent(self) -> int | None:
        return None

    @property
    def headroom(self) -> int:
        return _headroom(self.bits, self.scale)

    def nbytes(self, shape: Sequence[int], dim: int = -1) -> int:
        """Bytes of a packed tensor: per box one exponent and its codes, rounded up to whole bytes.

        A full box of 16 takes 2 * bits + 1 bytes.

        Args:
            shape: the tensor's shape.
            dim: the dimension along which the boxes lie.
        """
        return packed_nbytes(shape, dim, self.bits, self.box_size)

    def __str__(self) -> str:
        boxes = "" if self.box_size == DEFAULT_BOX_SIZE else f"x{self.box_size}"
        return f"bfp{self.bits}{boxes}{_FIT if self.scale == 'fit' else ''}"


@dataclass(frozen=True)
class FixedPoint:
    """Fixed point: two's complement codes with one power-of-two scale for the whole tensor, or for each row.

    Where the scale follows from the tensor, all that a batch holds shares it: a sentence's result then depends on the
    others, and a position's on later ones. A scale per row has no such dependence.

    Attributes:
        bits: bits of an element, sign included; 2 to 32.
        fraction_bits: scale = 2^-fraction_bits, whatever the tensor holds; None takes the scale from the largest
            magnitude, as :class:`BlockFloat` does for a box.
        per_row: one scale for each row along the dimension that a GEMM sums over, not for the tensor.
        scale: how it is taken from there, ``floor`` or ``fit``, as for :class:`BlockFloat`.

    Raises:
        TypeError, ValueError: a width or a scale that is not defined.
    """

    bits: int
    fraction_bits: int | None = None
    per_row: bool = False
    scale: Scale = "floor"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _check_scale(self.scale)
        if self.fraction_bits is not None and self.scale != "floor":
            raise ValueError(f"scale: got {self.scale!r} beside fraction_bits, which is the scale, expected floor")
        fraction = self.fraction_bits
        if fraction is None:
            return
        if self.per_row:
            raise ValueError(f"per_row: got True with fraction_bits {fraction!r}, expected None: a scale that follows")
        if isinstance(fraction, bool) or not isinstance(fraction, int):
            raise TypeError(f"fraction_bits: got {fraction!r}, expected an integer from 0 to {self.bits}")
        if not 0 <= fraction <= self.bits:
            raise ValueError(f"fraction_bits: got {self.fraction_bits!r}, expected 0 to {self.bits}")

    @property
    def box_size(self) -> int | None:
        """None: the whole tensor is one box; else larger than any row."""
        return ROW if self.per_row else None

    @property
    def max_code(self) -> int:
        return _largest_code(self.bits)

    @property
    def min_code(self) -> int:
        """Where the scale follows from the tensor, two's complement's odd code out, -2^(bits-1), stays unused.

        It would double the largest magnitude, and with it the scale of whoever quantizes the result again.
        """
        return -self.max_code if self.fraction_bits is None else -(2 ** (self.bits - 1))

    @property
    def signed_zero(self) -> bool:
        """Two's complement has one zero."""
        return False

    @property
    def fixed_exponent(self) -> int | None:
        """The E that gives the fixed scale, None where it follows from the tensor."""
        return None if self.fraction_bits is None else self.bits - 2 - self.fraction_bits

    @property
    def headroom(self) -> int:
        return _headroom(self.bits, self.scale)

    def nbytes(self, shape: Sequence[int], dim: int = -1) -> int:
        """Bytes of a packed tensor of ``shape``: the codes and one exponent, or one for each row along ``dim``."""
        return packed_nbytes(shape, dim, self.bits, self.box_size)

    def __str__(self) -> str:
        if self.fraction_bits is None:
            return f"fixed{self.bits}{'/row' if self.per_row else ''}{_FIT if self.scale == 'fit' else ''}"
        return f"fixed{self.bits}.{self.fraction_bits}"


Format = Float32 | BlockFloat | FixedPoint
ScaledInteger = BlockFloat | FixedPoint


FixedScale = Literal["dynamic", "row", "static"]
FIXED_SCALES: tuple[FixedScale, ...] = ("dynamic", "row", "static")


@dataclass(frozen=True)
class FormatOptions:
    """What the flags say of a format beside its name and q.

    Attributes:
        sign_bit_extra: q counts magnitude bits only; the sign comes on top (``--dsq-sign-bit extra``).
        fixed_scale: fixed point's scale, one of :data:`FIXED_SCALES` (``--dsq-fixed-scale``): ``dynamic`` follows from
            the tensor, ``row`` from each row, ``static`` makes half the bits fraction.
        scale: how block floating point and dynamic fixed point take theirs from the largest magnitude
            (``--dsq-scale``).
    """

    sign_bit_extra: bool = False
    fixed_scale: FixedScale = "dynamic"
    scale: Scale = "floor"

    def bits(self, q: int) -> int:
        """Bits of an element, sign included, for a flag's ``q``."""
        return q + 1 if self.sign_bit_extra else q


def per_row(fmt: ScaledInteger) -> ScaledInteger:
    """``fmt`` with one scale for each row along the dimension of its boxes; as it is if its scale is the tensor's."""
    return replace(fmt, box_size=ROW) if isinstance(fmt, BlockFloat) else fmt


_FAMILIES: dict[str, Callable[[int, FormatOptions], Format]] = {}


def register(name: str, make: Callable[[int, FormatOptions], Format]) -> None:
    """Make ``name`` a value of ``--dsq-format``; ``make(q, options)`` gives the format of one q."""
    if name in _FAMILIES:
        raise ValueError(f"format {name!r} is registered already")
    _FAMILIES[name] = make


def _fixed(q: int, options: FormatOptions) -> FixedPoint:
    bits = options.bits(q)
    fraction_bits = bits // 2 if options.fixed_scale == "static" else None
    return FixedPoint(bits, fraction_bits, options.fixed_scale == "row", options.scale)


register("bfp", lambda q, options: BlockFloat(options.bits(q), scale=options.scale))
register("fixed", _fixed)
register("float32", lambda q, options: Float32(q))


def names() -> list[str]:
    """The registered format names, sorted: the choices of ``--dsq-format``."""
    return sorted(_FAMILIES)


def make_format(name: str, q: int, options: FormatOptions = FormatOptions()) -> Format:
    """The format that a flag's name and q stand for.

    Raises:
        ValueError: an unknown name, or a q outside the format's widths.
        TypeError: a q that is not an integer.
    """
    if name not in _FAMILIES:
        raise ValueError(f"format: got {name!r}, expected one of {', '.join(names())}")
    return _FAMILIES[name](q, options)


def parse(text: str) -> Format:
    """The inverse of ``str``.

    ``bfp4`` (boxes of 16), ``bfp4x32`` (of 32), ``fixed8`` (dynamic scale), ``fixed8/row`` (one for each row),
    ``fixed8.4`` (four fraction bits), ``float32``; ``bfp4-fit``, ``bfp4x32-fit``, ``fixed8-fit`` and ``fixed8/row-fit``
    (a scale under which nothing clips); a name registered elsewhere with its bits.

    Raises:
        ValueError: text that names no format.
    """
    if len(text) > LONGEST or not text.isascii():  # int() reads digits of other scripts too
        raise ValueError(f"format: got {quoted(text)}, expected such as bfp4 or float32")
    if text == str(Float32()):
        return Float32()
    if match := re.fullmatch(rf"bfp(\d+)(?:x(\d+))?({_FIT})?", text):
        box_size = DEFAULT_BOX_SIZE if match[2] is None else int(match[2])
        return BlockFloat(int(match[1]), box_size, scale="fit" if match[3] else "floor")
    if match := re.fullmatch(rf"fixed(\d+)(/row)?({_FIT})?", text):
        return FixedPoint(int(match[1]), per_row=bool(match[2]), scale="fit" if match[3] else "floor")
    if match := re.fullmatch(r"fixed(\d+)\.(\d+)", text):
        return FixedPoint(int(match[1]), int(match[2]))
    match = re.fullmatch(r"([a-z]\w*?)(\d+)", text)
    if match is None or match[1] not in _FAMILIES:
        raise ValueError(f"format: got {text!r}, expected such as bfp4, bfp4x32, bfp4-fit, fixed8, fixed8.4 or float32")
    return make_format(match[1], int(match[2]))
