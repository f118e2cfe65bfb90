"""What the quantizer tests share: comparison by bits, awkward tensors and a scalar reference."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from fractions import Fraction
from unittest import mock

import torch
from hypothesis import settings
from hypothesis import strategies as st

from fairseq_dsq import formats
from fairseq_dsq.formats import MAX_BITS, MIN_BITS, BlockFloat, FixedPoint, definition
from fairseq_dsq.formats.scaled_integer import ScaledInteger
from fairseq_dsq.kernels import native, ops
from fairseq_dsq.kernels.ops import BFLOAT16_SIGNIFICAND_BITS

WIDTHS = range(MIN_BITS, MAX_BITS + 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_FLOATS = [BlockFloat(bits) for bits in WIDTHS]
DYNAMIC_FIXED = [FixedPoint(bits) for bits in WIDTHS]
STATIC_FIXED = [FixedPoint(bits, bits // 2) for bits in WIDTHS]
FITTED = [family(bits, scale="fit") for family in (BlockFloat, FixedPoint) for bits in WIDTHS]
MX_NAMES = ("mxfp4", "mxfp6e2m3", "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2", "mxint8")
# Every element, every rule, the blocks that kernels know when compiling and others.
MX_LAYOUTS = ("", "/16-rceil", "/5-even", "/row-ceil", "/64", "/100-rceil", "/1")
MX_FORMATS = [formats.parse(name + layout) for name in MX_NAMES for layout in MX_LAYOUTS]
NVFP4_FORMATS = [formats.parse(f"nvfp4{layout}") for layout in ("", "/32", "/5", "/100", "/1")]
SCALED_INTEGERS = BLOCK_FLOATS + DYNAMIC_FIXED + STATIC_FIXED
# Scaled from what they hold: nothing is further than one step from where it was.
SELF_SCALED = BLOCK_FLOATS + DYNAMIC_FIXED

# (shape, dim): full boxes, short last ones, both, neither; a dimension of one; nothing at all.
SHAPES_AND_DIMS = [
    ((), 0),
    ((), -1),
    ((0,), 0),
    ((3, 0, 4), 0),
    ((3, 0, 4), 1),
    ((1,), 0),
    ((16,), -1),
    ((37,), 0),
    ((4, 48), 1),
    ((35, 6), 0),
    ((2, 19, 3), 1),
    ((5, 1, 7), -2),
    ((2, 3, 17, 2), -2),
]

property_test = settings(deadline=None, max_examples=150, derandomize=True, database=None)


def bit_view(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_equal_bits(actual, expected):
    """Equal shape, dtype and bits; every NaN equals every other."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    same = (bit_view(actual) == bit_view(expected)) | (actual.isnan() & expected.isnan())
    wrong = (~same).nonzero().tolist()
    assert not wrong, (
        f"{len(wrong)} of {same.numel()} differ, first at {wrong[0]}: "
        f"{actual[tuple(wrong[0])].item()!r} for {expected[tuple(wrong[0])].item()!r}"
    )


def kernels_here(*more):
    """The kernels of every instruction set that this CPU runs, by its name, and of those in ``more``."""
    found = {}
    for isa in (*native.ISAS, *more):
        with contextlib.suppress(native.Unavailable):
            found[isa] = native.Kernels(isa)
    return found


@dataclasses.dataclass(frozen=True)
class Odd(ScaledInteger):
    """A format nobody knows: any range of codes, any scale."""

    box_size: int
    limits: tuple
    signed_zero: bool = True
    fixed_exponent: int | None = None

    family = "odd"
    scale = "floor"

    @property
    def group(self):
        return self.box_size

    @property
    def min_code(self):
        return self.limits[0]

    @property
    def max_code(self):
        return self.limits[1]

    def __str__(self):
        low, high = self.limits
        return f"odd{self.bits}:{self.box_size}:{low}:{high}:{int(self.signed_zero)}:{self.fixed_exponent}"


def _parse_odd(text):
    if not text.startswith("odd"):
        return None
    bits, box_size, low, high, signed_zero, exponent = text[3:].split(":")
    exponent = None if exponent == "None" else int(exponent)
    return Odd(int(bits), int(box_size), (int(low), int(high)), bool(int(signed_zero)), exponent)


@contextlib.contextmanager
def odd_registered():
    """Texts of :class:`Odd` are formats in the block."""
    formats.register("odd", lambda q, options: None, _parse_odd)
    try:
        yield
    finally:
        formats.unregister("odd")


def assert_implements_definition(x, fmt, dim, seed, kernels=()):
    """The operators against the functions that define them, bit for bit; under each of ``kernels``, if given."""
    expected = definition.fake_quantize(x, fmt, dim, seed, torch.float32)
    data = definition.pack(x, fmt, dim, seed)
    factors = None
    if (isinstance(fmt.group, str) or fmt.tensor_bytes) and x.numel() and x.dim():
        factors = *definition.factorize(x, fmt, dim, seed), *definition.unpack_factors(data, x.shape, fmt, dim)
    for each in kernels or (native.kernels,):
        with mock.patch.object(native, "kernels", each):
            try:
                _assert_operators_give(x, fmt, dim, seed, expected, data, factors)
            except AssertionError as error:
                error.add_note(f"kernels: {each and each.isa}; {fmt} of {tuple(x.shape)} along {dim}")
                raise


