"""What a number format is: element x scale x group.

A tensor is cut into groups along one dimension, the reduction of the GEMM that reads it; a group shares one scale::

    scale    = scale_of(group)                 as it is stored: a byte, or a float32
    elements = encode(group, scale, noise)     float32: the values in units of the scale, rounded to what bits can hold
    values   = decode(elements, scale)         float32
    codes    = to_codes(elements)              integers of `bits` bits, what is stored; from_codes is the inverse

These few methods are a format's readable definition. All that is done with one (rounding, packing, GEMMs, costs,
reports) is made of them here and in :mod:`fairseq_dsq.formats.definition`; kernels are a faster way to the same bits,
for the formats that :meth:`Format.kernel_spec` describes to them.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fairseq_dsq.text import LONGEST, check_choice, quoted

MIN_BITS, MAX_BITS = 2, 32
# Significant bits of a float32.
SIGNIFICAND_BITS = 24
DEFAULT_BOX_SIZE = 16
# Kernels count values in 64 bits: a group of 32-bit codes is far from that.
MAX_BOX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Square:
    """A group of N x N values along a matrix's two dimensions: the same whichever of them a GEMM sums over.

    Shorter at the ends; a matrix is the last two dimensions of a tensor. For weights: what is rounded for the output
    GEMM is what grad_input reads.
    """

    side: int

    def __post_init__(self) -> None:
        check_box_size(self.side)

    def __str__(self) -> str:
        return f"{self.side}x{self.side}"


# Values that share a scale: so many, all of a fibre along the reduction (a token's, a channel's), all of a tensor, or a
# square.
Group = int | Literal["row", "tensor"] | Square
# Of a format's text: box or block sizes, see box_of.
BOXES = "(?:/(?P<box>row|(?P<side>[0-9]+)(?:x(?P=side))?))?"
ScaleRule = Literal["floor", "fit"]
# Kernels that pack rows of 8-bit codes, each row with a float32 scale in front of all codes.
RowKernel = Literal["int8", "log8"]
SCALE_RULES: tuple[ScaleRule, ...] = ("floor", "fit")


# What a scale is: KernelSpec.scale.
POWER_OF_TWO, FLOAT32_SCALE, E4M3_SCALE = range(3)


class KernelSpec(NamedTuple):
    """A format as the kernels take it: DsqFormat in C++, in this order.

    Codes are integers, or minifloats: sign, exponent with a bias of half its range, and mantissa.

    Attributes:
        bits: bits of a code.
        signed_zero: 1 for sign-magnitude codes, minifloats among them, 0 for two's complement.
        box_size: values that share a scale; MAX_BOX_SIZE for a whole row, 0 for the whole tensor.
        fixed_exponent: the biased exponent of every scale; 0 where it follows from the values.
        min_code, max_code: the smallest and the largest integer, or minifloat, which saturates.
        headroom: added to the bits of a box's largest magnitude, a float32, before its exponent is read.
        exponent_bits: of a minifloat; 0 for integers.
        element_exponent: taken from that exponent.
        least_exponent: the smallest biased exponent of a scale.
        scale: POWER_OF_TWO, its exponent in a byte; FLOAT32_SCALE, under which the largest code stands for the largest
            magnitude; or E4M3_SCALE, under a float32 of the tensor, see :mod:`fairseq_dsq.formats.nvfp4`.
    """

    bits: int
    signed_zero: int
    box_size: int
    fixed_exponent: int
    min_code: float
    max_code: float
    headroom: int
    exponent_bits: int = 0
    element_exponent: int = 0
    least_exponent: int = 1
    scale: int = POWER_OF_TWO


# What engines and kernels are told about a format's values, and the methods that it tells of.
_OF_ELEMENTS = ("encode", "decode", "factorize", "to_codes", "from_codes", "of_tensor")
_CLAIMS = {
    "significand_bits": _OF_ELEMENTS,
    "integer_elements": _OF_ELEMENTS,
    "kernel_spec": (*_OF_ELEMENTS, "scale_of"),
    "row_kernel": (*_OF_ELEMENTS, "scale_of"),
}


@dataclass(frozen=True)
class Format(ABC):
    """A number format; an instance is a value, and ``parse(str(fmt)) == fmt``, which :attr:`text` checks.

    Attributes:
        bits: stored bits of an element.
    """

    bits: int

    family: ClassVar[str]
    # Whether it holds zero and negative values, as an operand does; those that do not are for second moments.
    signed: ClassVar[bool] = True
    # Bytes of a stored scale, and what it is stored as.
    scale_bytes: ClassVar[int] = 1
    scale_dtype: ClassVar[torch.dtype] = torch.uint8
    # Bytes of what all of a tensor shares beside that, in front of all else; see of_tensor.
    tensor_bytes: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        """Take back what a parent claims of methods that the class defines anew.

        Each entry of ``_CLAIMS`` whose methods changed is Format's own again, unless the class defines it too: else
        kernels would run the parent's arithmetic for the child.
        """
        parents = [parent for parent in cls.__bases__ if issubclass(parent, Format)]

        def changes(name: str) -> bool:
            return any(getattr(cls, name) is not getattr(parent, name) for parent in parents)

        for claim, methods in _CLAIMS.items():
            if any(map(changes, methods)) and not changes(claim):
                setattr(cls, claim, vars(Format)[claim])

    @property
    @abstractmethod
    def group(self) -> Group:
        """The values that share a scale."""

    @property
    def significand_bits(self) -> int:
        """Significant bits of an element times its inner scale, at most: what a GEMM engine must hold exactly."""
        return SIGNIFICAND_BITS

    @property
    def integer_elements(self) -> bool:
        """Whether elements are integers of ``bits`` bits, sign included: such as run on integer arithmetic."""
        return False

    @property
    def outer_scale(self) -> bool:
        """Whether the scale is no power of two but one for each row, which factors out of a product."""
        return False

    @abstractmethod
    def scale_of(self, groups: Tensor) -> Tensor:
        """The scales of float32 groups (..., values), as they are stored, (..., 1).

        (..., n) where a group stores n values of ``scale_dtype``, in ``scale_bytes`` bytes: a scale and an offset, say.
        """

    @abstractmethod
    def encode(self, groups: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
        """Elements of float32 groups (..., values), as float32.

        Rounds to nearest even; stochastically with ``noise``, uniform in [0, 1) for each value. Elements of groups that
        hold Inf or NaN are unspecified: their scale says NaN.
        """

    @abstractmethod
    def decode(self, elements: Tensor, scale: Tensor) -> Tensor:
        """The float32 values of elements, which are overwritten; a group whose scale says NaN is NaN throughout."""

    @abstractmethod
    def factorize(self, elements: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Elements and scales as factors, both float32, whose product is the value; NaN for a scale that says so."""

    @abstractmethod
    def to_codes(self, elements: Tensor) -> Tensor:
        """Integers below 2^bits, what is stored of elements; they may be overwritten."""

    @abstractmethod
    def from_codes(self, codes: Tensor) -> Tensor:
        """The inverse of :meth:`to_codes`."""

    def of_tensor(self, x: Tensor) -> Format:
        """The format of one tensor: the same, or one that knows what all of the tensor shares."""
        return self

    def tensor_to_bytes(self) -> Tensor:
        """What all of a tensor shares, ``tensor_bytes`` of uint8, of a format that :meth:`of_tensor` gave."""
        return torch.empty(0, dtype=torch.uint8)

    def tensor_from_bytes(self, data: Tensor) -> Format:
        """The inverse of :meth:`tensor_to_bytes`."""
        return self

    @property
    def mixes(self) -> bool:
        """Whether one scale follows from all of a tensor: a sentence's values then depend on its batch."""
        return self.group == "tensor" or self.tensor_bytes > 0

    def by_row(self) -> Format | None:
        """The format with one scale for each row; None where there is no such."""
        return None

    def kernel_spec(self) -> KernelSpec | None:
        """What C++ and Triton need to run the format; None where its definition runs."""
        return None

    @property
    def row_kernel(self) -> RowKernel | None:
        """The kernel that packs and unpacks the format on the CPU where a row is contiguous; None where none does."""
        return None

    @cached_property
    def spec(self) -> KernelSpec | None:
        """:meth:`kernel_spec`, made and checked once: kernels read and write memory as it says.

        Raises:
            ValueError: it contradicts the format, or itself.
        """
        spec = self.kernel_spec()
        if spec is not None:
            _check_spec(self, spec)
        return spec

    @cached_property
    def text(self) -> str:
        """``str``, made and checked once: whatever runs the format is told of it by its text alone.

        Raises:
            ValueError: the text stands for another format, or for none.
        """
        text, instead = str(self), ""
        try:
            if (found := parse(text)) != self:
                instead = f"which is {found!r}"
        except ValueError:
            instead = "which no registered format has"
        if instead:
            raise ValueError(
                f"{type(self).__name__}.__str__: got {text!r} of {self!r}, {instead}: expected a text of its own, "
                "all attributes in it, that formats.parse reads back"
            )
        return text

    def nbytes(self, shape: Sequence[int], dim: int = -1) -> int:
        """Bytes of a packed tensor: for each group its scale and its codes, these rounded up to whole bytes.

        Args:
            shape: the tensor's shape.
            dim: the dimension along which the groups lie.
        """
        count = math.prod(shape)
        if count == 0:
            return 0
        if isinstance(self.group, Square):
            rows, columns = (1, 1, *shape)[-2:]
            squares = (high * wide for high in parts(rows, self.group.side) for wide in parts(columns, self.group.side))
            return self.tensor_bytes + count // (rows * columns) * sum(map(self._group_nbytes, squares))
        length = shape[dim] if shape and self.group != "tensor" else count
        values = length if isinstance(self.group, str) else self.group
        full, rest = length // values, length % values
        per_fibre = full * self._group_nbytes(values) + (self._group_nbytes(rest) if rest else 0)
        return self.tensor_bytes + count // length * per_fibre

    def _group_nbytes(self, values: int) -> int:
        return self.scale_bytes + self.codes_nbytes(values)

    def codes_nbytes(self, values: int) -> int:
        """Bytes of a group's codes, its scale not among them."""
        return -(-values * self.bits // 8)


def rounded(x: Tensor, noise: Tensor | None) -> Tensor:
    """Integers beside float32 ``x``, which may be overwritten: the nearest, of two the even one; zeros keep the sign.

    With ``noise``, uniform in [0, 1), stochastically: the one below, or above where ``noise`` is below the fraction.
    Noise comes in multiples of 2^-24: the expected integer is ``x`` to within that.
    """
    if noise is None:
        return x.round_()
    floor = x.floor()
    return floor.add_(noise < x - floor).copysign_(x)  # lost where a negative number rounds to zero


def parts(length: int, size: int) -> list[int]:
    """The lengths that boxes of ``size`` have along ``length``."""
    return [size] * (length // size) + [length % size] * (length % size > 0)


def box_of(match: re.Match[str], default: int) -> Group:
    """The group that the part :data:`BOXES` of a format's text stands for."""
    text = match["box"]
    if text is None:
        return default
    if text == "row":
        return "row"
    return Square(int(match["side"])) if "x" in text else int(text)


def kernel_box_size(group: Group) -> int:
    """A group as :class:`KernelSpec` has it."""
    if isinstance(group, int):
        return group
    return MAX_BOX_SIZE if group == "row" else 0


def _check_spec(fmt: Format, spec: KernelSpec) -> None:
    for name, got, expected in (
        ("bits", spec.bits, fmt.bits),
        ("box_size", spec.box_size, kernel_box_size(fmt.group)),
        ("scale_bytes", fmt.scale_bytes, 4 if spec.scale == FLOAT32_SCALE else 1),
        ("tensor_bytes", fmt.tensor_bytes, 4 if spec.scale == E4M3_SCALE else 0),
        ("nbytes", type(fmt).nbytes is Format.nbytes and type(fmt).codes_nbytes is Format.codes_nbytes, True),
    ):
        if got != expected:
            raise ValueError(f"{fmt}: {name}: got {got} for the kernels, expected {expected}")
    check_bits(spec.bits)
    magnitudes = 1 << (spec.bits - 1)
    smallest, largest = float(1 - magnitudes if spec.signed_zero else -magnitudes), float(magnitudes - 1)
    if spec.exponent_bits:
        mantissa_bits = spec.bits - 1 - spec.exponent_bits
        if not (2 <= spec.exponent_bits <= 5 and mantissa_bits >= 1 and spec.bits <= 8 and spec.signed_zero):
            raise ValueError(
                f"{fmt}: exponent_bits: got {spec.exponent_bits} of {spec.bits} bits, expected 2 to 5 of at most 8, "
                "a sign and a mantissa beside them"
            )
        largest = (2.0 - 2.0**-mantissa_bits) * 2.0 ** (1 << spec.exponent_bits - 1)
        smallest = -largest
    for name, code, low, high in (
        ("min_code", spec.min_code, smallest, 0),
        ("max_code", spec.max_code, 0, largest),
    ):
        if not low <= code <= high:
            raise ValueError(f"{fmt}: {name}: got {code:.15g}, expected {low:.15g} to {high:.15g} in {spec.bits} bits")
    if not 0 <= spec.fixed_exponent <= 254:
        raise ValueError(f"{fmt}: fixed_exponent: got {spec.fixed_exponent}, expected 0 to 254")
    if not 0 <= spec.headroom < 1 << (SIGNIFICAND_BITS - 1):
        raise ValueError(f"{fmt}: headroom: got {spec.headroom}, expected 0 to {(1 << (SIGNIFICAND_BITS - 1)) - 1}")
    if not 0 <= spec.element_exponent <= 15:
        raise ValueError(f"{fmt}: element_exponent: got {spec.element_exponent}, expected 0 to 15")
    if spec.least_exponent not in (0, 1):
        raise ValueError(f"{fmt}: least_exponent: got {spec.least_exponent}, expected 0 or 1")


def check_bits(bits: int) -> None:
    """Refuse a width that no format has.

    Raises:
        TypeError, ValueError: it is no integer, or out of range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits: got {bits!r}, expected an integer from {MIN_BITS} to {MAX_BITS}")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits: got {bits}, expected {MIN_BITS} to {MAX_BITS} (the sign counts)")


def check_box_size(box_size: Group) -> None:
    """Refuse a number of values that no group has.

    Raises:
        ValueError: it is no positive integer, or too large.
    """
    if isinstance(box_size, Square):
        return
    if isinstance(box_size, bool) or not isinstance(box_size, int) or box_size < 1:
        raise ValueError(f"box_size: got {box_size!r}, expected an integer >= 1")
    if box_size > MAX_BOX_SIZE:
        raise ValueError(f"box_size: got more than {MAX_BOX_SIZE}, expected at most that")


FixedScale = Literal["dynamic", "row", "static"]
FIXED_SCALES: tuple[FixedScale, ...] = ("dynamic", "row", "static")


@dataclass(frozen=True)
class FormatOptions:
    """What the flags say of a format beside its name and q.

    Attributes:
        sign_bit_extra: q counts magnitude bits only; the sign comes on top (``--dsq-sign-bit extra``).
        fixed_scale: fixed point's scale (``--dsq-fixed-scale``): ``dynamic`` follows from the tensor, ``row`` from each
            row, ``static`` makes half the bits fraction.
        scale: how block floating point and dynamic fixed point take theirs from the largest magnitude
            (``--dsq-scale``).
        box_size: values that share a scale, of formats that leave it open (``--dsq-box-size``); None takes the
            format's own default.

    Raises:
        ValueError: another value.
    """

    sign_bit_extra: bool = False
    fixed_scale: FixedScale = "dynamic"
    scale: ScaleRule = "floor"
    box_size: Group | None = None

    def __post_init__(self) -> None:
        check_choice("sign_bit_extra", self.sign_bit_extra, (False, True))
        check_choice("fixed_scale", self.fixed_scale, FIXED_SCALES)
        check_choice("scale", self.scale, SCALE_RULES)

    def bits(self, q: int) -> int:
        """Bits of an element, sign included, for a flag's ``q``."""
        return q + 1 if self.sign_bit_extra else q

    def group(self, default: Group) -> Group:
        """The values that share a scale, of a format that has ``default``."""
        return default if self.box_size is None else self.box_size


Make = Callable[[int, FormatOptions], Format]
Parse = Callable[[str], Format | None]


class _Family(NamedTuple):
    make: Make | None
    parse: Parse
    example: str


_FAMILIES: dict[str, _Family] = {}


def register(name: str, make: Make | None, parse: Parse | None = None, example: str = "") -> None:
    """Make ``name`` a value of ``--dsq-format``.

    Args:
        name: the family's.
        make: gives the format of one q; None for a family that no q stands for, which is no value of the flag.
        parse: gives the format of a text, or None for one of another family; left out, a text is the name and q.
        example: a text or several, for messages and tables; by itself the name and 8.

    Raises:
        ValueError: the name is taken.
    """
    if name in _FAMILIES:
        raise ValueError(f"format {name!r} is registered already")

    def parse_bits(text: str) -> Format | None:
        match = re.fullmatch(rf"{name}([0-9]+)", text)
        return make(int(match[1]), FormatOptions()) if match and make else None

    _FAMILIES[name] = _Family(make, parse or parse_bits, example)
    _parsed.cache_clear()


def unregister(name: str) -> None:
    """Undo :func:`register`."""
    del _FAMILIES[name]
    _parsed.cache_clear()


def names() -> list[str]:
    """The registered families that a q stands for, sorted: the choices of ``--dsq-format``."""
    return sorted(name for name, family in _FAMILIES.items() if family.make)


def examples() -> dict[str, list[str]]:
    """Texts of each registered family."""
    return {name: (family.example or f"{name}8").split(", ") for name, family in _FAMILIES.items()}


def make_format(name: str, q: int, options: FormatOptions = FormatOptions()) -> Format:
    """The format that a flag's name and q stand for.

    Raises:
        ValueError: an unknown name, or a q outside the format's widths.
        TypeError: a q that is not an integer.
    """
    make = _FAMILIES[name].make if name in _FAMILIES else None
    if make is None:
        raise ValueError(f"format: got {name!r}, expected one of {', '.join(names())}")
    return make(q, options)


def parse(text: str) -> Format:
    """The inverse of ``str``: ``bfp4``, ``bfp4/32``, ``bfp8/row``, ``bfp4/16x16``, ``fixed8``, ``fixed8.4``,
    ``int8/row``, ``ternary``, ``log8/row``, ``float32``, ``mxfp4``, ``mxfp8e4m3/16-rceil``, ``nvfp4``, ``fp8e4m3/row``,
    ``bf16``, ``e5m2``.

    Raises:
        ValueError: text that names no format.
        TypeError: no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"format: got {quoted(text)}, expected a text such as {_examples()}")
    if len(text) > LONGEST or not text.isascii():  # int() reads digits of other scripts too
        raise ValueError(f"format: got {quoted(text)}, expected such as {_examples()}")
    return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Format:
    for family in _FAMILIES.values():
        if (fmt := family.parse(text)) is not None:
            return fmt
    raise ValueError(f"format: got {text!r}, expected such as {_examples()}")


def _examples() -> str:
    *others, last = [texts[0] for texts in examples().values()]
    return f"{', '.join(others)} or {last}"
