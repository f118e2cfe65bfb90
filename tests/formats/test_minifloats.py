"""Minifloats, MX, NVFP4, FP8 and small floats: every code, against gfloat, torch and scalar arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.common import (
    SHAPES_AND_DIMS,
    any_values,
    assert_equal_bits,
    awkward_tensor,
    power_of_two,
    property_test,
    seeded,
)

from fairseq_dsq import formats
from fairseq_dsq.formats import MX_RULES, NVFP4, SmallFloat, definition, parse
from fairseq_dsq.formats.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, Minifloat
from fairseq_dsq.gemm import Side, plan
from fairseq_dsq.kernels import native
from fairseq_dsq.quantized import ROUNDINGS, factorize, fake_quantize, pack

OCP = {"ocp_e2m1": E2M1, "ocp_e2m3": E2M3, "ocp_e3m2": E3M2, "ocp_e4m3": E4M3, "ocp_e5m2": E5M2}
BLOCKS = {name: name[:-4] + "_" + name[-4:] for name in ("mxfp6e2m3", "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2")}
BLOCKS |= {"mxfp4": "mxfp4_e2m1", "mxint8": "mxint8"}
WIDE = {"bfloat16": Minifloat(8, 7), "binary16": Minifloat(5, 10)}
MX_NAMES = ["mxfp4", "mxfp6e2m3", "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2", "mxint8"]
MX_FORMATS = [
    parse(f"{name}{block}{'' if rule == 'floor' else '-' + rule}")
    for name, (block, rule) in itertools.product(MX_NAMES, itertools.product(("", "/16", "/5"), MX_RULES))
]
SCALED = [
    parse(text)
    for text in ("nvfp4", "nvfp4/10", "fp8e4m3/tensor", "fp8e4m3/row", "fp8e5m2/row", "fp8e5m2/tensor", "fp8e4m3/32")
]
SMALL_FLOATS = [parse(text) for text in ("bf16", "fp16", "e4m3", "e5m2", "e2m2", "e6m9", "e8m1", "e2m13", "e3m4")]
ALL = MX_FORMATS + [parse(f"{name}/row") for name in MX_NAMES] + SCALED + SMALL_FLOATS


@pytest.fixture(scope="module")
def gfloat():
    """gfloat, with gfloat.formats."""
    module = pytest.importorskip("gfloat", reason="the oracle gfloat is not installed (extra: dev)")
    pytest.importorskip("gfloat.formats")
    return module


def info(gfloat, name):
    return getattr(gfloat.formats, f"format_info_{name}")


def grid(element):
    """The values >= 0 of an element, rising."""
    values = element.from_codes(torch.arange(1 << element.bits - 1))
    return values[values.isfinite()].double().tolist()


# Every code


@pytest.mark.parametrize("name", [*OCP, *WIDE])
def test_every_code_decodes_as_gfloat_says_and_encodes_back(gfloat, name):
    element, theirs = (OCP | WIDE)[name], info(gfloat, name)
    codes = torch.arange(1 << element.bits)
    values = element.from_codes(codes)
    expected = torch.tensor([gfloat.decode_float(theirs, code).fval for code in codes.tolist()], dtype=torch.float32)
    assert_equal_bits(values, expected)
    back = element.to_codes(values)
    assert torch.equal(back[~values.isnan()], codes[~values.isnan()].int())
    assert element.from_codes(back[values.isnan()]).isnan().all()
    assert element.largest == theirs.max and element.smallest == theirs.smallest_subnormal
    assert element.bits == theirs.k and element.significand_bits == theirs.precision


@pytest.mark.parametrize("name", OCP)
def test_every_interval_between_two_codes_rounds_as_gfloat_says(gfloat, name):
    element, theirs = OCP[name], info(gfloat, name)
    values = grid(element)
    points = [a + (b - a) * share / 8 for a, b in itertools.pairwise(values) for share in range(9)]
    points += [math.nextafter((a + b) / 2, side) for a, b in itertools.pairwise(values) for side in (0.0, math.inf)]
    points += [values[-1] * factor for factor in (1.01, 1.1, 1.5, 2.0, 1000.0)]
    x = torch.tensor([*points, *(-point for point in points)], dtype=torch.float32)
    rounded = element.round(x, None).clamp_(-element.largest, element.largest)
    expected = [gfloat.round_float(theirs, value, gfloat.RoundMode.TiesToEven, sat=True) for value in x.tolist()]
    assert_equal_bits(rounded, torch.tensor(expected, dtype=torch.float32))
    codes = [gfloat.encode_float(theirs, value) for value in expected]
    assert element.to_codes(rounded).tolist() == codes


@pytest.mark.parametrize("name", MX_NAMES)
def test_blocks_equal_gfloat_s(gfloat, name):
    fmt, theirs = parse(name), info(gfloat, BLOCKS[name])
    x = awkward_tensor((300, 32), seed=5, finite=True)
    x[x.abs() < 2.0**-100] = 0.0  # gfloat takes the exponent from a logarithm
    if name == "mxint8":  # it has the code -128, which stays unused here
        x = x.clamp(min=-x.abs().amax(-1, keepdim=True) / 2)
    blocks = [gfloat.quantize_block(theirs, row.double().numpy(), gfloat.compute_scale_amax) for row in x]
    expected = [torch.from_numpy(block).float() for block in blocks]
    assert_equal_bits(fake_quantize(x, fmt) + 0.0, torch.stack(expected) + 0.0)


@pytest.mark.parametrize("name", MX_NAMES)
def test_every_code_under_every_scale_unpacks_and_packs(name):
    fmt = parse(f"{name}/row")
    codes = torch.arange(1 << fmt.bits)
    elements = fmt.from_codes(codes)
    for exponent in range(255):
        data = torch.cat([torch.tensor([exponent], dtype=torch.uint8), definition.to_bytes(codes, fmt.bits)])
        values = definition.unpack(data, codes.shape, fmt, 0, torch.float32)
        scale = power_of_two(exponent - 127) / (64 if name == "mxint8" else 1)
        for element, value in zip(elements.tolist(), values.tolist(), strict=True):
            if math.isfinite(element) and abs(Fraction(element) * scale) < 2**128:
                assert Fraction(value) == Fraction(element) * scale
        values[~elements.isfinite() | (elements == -128)] = 0.0  # what no value is rounded to
        if values.isfinite().all():
            assert_equal_bits(fake_quantize(values, fmt), values if fmt.family != "mxint8" else values + 0.0)
    data[0] = 255
    assert definition.unpack(data, codes.shape, fmt, 0, torch.float32).isnan().all()


# Blocks, in rational arithmetic


def mx_exponent(largest, fmt):
    """X of the docstring of MXFloat."""
    element = getattr(fmt, "element", None)
    top = Fraction(element.largest) if element else Fraction(127, 64)
    mantissa_bits = element.mantissa_bits if element else 6
    exponent = math.frexp(largest)[1] - 1  # floor(log2)
    power = math.floor(math.log2(top))
    if fmt.scale == "even":
        step = power_of_two(exponent - mantissa_bits)
        if math.floor(Fraction(largest) / step + Fraction(1, 2)) * step >= power_of_two(exponent + 1):
            exponent += 1
    elif fmt.scale == "ceil":
        exponent += Fraction(largest) != power_of_two(exponent)
    elif fmt.scale == "rceil":
        exponent += Fraction(largest) > top * power_of_two(exponent - power)
    return max(-127, min(exponent, 127) - power)


def scalar_block(values, fmt):
    """A block of Python floats, rounded to nearest even."""
    if not all(math.isfinite(value) for value in values):
        return [math.nan] * len(values)
    largest = max(map(abs, values))
    scale = power_of_two(mx_exponent(largest, fmt) if largest else -127)
    element = getattr(fmt, "element", None)
    found = []
    for value in values:
        units = abs(Fraction(value)) / scale
        if element:
            exponent = max(math.frexp(float(units))[1] - 1 if units else -999, element.least_exponent)
            step, top = power_of_two(exponent - element.mantissa_bits), Fraction(element.largest)
        else:
            step, top = Fraction(1, 64), Fraction(127, 64)
        result = float(min(round(units / step) * step, top) * scale)
        found.append(math.copysign(result, value) if element else math.copysign(result, value if result else 1.0))
    return found


@property_test
@given(values=any_values(), fmt=st.sampled_from(MX_FORMATS))
def test_mx_equals_the_standard_in_rational_arithmetic(values, fmt):
    size = fmt.box_size
    expected = [each for at in range(0, len(values), size) for each in scalar_block(values[at : at + size], fmt)]
    assert_equal_bits(fake_quantize(torch.tensor(values), fmt), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("fmt", MX_FORMATS[:24:2] + MX_FORMATS[-4:], ids=str)
def test_mx_equals_the_standard_at_every_edge_of_its_rule(fmt):
    element = getattr(fmt, "element", None)
    top = element.largest if element else 127 / 64
    edges = [1.0, top, 2.0 - 2.0 ** -((element.mantissa_bits if element else 6) + 1), 1.5, 1.75]
    for edge, exponent in itertools.product(edges, (-140, -127, -126, -112, -20, 0, 3, 110)):
        base = torch.tensor(edge * 2.0**exponent)
        for bits in (-1, 0, 1):
            x = torch.zeros(fmt.box_size)
            x[0] = (base.view(torch.int32) + bits).view(torch.float32)
            x[1], x[2] = x[0] * 0.3, -x[0] * 0.01
            if fmt.family == "mxint8" and fmt.scale != "floor" and x[0] < 2.0**-126:
                continue
            assert_equal_bits(fake_quantize(x, fmt), torch.tensor(scalar_block(x.tolist(), fmt), dtype=torch.float32))


def test_the_largest_float32_does_not_overflow_under_any_rule():
    x = torch.full((32,), torch.finfo(torch.float32).max)
    for fmt in [*MX_FORMATS, *SCALED, parse("mxfp4/row-ceil")]:
        assert fake_quantize(x, fmt).isfinite().all(), fmt


# What has no scale


def any_bits(count):
    """float32 of all magnitudes, Inf and NaN among them."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=seeded(3), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    near = torch.randn(count, generator=seeded(4)).mul_(2.0 ** torch.randint(-30, 20, (count,), generator=seeded(5)))
    return torch.cat([x, near, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.9, 65520.0])])


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("e5m2", torch.float8_e5m2), ("e4m3", torch.float8_e4m3fn)],
)
def test_small_floats_are_torch_s(text, dtype):
    fmt, x = parse(text), any_bits(1 << 16)
    if text == "e4m3":  # beyond 448 torch's cast has depended on its version
        x = x[x.abs() <= 448]
    if text == "e5m2":
        x = x[(x.abs() < 61440) | ~x.isfinite()]
    assert_equal_bits(fake_quantize(x, fmt), x.to(dtype).float())
    packed = pack(x, fmt)
    assert packed.nbytes == len(x) * dtype.itemsize
    kept = ~x.isnan()
    codes = packed.data.view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    assert torch.equal(codes[kept], x.to(dtype).view(codes.dtype)[kept])