def _assert_operators_give(x, fmt, dim, seed, expected, data, factors):
    assert_equal_bits(ops.fake_quantize(x, dim, fmt.text, seed, torch.float32), expected)
    assert torch.equal(ops.pack(x, dim, fmt.text, seed), data)
    assert_equal_bits(ops.unpack(data, x.shape, dim, fmt.text, torch.float32), expected)
    if fmt.significand_bits <= BFLOAT16_SIGNIFICAND_BITS:
        halves = expected.to(torch.bfloat16)
        assert_equal_bits(ops.fake_quantize(x, dim, fmt.text, seed, torch.bfloat16), halves)
        assert_equal_bits(ops.unpack(data, x.shape, dim, fmt.text, torch.bfloat16), halves)
    if factors is not None:
        elements, scale = ops.factorize(x, dim, fmt.text, seed)
        unpacked = ops.unpack_factors(data, x.shape, dim, fmt.text)
        for actual, wanted in zip((elements, scale, *unpacked), factors, strict=True):
            assert_equal_bits(actual, wanted)
        assert_equal_bits(elements * scale, expected)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def awkward_tensor(shape, dtype=torch.float32, seed=0, finite=False):
    """Very different magnitudes, among them zeros, powers of two, subnormal and huge values.

    Unless ``finite``, one element in forty is Inf or NaN.
    """
    generator = seeded(seed)

    def integers(low, high, size=shape):
        return torch.randint(low, high, size, generator=generator)

    reach = 12 if dtype == torch.float16 else 60
    x = torch.randn(shape, generator=generator)
    row = shape[:1] + (1,) * (len(shape) - 1)
    x = torch.ldexp(x, integers(-6, 3) + integers(-reach, reach, row))
    kind = integers(0, 120)
    x[kind < 8] = 0.0
    x[kind < 4] = -0.0
    power = torch.ldexp(torch.ones(shape), integers(-reach, reach))
    x = torch.where((kind >= 8) & (kind < 16), power, x)
    x = x.to(dtype)
    x[kind == 16] = torch.finfo(dtype).max
    x[kind == 17] = -torch.finfo(dtype).smallest_normal
    x[kind == 18] = torch.finfo(dtype).smallest_normal / 8
    if not finite:
        x[kind == 119] = math.nan
        x[kind == 118] = math.inf
        x[kind == 117] = -math.inf
    return x


def strided_views(x):
    """Non-contiguous tensors of three dimensions from one of at least 2 x 2 x 2."""
    first, *rest = x.shape
    return [x.transpose(0, 2), x[::2, 1::3], x.permute(1, 2, 0), x[:1].expand(first // 8, *rest)]


def power_of_two(exponent):
    return Fraction(2) ** exponent


def box_exponent(values):
    """E = floor(log2 of the largest magnitude), clamped to float32's normal range."""
    largest = max(abs(value) for value in values)
    exponent = math.frexp(largest)[1] - 1 if largest else -126
    return min(max(exponent, -126), 127)


def code_limits(fmt):
    """Smallest and largest code, by the definition.

    A static scale can ask a float32 for more than 24 significant bits: the largest code is then
    the largest that a float32 can have.
    """
    largest = 2 ** (fmt.bits - 1) - 1
    if fmt.bits > 25:
        largest -= largest % 2 ** (fmt.bits - 25)
    static = isinstance(fmt, FixedPoint) and fmt.fraction_bits is not None
    return (-(2 ** (fmt.bits - 1)) if static else -largest), largest


def step_of(values, fmt):
    """The scale of one box (of a whole tensor in fixed point)."""
    if isinstance(fmt, FixedPoint) and fmt.fraction_bits is not None:
        return power_of_two(-fmt.fraction_bits)
    step = power_of_two(box_exponent(values) - (fmt.bits - 2))
    clips = max(abs(value) for value in values) > code_limits(fmt)[1] * step
    return 2 * step if clips and fmt.scale == "fit" and box_exponent(values) < 127 else step


def scalar_quantize(values, fmt):
    """One box of Python floats, rounded to nearest even in exact rational arithmetic."""
    if not all(math.isfinite(value) for value in values):
        return [math.nan] * len(values)
    step = step_of(values, fmt)
    smallest, largest = code_limits(fmt)
    results = []
    for value in values:
        code = min(max(round(Fraction(value) / step), smallest), largest)
        result = float(code * step)
        results.append(math.copysign(result, value) if isinstance(fmt, BlockFloat) else result)
    return results


def quantize_by_scalars(x, fmt, dim):
    """``scalar_quantize`` of every box along ``dim``, put together again."""
    if x.numel() == 0:
        return x
    if isinstance(fmt, FixedPoint):
        return torch.tensor(scalar_quantize(x.flatten().tolist(), fmt), dtype=x.dtype).view(x.shape)
    fibres = x.reshape(1) if x.dim() == 0 else x.movedim(dim, -1)
    results = []
    for fibre in fibres.reshape(-1, fibres.shape[-1]).tolist():
        for box in in_boxes(fibre, fmt):
            results.extend(scalar_quantize(box, fmt))
    result = torch.tensor(results, dtype=x.dtype).view(fibres.shape)
    return result.view(()) if x.dim() == 0 else result.movedim(-1, dim)


@st.composite
def related_values(draw, max_size=40):
    """float32 values of which more than the largest survive; none near the subnormal."""
    exponent = draw(st.integers(-90, 90))
    value = st.builds(
        lambda significand, shift: math.ldexp(significand, exponent - shift),
        st.integers(-(2**24), 2**24),
        st.integers(0, 12),
    )
    return draw(st.lists(value, min_size=1, max_size=max_size))


def any_values(max_size=40):
    """Any finite float32 values but subnormal ones, which may flush."""
    unrelated = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
    return related_values(max_size) | st.lists(unrelated, min_size=1, max_size=max_size)


def in_boxes(values, fmt):
    """The boxes of a list of values."""
    size = len(values) if isinstance(fmt, FixedPoint) else fmt.box_size
    return [values[start : start + size] for start in range(0, len(values), size)]
