"""fake_quantize against the definition, and the properties that follow from it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.common import (
    BLOCK_FLOATS,
    DTYPES,
    DYNAMIC_FIXED,
    FITTED,
    SCALED_INTEGERS,
    SELF_SCALED,
    SHAPES_AND_DIMS,
    STATIC_FIXED,
    WIDTHS,
    any_values,
    assert_equal_bits,
    awkward_tensor,
    code_limits,
    in_boxes,
    property_test,
    quantize_by_scalars,
    related_values,
    scalar_quantize,
    seeded,
    step_of,
    strided_views,
)

from fairseq_dsq.formats import BlockFloat, FixedPoint, Float32
from fairseq_dsq.quantized import ROUNDINGS, fake_quantize

FOUR_BITS = [BlockFloat(4), FixedPoint(4), FixedPoint(4, 2)]
HUGE = torch.finfo(torch.float32).max
SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal


def quantized(values, fmt, **kwargs):
    """A one-dimensional list of floats, quantized."""
    return fake_quantize(torch.tensor(values, dtype=torch.float32), fmt, **kwargs).tolist()


def signed(values):
    """Values that tell -0.0 from 0.0."""
    return [(value, math.copysign(1.0, value)) for value in values]


# The definition


def test_four_bits_of_a_worked_box():
    # The largest magnitude, 1.9, gives E = 0 and scale 1/4; ties go to even; 1.9 saturates at 7.
    values = [1.9, 1.0, 0.125, 0.375, 0.626, -0.875, -0.12, 1.8]
    expected = [1.75, 1.0, 0.0, 0.5, 0.75, -1.0, -0.0, 1.75]
    assert signed(quantized(values, BlockFloat(4))) == signed(expected)


def test_two_bits_are_ternary():
    values = [1.99, -1.99, 1.0, 0.51, 0.5, 0.49, -0.5, -0.51]
    expected = [1.0, -1.0, 1.0, 1.0, 0.0, 0.0, -0.0, -1.0]
    assert signed(quantized(values, BlockFloat(2))) == signed(expected)


def test_dynamic_fixed_point_has_one_scale_for_the_tensor():
    x = torch.zeros(40)
    x[0], x[20], x[39] = 1.0, 0.25, 0.1
    result = fake_quantize(x, FixedPoint(4))
    assert result[[0, 20, 39]].tolist() == [1.0, 0.25, 0.0]
    x[0] = 100.0
    assert fake_quantize(x, FixedPoint(4))[[0, 20, 39]].tolist() == [96.0, 0.0, 0.0]


def test_static_fixed_point_keeps_its_scale_and_saturates_at_both_ends():
    values = [100.0, -100.0, 8.0, -8.0, 7.96, 0.03, 0.04, -0.04, 3.0e38, -3.0e38]
    expected = [7.9375, -8.0, 7.9375, -8.0, 7.9375, 0.0, 0.0625, -0.0625, 7.9375, -8.0]
    assert quantized(values, FixedPoint(8, 4)) == expected


@pytest.mark.parametrize("fmt", SCALED_INTEGERS, ids=str)
def test_equals_the_definition_in_rational_arithmetic(fmt):
    for seed in range(6):
        dtype = DTYPES[seed % 3]
        x = awkward_tensor((12, 33), dtype, seed, finite=isinstance(fmt, FixedPoint))
        x[x.abs().float() < SMALLEST_NORMAL] = 0.0  # subnormal values may flush
        assert_equal_bits(fake_quantize(x, fmt, -1), quantize_by_scalars(x, fmt, -1))


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS, ids=str)
def test_equals_the_definition_along_any_dimension(shape, dim):
    x = awkward_tensor(shape, seed=7)
    x[x.abs() < SMALLEST_NORMAL] = 0.0
    for fmt in (BlockFloat(5), BlockFloat(5, box_size=3), FixedPoint(5), FixedPoint(5, 2)):
        assert_equal_bits(fake_quantize(x, fmt, dim), quantize_by_scalars(x, fmt, dim))


@property_test
@given(values=any_values(), fmt=st.sampled_from(SCALED_INTEGERS + FITTED))
def test_equals_the_definition_on_whatever_hypothesis_thinks_of(values, fmt):
    expected = [value for box in in_boxes(values, fmt) for value in scalar_quantize(box, fmt)]
    assert signed(quantized(values, fmt)) == signed(expected)


# Every code


def representable(code, exponent, bits):
    return math.ldexp(code, exponent - (bits - 2))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_at_every_exponent_comes_back(bits):
    largest = 2 ** (bits - 1) - 1
    codes = [-0.0, *range(-largest, largest + 1)]
    boxes = [[representable(code, e, bits) for code in codes] for e in range(-126, 128)]
    x = torch.tensor(boxes, dtype=torch.float32)
    assert x.isfinite().all()
    assert x.shape[1] == 2**bits
    assert_equal_bits(fake_quantize(x, BlockFloat(bits)), x)
    for row in x[::23]:
        assert_equal_bits(fake_quantize(row, FixedPoint(bits)), row + 0.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_of_a_static_scale_comes_back(bits):
    for fraction_bits in range(bits + 1):
        codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
        values = [math.ldexp(code, -fraction_bits) for code in codes]
        assert quantized(values, FixedPoint(bits, fraction_bits)) == values


@pytest.mark.parametrize("exponent", [-100, -1, 0, 3, 126, 127])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_eighth_of_a_step_goes_to_the_nearest_even_code(bits, exponent):
    eighths = range(-(2 ** (bits + 2)) + 1, 2 ** (bits + 2))
    anchor = representable(2 ** (bits - 1) - 1, exponent, bits)  # holds the exponent of every box
    boxes = [[anchor, math.ldexp(eighth, exponent - (bits - 2) - 3)] for eighth in eighths]
    result = fake_quantize(torch.tensor(boxes, dtype=torch.float32), BlockFloat(bits)).double()
    codes = torch.ldexp(result, torch.tensor(bits - 2 - exponent)).tolist()
    largest = 2 ** (bits - 1) - 1
    for eighth, (anchor_code, code) in zip(eighths, codes, strict=True):
        assert anchor_code == largest
        assert code == max(-largest, min(largest, round(Fraction(eighth, 8)))), f"{eighth}/8 steps"


# What is representable already


@pytest.mark.parametrize("bits", WIDTHS)
def test_representable_values_come_back_bit_for_bit(bits):
    width = bits - 1
    noise = torch.randint(-(2**30), 2**30, (64, 16), generator=seeded(bits)).double()
    codes = torch.trunc(torch.ldexp(noise, torch.tensor(width - 30)))
    codes[:, 0] = 2**width - 1  # the top code, where float32 has it
    codes[:, 1] = -(2 ** (width - 1))
    codes[:, 2] = -0.0
    # What float32 can tell apart: 24 significant bits, rounded towards zero.
    excess = (torch.frexp(codes).exponent - 24).clamp(min=0)
    codes = torch.ldexp(torch.trunc(torch.ldexp(codes, -excess)), excess)
    for exponent in (-126, -60, 0, 60, 127):
        x = torch.ldexp(codes, torch.tensor(exponent - (bits - 2))).float()
        x = torch.where(x.abs() < SMALLEST_NORMAL, x * 0.0, x)
        assert_equal_bits(fake_quantize(x, BlockFloat(bits)), x)
        assert_equal_bits(fake_quantize(x, FixedPoint(bits)), x + 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [BLOCK_FLOATS, DYNAMIC_FIXED], ids=["bfp", "fixed"])
def test_power_of_two_maxima_are_exact(family, dtype):
    exponents = range(-14, 16) if dtype == torch.float16 else range(-126, 128)
    maxima = [math.ldexp(1.0, exponent) for exponent in exponents]
    x = torch.tensor([[m, -m, m / 3, 0.0] for m in maxima], dtype=dtype)
    # One tensor has one fixed-point scale: there each row is a tensor.
    rows = [x] if family is BLOCK_FLOATS else x.split(1)[:: 1 + len(maxima) // 16]
    for fmt in family:
        for row in rows:
            assert_equal_bits(fake_quantize(row, fmt)[:, :2], row[:, :2])


@pytest.mark.parametrize("fmt", BLOCK_FLOATS, ids=str)
def test_block_float_keeps_the_sign_of_zero(fmt):
    values = [-0.0, 0.0, 1.0, -1e-30, 1e-30]
    assert signed(quantized(values, fmt)) == signed([-0.0, 0.0, 1.0, -0.0, 0.0])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", DYNAMIC_FIXED + STATIC_FIXED, ids=str)
def test_fixed_point_has_one_zero(fmt, rounding):
    values = [-0.0, 0.0, -1e-30, 1e-30]
    result = quantized([1.0, *values], fmt, rounding=rounding, generator=seeded(0))
    # -1e-30 is less than 10^-20 of a step: stochastic rounding does not take it to -1 step either.
    assert signed(result[1:]) == signed([0.0] * 4)


# Properties


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_idempotent(rounding):
    @property_test
    @given(values=any_values(), fmt=st.sampled_from(SCALED_INTEGERS + FITTED))
    def check(values, fmt):
        once = fake_quantize(torch.tensor(values), fmt, rounding=rounding, generator=seeded(1))
        for again in ROUNDINGS:
            assert_equal_bits(fake_quantize(once, fmt, rounding=again, generator=seeded(2)), once)

    check()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_scaling_by_a_power_of_two_scales_the_result(rounding):
    @property_test
    @given(values=related_values(), shift=st.integers(-12, 12), fmt=st.sampled_from(SELF_SCALED))
    def check(values, shift, fmt):
        x = torch.tensor(values)
        factor = 2.0**shift
        result = fake_quantize(x * factor, fmt, rounding=rounding, generator=seeded(3))
        expected = fake_quantize(x, fmt, rounding=rounding, generator=seeded(3)) * factor
        assert_equal_bits(result, expected)

    check()


@property_test
@given(values=any_values(), fmt=st.sampled_from(SELF_SCALED + FITTED))
def test_negation_commutes_with_rounding(values, fmt):
    x = torch.tensor(values)
    expected = -fake_quantize(x, fmt)
    assert_equal_bits(fake_quantize(-x, fmt), expected if fmt.signed_zero else expected + 0.0)


@property_test
@given(values=any_values(max_size=16), fmt=st.sampled_from(SCALED_INTEGERS + FITTED))
def test_monotone_within_a_box(values, fmt):
    result = quantized(sorted(values), fmt)
    assert result == sorted(result)


@property_test
@given(values=any_values(), fmt=st.sampled_from(SELF_SCALED + FITTED))
def test_error_is_half_a_step_and_one_where_the_code_saturates(values, fmt):
    _, largest = code_limits(fmt)
    half = Fraction(1, 2)
    result = quantized(values, fmt)
    for box, rounded_box in zip(in_boxes(values, fmt), in_boxes(result, fmt), strict=True):
        step = step_of(box, fmt)
        for value, rounded in zip(box, rounded_box, strict=True):
            saturates = abs(Fraction(value)) > (largest + half) * step
            error_in_steps = abs(Fraction(value) - Fraction(rounded)) / step
            assert error_in_steps <= (1 if saturates else half)


@property_test
@given(values=any_values(), fmt=st.sampled_from(SELF_SCALED + FITTED))
def test_stochastic_rounding_takes_one_of_the_two_neighbours(values, fmt):
    _, largest = code_limits(fmt)
    result = quantized(values, fmt, rounding="stochastic", generator=seeded(4))
    for box, rounded_box in zip(in_boxes(values, fmt), in_boxes(result, fmt), strict=True):
        step = step_of(box, fmt)
        for value, rounded in zip(box, rounded_box, strict=True):
            exact = Fraction(value) / step
            neighbours = {math.floor(exact), math.ceil(exact)}
            clamped = {min(max(code, -largest), largest) for code in neighbours}
            assert Fraction(rounded) / step in clamped


# Special boxes


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", SCALED_INTEGERS, ids=str)
def test_an_all_zero_box_is_zero(fmt, rounding):
    x = torch.tensor([0.0, -0.0] * 10)
    expected = x if isinstance(fmt, BlockFloat) else torch.zeros(20)
    assert_equal_bits(fake_quantize(x, fmt, rounding=rounding), expected)


@pytest.mark.parametrize("fmt", SELF_SCALED, ids=str)
def test_subnormal_values_are_rounded_or_flushed(fmt):
    values = [SMALLEST_NORMAL * part for part in (0.999, 0.75, 0.5, -0.3, 2.0**-23, -(2.0**-23))]
    values = torch.tensor(values).tolist()
    for box in (values, [SMALLEST_NORMAL, *values]):
        for result, rounded in zip(quantized(box, fmt), scalar_quantize(box, fmt), strict=True):
            assert result in (0.0, rounded)


@pytest.mark.parametrize("fmt", SELF_SCALED, ids=str)
def test_huge_values_stay_finite(fmt):
    box = torch.tensor([HUGE, -HUGE, 2.0**127, -(2.0**127), HUGE / 3, 1.0]).tolist()
    result = quantized(box, fmt)
    assert result == scalar_quantize(box, fmt)
    assert all(math.isfinite(value) for value in result)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", BLOCK_FLOATS, ids=str)
def test_a_box_with_inf_or_nan_is_nan_throughout_and_no_other(fmt, rounding):
    x = torch.randn(3, 40, generator=seeded(0))
    clean = fake_quantize(x, fmt, rounding=rounding, generator=seeded(1))
    for special in (math.nan, math.inf, -math.inf):
        x[1, 20] = special
        result = fake_quantize(x, fmt, rounding=rounding, generator=seeded(1))
        assert result[1, 16:32].isnan().all()
        result[1, 16:32] = clean[1, 16:32]
        assert_equal_bits(result, clean)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [FixedPoint(8), FixedPoint(8, 4), FixedPoint(32)], ids=str)
def test_fixed_point_with_inf_or_nan_is_nan_throughout(fmt, dtype, special):
    x = torch.ones(3, 40, dtype=dtype)
    x[1, 20] = special
    assert fake_quantize(x, fmt).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_value_of_a_dtype_does_not_overflow(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest], dtype=dtype)
    for fmt in SELF_SCALED:
        result = fake_quantize(x, fmt)
        assert result.isfinite().all()
        assert result[0] >= largest / 2


# Boxes and shapes


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_a_value_reaches_its_own_box_and_no_other(dim):
    x = torch.rand(19, 35, 18, generator=seeded(0)) + 1.0
    where = (17, 20, 16)
    changed = x.clone()
    changed[where] = 2.0**20  # beside which all of its box becomes zero
    fmt = BlockFloat(4)
    differs = fake_quantize(changed, fmt, dim) != fake_quantize(x, fmt, dim)
    box = [slice(position, position + 1) for position in where]
    start = where[dim] // 16 * 16
    box[dim] = slice(start, start + 16)
    expected = torch.zeros_like(differs)
    expected[tuple(box)] = True
    assert torch.equal(differs, expected)


def test_in_fixed_point_a_value_reaches_the_whole_tensor_along_any_dim():
    x = torch.rand(19, 35, generator=seeded(0)) + 1.0
    x[3, 4] = 2.0**20
    for dim in (0, 1):
        result = fake_quantize(x, FixedPoint(4), dim)
        assert result.count_nonzero() == 1
        assert result[3, 4] == 2.0**20


def test_padding_does_not_leak_out_of_a_short_box():
    # Read on its own, a short last box is what it is at the end of a longer tensor.
    x = torch.randn(3, 37, generator=seeded(0))
    whole = fake_quantize(x, BlockFloat(6))
    assert_equal_bits(whole[:, 32:], fake_quantize(x[:, 32:], BlockFloat(6)))
    assert_equal_bits(whole[:, :32], fake_quantize(x[:, :32], BlockFloat(6)))


@pytest.mark.parametrize("fmt", [BlockFloat(6), FixedPoint(6), FixedPoint(6, 3)], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_strides_do_not_matter(fmt, rounding):
    base = awkward_tensor((40, 36, 6), seed=3, finite=True)
    for view in strided_views(base):
        assert not view.is_contiguous()
        for dim in range(3):
            strided = fake_quantize(view, fmt, dim, rounding, seeded(5))
            contiguous = fake_quantize(view.contiguous(), fmt, dim, rounding, seeded(5))
            assert_equal_bits(strided, contiguous)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS, ids=str)
def test_shape_and_dtype_stay(shape, dim, dtype):
    for fmt in (BlockFloat(4), FixedPoint(4), FixedPoint(4, 2), Float32()):
        result = fake_quantize(torch.ones(shape, dtype=dtype), fmt, dim)
        assert result.shape == shape
        assert result.dtype == dtype


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [*FOUR_BITS, Float32()], ids=str)
def test_the_input_is_left_alone(fmt, dtype, rounding):
    for view in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[1:, :32]):
        x = awkward_tensor((48, 35), dtype, seed=1)
        before = x.clone()
        result = fake_quantize(view(x), fmt, 0, rounding)
        assert_equal_bits(x, before)
        if not isinstance(fmt, Float32):
            result.fill_(0.0)
            assert_equal_bits(x, before)


def test_float32_is_the_identity():
    x = awkward_tensor((5, 40), torch.float32)
    assert fake_quantize(x, Float32()) is x
    assert fake_quantize(x, Float32(), rounding="stochastic") is x


def test_the_result_carries_no_gradient():
    x = torch.randn(4, 32, requires_grad=True)
    assert not fake_quantize(x, BlockFloat(4)).requires_grad


# Stochastic rounding


@pytest.mark.parametrize("fmt", [BlockFloat(2), BlockFloat(8), FixedPoint(4)], ids=str)
@pytest.mark.parametrize("fraction", [1 / 64, 1 / 8, 0.3, 0.5, 0.75, 63 / 64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_rounding_is_unbiased_within_three_sigma(fmt, fraction, sign):
    draws = 150_000
    scale = 2.0 ** -(fmt.bits - 2)
    x = torch.full((draws // 15, 16), sign * fraction * scale)
    x[:, 0] = 1.0  # holds the scale
    result = fake_quantize(x, fmt, rounding="stochastic", generator=seeded(1))[:, 1:]
    sigma = scale * math.sqrt(fraction * (1 - fraction) / draws)
    assert abs(result.double().mean().item() - x[0, 1].item()) <= 3 * sigma
    assert set((result.abs() / scale).unique().tolist()) == {0.0, 1.0}


def test_stochastic_rounding_of_many_values_is_unbiased_within_three_sigma():
    fmt = BlockFloat(5)
    x = torch.rand(20_000, 16, generator=seeded(0)) * 3.6 - 1.8
    x[:, 0] = 1.0  # E = 0, step 1/8; nothing saturates below 1.875
    result = fake_quantize(x, fmt, rounding="stochastic", generator=seeded(1)).double()
    step = 1 / 8
    fraction = (x.double() / step) % 1
    sigma = step * (fraction * (1 - fraction)).sum().sqrt().item()
    assert abs((result - x.double()).sum().item()) <= 3 * sigma
    # As far from x as independent draws are; nearest rounding is half as far.
    spread = ((result - x.double()) ** 2).sum().item()
    assert spread == pytest.approx(sigma**2, rel=0.01)


@pytest.mark.parametrize("make", [BlockFloat, FixedPoint])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_scale_that_fits_makes_stochastic_rounding_of_a_gaussian_unbiased(bits, make):
    x = torch.randn(40_000, 16, generator=seeded(0))
    fmt = make(bits, scale="fit")
    result = fake_quantize(x, fmt, rounding="stochastic", generator=seeded(1))
    # Towards zero or away from it: shrinking is no noise.
    error = (result.double() - x.double()) * x.double().sign()
    step = 2 * x.abs().amax(-1, keepdim=True).double() if make is BlockFloat else 2 * x.abs().max().double()
    step = step * 2.0 ** -(bits - 2)
    sigma = error.square().sum().sqrt().item()
    assert (error.abs() <= step).all()
    assert abs(error.sum().item()) <= 3 * sigma


def test_the_scale_of_the_paper_clips_a_gaussian_at_two_bits():
    x = torch.randn(40_000, 16, generator=seeded(0))
    for scale, low, high in (("floor", 0.905, 0.92), ("fit", 0.995, 1.005)):
        result = fake_quantize(x, BlockFloat(2, scale=scale), rounding="stochastic", generator=seeded(1))
        assert low < ((result * x.sign()).sum() / x.abs().sum()).item() < high


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_pair_of_eighths_of_a_step_under_a_scale_that_fits(bits):
    eighths = torch.arange(0, 8 * 2 ** (bits - 1) + 1) / 8.0
    largest, other = (each.flatten() for each in torch.meshgrid(eighths, eighths, indexing="ij"))
    x = torch.stack([largest, -other], 1)[other <= largest]
    for exponent in (-120, 0, 100):
        boxes = torch.ldexp(x, torch.tensor(exponent))
        for fmt in (BlockFloat(bits, 2, scale="fit"), BlockFloat(bits, 2)):
            assert_equal_bits(fake_quantize(boxes, fmt, 1), quantize_by_scalars(boxes, fmt, 1))
        result = fake_quantize(boxes, BlockFloat(bits, 2, scale="fit"), 1)
        step = torch.tensor([[float(step_of(box, BlockFloat(bits, 2, scale="fit")))] for box in boxes.tolist()])
        assert ((result - boxes).abs() <= step / 2).all()


@pytest.mark.parametrize("fmt", FOUR_BITS, ids=str)
def test_stochastic_rounding_repeats_by_seed(fmt):
    x = torch.randn(8, 40, generator=seeded(0))

    def drawn(seed):
        return fake_quantize(x, fmt, rounding="stochastic", generator=seeded(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    generator = seeded(1)
    first = fake_quantize(x, fmt, rounding="stochastic", generator=generator)
    second = fake_quantize(x, fmt, rounding="stochastic", generator=generator)
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, second)


def test_stochastic_rounding_draws_from_torchs_generator_unless_given_one():
    x = torch.randn(8, 40, generator=seeded(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        first = fake_quantize(x, BlockFloat(4), rounding="stochastic")
        torch.manual_seed(11)
        state = torch.get_rng_state()
        fake_quantize(x, BlockFloat(4), rounding="stochastic", generator=seeded(1))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(fake_quantize(x, BlockFloat(4), rounding="stochastic"), first)


def test_nearest_rounding_draws_nothing():
    generator = seeded(1)
    state = generator.get_state()
    fake_quantize(torch.randn(4, 40), BlockFloat(4), generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_stochastic_rounding_leaves_representable_values_alone():
    x = fake_quantize(awkward_tensor((16, 40), seed=2, finite=True), BlockFloat(4))
    for seed in range(20):
        result = fake_quantize(x, BlockFloat(4), rounding="stochastic", generator=seeded(seed))
        assert_equal_bits(result, x)


# Arguments


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("fmt", [BlockFloat(4), Float32()], ids=str)
def test_other_dtypes_are_refused(fmt, dtype):
    with pytest.raises(TypeError, match=f"x: got {dtype}, expected float32, bfloat16 or float16"):
        fake_quantize(torch.zeros(16, dtype=dtype), fmt)


@pytest.mark.parametrize(("shape", "dim"), [((4, 5), 2), ((4, 5), -3), ((), 1), ((), -2)])
@pytest.mark.parametrize("fmt", [BlockFloat(4), FixedPoint(4), Float32()], ids=str)
def test_a_dim_the_tensor_lacks_is_refused(fmt, shape, dim):
    with pytest.raises(IndexError, match=f"dim: got {dim}, expected .* {len(shape)} dimensions"):
        fake_quantize(torch.zeros(shape), fmt, dim)


@pytest.mark.parametrize("fmt", [BlockFloat(4), FixedPoint(4), Float32()], ids=str)
def test_an_unknown_rounding_is_refused(fmt):
    with pytest.raises(ValueError, match="rounding: got 'up', expected one of nearest, stochastic"):
        fake_quantize(torch.zeros(16), fmt, rounding="up")


def test_the_scalar_reference_gives_what_was_worked_out_by_hand():
    assert step_of([1.9, 0.1], BlockFloat(4)) == Fraction(1, 4)
    assert step_of([2.0], BlockFloat(4)) == Fraction(1, 2)
    assert step_of([0.0], FixedPoint(8, 4)) == Fraction(1, 16)
    assert scalar_quantize([1.9, 0.375, -0.1], BlockFloat(4)) == [1.75, 0.5, 0.0]
    assert all(math.isnan(value) for value in scalar_quantize([1.0, math.inf], BlockFloat(4)))