def test_what_rounds_past_the_largest_becomes_infinite_or_saturates():
    x = torch.tensor([500.0, -1e9, math.inf, -math.inf, math.nan])
    assert str(fake_quantize(x, parse("e4m3")).tolist()) == str([448.0, -448.0, math.nan, math.nan, math.nan])
    assert str(fake_quantize(x, parse("e3m4")).tolist()) == str([math.inf, -math.inf, math.inf, -math.inf, math.nan])
    assert pack(x[:4], parse("fp16")).dequantize().tolist() == [500.0, -math.inf, math.inf, -math.inf]


# Two scales


@pytest.mark.parametrize("which", ["awkward", "fading"])
def test_nvfp4_equals_its_description_in_scalar_arithmetic(which):
    x = awkward_tensor((40, 48), seed=2, finite=True).clamp(-1e30, 1e30)
    x[3] = 0.0
    if which == "fading":  # through all scales of a block, the subnormal ones and those too small among them
        x = torch.randn(40, 48, generator=seeded(2)) * 2.0 ** -torch.arange(0.0, 24.0, 0.6)[:, None]
    np = pytest.importorskip("numpy")
    tensor = np.float32(x.abs().max().item()) / np.float32(448 * 6)
    expected = []
    for block in x.view(-1, 16).numpy():
        scale = np.float32(np.abs(block).max()) / np.float32(6) / tensor
        found = scalar_minifloat(float(min(max(scale, 2.0**-9), 448.0)), E4M3)
        factor = (np.float32(1) / tensor) / np.float32(found)
        elements = [scalar_minifloat(float(value * factor), E2M1) for value in block]
        expected.append([float(np.float32(np.float32(element * found) * tensor)) for element in elements])
    assert_equal_bits(fake_quantize(x, NVFP4()), torch.tensor(expected, dtype=torch.float32).view(x.shape))


def scalar_minifloat(value, element):
    exponent = max(math.frexp(value)[1] - 1 if value else -999, element.least_exponent)
    step = power_of_two(exponent - element.mantissa_bits)
    return math.copysign(min(float(round(abs(Fraction(value)) / step) * step), element.largest), value)


def test_a_tensor_in_nvfp4_is_a_float32_then_scales_and_codes():
    x = torch.randn(6, 40, generator=seeded(1))
    packed = pack(x, NVFP4())
    assert packed.nbytes == 4 + 6 * (2 * (1 + 8) + (1 + 4))
    assert packed.data[:4].view(torch.float32).item() == x.abs().max() / torch.tensor(2688.0)
    assert pack(x[:, :0], NVFP4()).nbytes == 0
    x[1, 2], x[5, 39] = math.inf, math.nan
    found = fake_quantize(x, NVFP4())
    assert found[1, :16].isnan().all() and found[5, 32:].isnan().all() and found.isnan().sum() == 16 + 8


def test_factors_of_nvfp4_are_elements_of_six_bits_and_the_scale_of_the_tensor():
    x = awkward_tensor((9, 48), seed=3)
    for held in (factorize(x, NVFP4()), pack(x, NVFP4()).factorize()):
        elements, scale = held
        assert_equal_bits(elements * scale, fake_quantize(x, NVFP4()))
        assert_equal_bits(elements.bfloat16().float(), elements)
        assert len(scale.unique()) == 1 and scale.shape == (9, 1)


@pytest.mark.parametrize("text", ["fp8e4m3/tensor", "fp8e4m3/row", "fp8e5m2/row", "fp8e5m2/64"])
def test_scaled_fp8_is_torch_s_cast_under_a_scale(text):
    fmt = parse(text)
    x = awkward_tensor((30, 64), seed=4, finite=True).clamp(-1e30, 1e30)
    dtype = torch.float8_e4m3fn if "e4m3" in text else torch.float8_e5m2
    largest = x.abs().max() if fmt.group == "tensor" else x.abs().amax(-1, keepdim=True)
    scale = largest / torch.finfo(dtype).max
    elements = (x / scale).nan_to_num(0.0).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float()
    assert torch.equal(fake_quantize(x, fmt), elements * scale)


# Properties


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_packing_keeps_the_values_in_as_many_bytes_as_said(fmt):
    for index, (shape, dim) in enumerate(SHAPES_AND_DIMS):
        x = awkward_tensor(shape, seed=index)
        for rounding in ROUNDINGS:
            packed = pack(x, fmt, dim, rounding, 99)
            assert_equal_bits(packed.dequantize(), fake_quantize(x, fmt, dim, rounding, 99))
            assert packed.nbytes == packed.data.numel() == fmt.nbytes(shape, dim)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_half_precision_goes_in_and_comes_out(fmt):
    for dtype in (torch.bfloat16, torch.float16):
        x = awkward_tensor((7, 40), dtype, seed=6)
        expected = definition.fake_quantize(x.float(), fmt, 1, None, torch.float32).to(dtype)
        assert_equal_bits(fake_quantize(x, fmt), expected)
        assert_equal_bits(pack(x, fmt).dequantize(), expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_idempotent(rounding):
    @property_test
    @given(values=any_values(), fmt=st.sampled_from(MX_FORMATS + SMALL_FLOATS))
    def check(values, fmt):
        once = fake_quantize(torch.tensor(values), fmt, rounding=rounding, generator=1)
        for again in ROUNDINGS:
            twice = fake_quantize(once, fmt, rounding=again, generator=2)
            assert_equal_bits(twice, once if once.isfinite().all() or fmt in SMALL_FLOATS else twice)

    check()


@property_test
@given(values=any_values(max_size=32), fmt=st.sampled_from(ALL))
def test_monotone_within_a_group(values, fmt):
    size = fmt.group if isinstance(fmt.group, int) else len(values)
    result = fake_quantize(torch.tensor(sorted(values)[:size]), fmt).tolist()
    assert result == sorted(result) or any(map(math.isnan, result))


@property_test
@given(values=any_values(), fmt=st.sampled_from(ALL))
def test_negation_commutes_with_rounding(values, fmt):
    x = torch.tensor(values)
    expected = -fake_quantize(x, fmt)
    assert_equal_bits(fake_quantize(-x, fmt), expected + 0.0 if fmt.family == "mxint8" else expected)


@property_test
@given(values=any_values(max_size=16), fmt=st.sampled_from(MX_FORMATS))
def test_the_error_is_half_a_step_where_nothing_clips(values, fmt):
    x = torch.tensor(values[: fmt.box_size])
    element = getattr(fmt, "element", None) or Minifloat(2, 5)  # integers: at most as coarse
    scale = 2.0 ** (int(fmt.scale_of(x)) - 127)
    half = torch.maximum(x.abs() * 2.0**-element.significand_bits, torch.tensor(element.smallest / 2 * scale))
    inside = x.abs() <= element.largest * scale
    error = (fake_quantize(x, fmt) - x).abs()
    assert (error[inside] <= half[inside]).all()
    if fmt.scale in ("ceil", "rceil"):
        assert inside.all() or not x.isfinite().all() or x.abs().max() > 2.0**126


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_stochastic_rounding_goes_to_a_neighbour_and_is_unbiased(fmt):
    rows, draws = 24, 4000
    x = torch.randn(rows, 1, generator=seeded(7)) * 2.0 ** torch.randint(-3, 1, (rows, 1), generator=seeded(8))
    x[0] = 2.9  # holds the scale, and clips nowhere
    x = x.clamp(-2.9, 2.9).expand(rows, draws).contiguous()
    drawn = fake_quantize(x, fmt, 0, "stochastic", 11).double()
    nearest = fake_quantize(x, fmt, 0)[:, 0].double()
    for row in range(rows):
        found, value = drawn[row].unique(), x[row, 0].double()
        assert len(found) <= 2
        if len(found) == 2:
            low, high = found
            assert low < value < high and nearest[row] in (low, high)
            share, expected = (drawn[row] == high).double().mean(), (value - low) / (high - low)
            assert abs(share - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5 + 2.0**-20
        else:
            assert abs(found[0] - value) <= 2.0**-9 * abs(value) + 1e-6


@pytest.mark.parametrize("fmt", MX_FORMATS + SCALED, ids=str)
def test_inf_and_nan_make_their_group_nan(fmt):
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.randn(2, 64, generator=seeded(2))
        x[0, 3] = bad
        size = fmt.group if isinstance(fmt.group, int) else 64
        for result in (fake_quantize(x, fmt), pack(x, fmt).dequantize()):
            assert result[0, :size].isnan().all()
            rest = torch.cat([result[0, size:], result[1]])
            assert rest.isnan().all() if fmt.group == "tensor" else not rest.isnan().any()


# What engines are told


@pytest.mark.parametrize("fmt", MX_FORMATS + SMALL_FLOATS, ids=str)
def test_values_have_as_many_significant_bits_as_said(fmt):
    x = torch.randn(64, 64, generator=seeded(9)).mul_(2.0 ** torch.randint(-9, 4, (64, 1), generator=seeded(9)))
    significands = torch.frexp(fake_quantize(x, fmt)).mantissa * 2.0**fmt.significand_bits
    assert torch.equal(significands, significands.round())
    if str(fmt).endswith("-ceil"):  # of integers, the highest bit is then the largest's alone
        return
    halved = significands / 2
    assert not torch.equal(halved, halved.round())  # not fewer


@pytest.mark.parametrize("text", ["mxfp4", "mxfp6e2m3", "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2", "mxint8", "nvfp4"])
def test_products_run_exactly_on_bfloat16(text):
    if native.kernels is None or not native.kernels.gemm_takes_values:
        pytest.skip("no engine multiplies bfloat16 values here")
    side = Side(parse(text), along=True)
    assert plan(side, side, torch.device("cpu"), torch.float32).engines[0].name == "native"


# Names, and what is refused


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_str_and_parse_are_inverse(fmt):
    assert parse(str(fmt)) == fmt and hash(parse(str(fmt))) == hash(fmt)


@pytest.mark.parametrize("name", [*MX_NAMES, "nvfp4", "fp8e4m3", "fp8e5m2"])
def test_a_family_of_one_width_takes_its_q(name):
    bits = 8 if "8" in name else 6 if "6" in name else 4
    made = formats.make_format(name, bits)
    assert made.bits == bits and made.family == name
    with pytest.raises(ValueError, match=f"bits: got {bits + 1}, expected {bits} for {name}"):
        formats.make_format(name, bits + 1)


def test_options_of_the_flags_reach_the_format():
    options = formats.FormatOptions(scale="fit", box_size=16)
    assert str(formats.make_format("mxfp4", 4, options)) == "mxfp4/16-rceil"
    assert str(formats.make_format("nvfp4", 4, options)) == "nvfp4"
    assert str(formats.make_format("fp8e5m2", 8, formats.FormatOptions(box_size="row"))) == "fp8e5m2/row"
    extra = formats.FormatOptions(sign_bit_extra=True)
    assert str(formats.make_format("mxint8", 7, extra)) == "mxint8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mxfp4/0", "box_size: got 0"),
        ("nvfp4/0", "box_size: got 0"),
        ("e2m1", "got e2m1, which has no NaN, expected it under a scale: mxfp4 or nvfp4"),
        ("e3m2", "got e3m2, which has no NaN, expected it under a scale: mxfp6e3m2"),
        ("e9m2", "exponent_bits: got 9, expected 2 to 8"),
        ("e1m2", "exponent_bits: got 1, expected 2 to 8"),
        ("e5m0", "mantissa_bits: got 0, expected 1 to 10"),
        ("e8m8", "mantissa_bits: got 8, expected 1 to 7"),
        *(
            (text, "format: got")
            for text in ("mxfp8", "mxfp4-floor", "mxfp4/16/16", "nvfp4/row", "fp8e4m3", "bf16/row")
        ),
    ],
)
def test_texts_that_name_no_format_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_rule_or_width_that_is_none_is_refused():
    with pytest.raises(ValueError, match="scale: got 'fit', expected one of floor, ceil, even, rceil"):
        formats.MXFP4(scale="fit")
    with pytest.raises(ValueError, match="bits: got 5, expected 4 for mxfp4"):
        formats.MXFP4(5)
    with pytest.raises(ValueError, match="mantissa_bits: got -2"):
        SmallFloat(5, 6)
