"""The packed form: what it decodes to, what each byte says and how many there are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.common import (
    BLOCK_FLOATS,
    DTYPES,
    DYNAMIC_FIXED,
    SCALED_INTEGERS,
    SHAPES_AND_DIMS,
    STATIC_FIXED,
    WIDTHS,
    assert_equal_bits,
    awkward_tensor,
    bit_view,
    property_test,
    seeded,
    strided_views,
)

from fairseq_dsq.formats import BlockFloat, FixedPoint, Float32
from fairseq_dsq.quantized import ROUNDINGS, QuantizedTensor, fake_quantize, pack


def assert_packs(x, fmt, dim, rounding="nearest", seed=9):
    """pack holds what it says it holds, and decodes to fake_quantize bit for bit."""
    packed = pack(x, fmt, dim, rounding, seeded(seed))
    assert_equal_bits(packed.dequantize(), fake_quantize(x, fmt, dim, rounding, seeded(seed)))
    assert packed.nbytes == fmt.nbytes(x.shape, dim)
    return packed


def decode_bytes(data, count, fmt):
    """(biased exponent, values) of one box from its bytes, with Python integers."""
    exponent, codes = data[0], int.from_bytes(bytes(data[1:]), "little")
    values = []
    for index in range(count):
        field = codes >> (index * fmt.bits) & (2**fmt.bits - 1)
        if isinstance(fmt, BlockFloat):
            magnitude, negative = field % 2 ** (fmt.bits - 1), field >> (fmt.bits - 1)
            code = -float(magnitude) if negative else float(magnitude)
        else:
            code = float(field - 2**fmt.bits if field >> (fmt.bits - 1) else field)
        values.append(math.ldexp(code, exponent - 127 - (fmt.bits - 2)))
    return exponent, values


# pack and unpack against fake_quantize


@pytest.mark.parametrize("fmt", [*SCALED_INTEGERS, Float32()], ids=str)
def test_unpack_equals_fake_quantize_at_every_width(fmt):
    finite = isinstance(fmt, FixedPoint)
    for index, (shape, dim) in enumerate(SHAPES_AND_DIMS):
        for dtype in DTYPES:
            x = awkward_tensor(shape, dtype, index, finite)
            rounding = ROUNDINGS[(index + fmt.bits) % 2]
            packed = pack(x, fmt, dim, rounding, seeded(9))
            assert_equal_bits(packed.dequantize(), fake_quantize(x, fmt, dim, rounding, seeded(9)))


shapes = st.lists(st.integers(0, 37), max_size=3).filter(lambda shape: math.prod(shape) < 6000)


@property_test
@given(
    shape=shapes,
    data=st.data(),
    box_size=st.sampled_from([1, 3, 8, 16, 16, 32]),
    bits=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    rounding=st.sampled_from(ROUNDINGS),
    seed=st.integers(0, 999),
)
def test_any_shape_dim_box_dtype_and_strides(shape, data, box_size, bits, dtype, rounding, seed):
    axes = max(1, len(shape))
    dim = data.draw(st.integers(-axes, axes - 1), label="dim")
    order = data.draw(st.permutations(range(len(shape))), label="order")
    x = awkward_tensor(tuple(shape), dtype, seed).permute(order)
    for fmt in (BlockFloat(bits, box_size), FixedPoint(bits), FixedPoint(bits, bits // 2)):
        assert_packs(x, fmt, dim, rounding, seed)


@pytest.mark.parametrize("fmt", [BlockFloat(5), FixedPoint(5), FixedPoint(5, 2)], ids=str)
def test_strides_do_not_matter(fmt):
    base = awkward_tensor((40, 36, 6), seed=3, finite=True)
    for view in strided_views(base):
        for dim in range(3):
            packed = assert_packs(view, fmt, dim, "stochastic")
            contiguous = pack(view.contiguous(), fmt, dim, "stochastic", seeded(9))
            assert torch.equal(packed.data, contiguous.data)


def test_equal_states_of_torchs_own_generator_give_equal_results():
    x = torch.randn(8, 40, generator=seeded(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        packed = pack(x, BlockFloat(4), rounding="stochastic")
        torch.manual_seed(3)
        assert_equal_bits(packed.dequantize(), fake_quantize(x, BlockFloat(4), rounding="stochastic"))
    assert not torch.equal(packed.data, pack(x, BlockFloat(4)).data)


@pytest.mark.parametrize("fmt", [BlockFloat(5), FixedPoint(5), FixedPoint(5, 2)], ids=str)
def test_packing_again_what_was_unpacked_gives_the_same_bytes(fmt):
    packed = pack(awkward_tensor((6, 50), seed=4, finite=True), fmt)
    assert torch.equal(pack(packed.dequantize(), fmt).data, packed.data)


# Bytes


def test_the_bytes_of_a_known_block_float_box():
    # E = 0, scale 1/4: codes 7, -7, 4, -2, 1, -0, 0, 0, eight of 3; low nibble first, sign on top.
    values = [1.75, -1.75, 1.0, -0.5, 0.25, -0.0, 0.0, 0.1] + [0.75] * 8
    packed = pack(torch.tensor(values), BlockFloat(4))
    assert packed.data.tolist() == [127, 0xF7, 0xA4, 0x81, 0x00, 0x33, 0x33, 0x33, 0x33]


def test_the_bytes_of_a_known_ternary_box():
    # E = 3: codes 1, -1, 0, -0, four to a byte: 01, 11, 00, 10 from the lowest bits up.
    packed = pack(torch.tensor([8.0, -8.0, 0.0, -0.0] * 4), BlockFloat(2))
    assert packed.data.tolist() == [130] + [0b10_00_11_01] * 4


def test_the_bytes_of_a_known_box_whose_codes_cross_bytes():
    # 12 bits, E = 0, scale 2^-10: codes 1024 = 0x400 and -1 = 0x801, three bytes for two.
    packed = pack(torch.tensor([1.0, -(2.0**-10)]), BlockFloat(12))
    assert packed.data.tolist() == [127, 0x00, 0x14, 0x80]


def test_the_bytes_of_a_known_fixed_point_tensor():
    # E = 0, scale 1/4: two's complement nibbles of 7, -7, -1, 0, and 2 alone in its byte.
    packed = pack(torch.tensor([1.75, -1.75, -0.25, -0.0, 0.5]), FixedPoint(4))
    assert packed.data.tolist() == [127, 0x97, 0x0F, 0x02]


def test_the_bytes_of_a_known_static_fixed_point_tensor():
    # Scale 1/4: codes 7, -8 (two's complement's odd one out) and 1.
    packed = pack(torch.tensor([9.0, -9.0, 0.25]), FixedPoint(4, 2))
    assert packed.data.tolist() == [127, 0x87, 0x01]


def test_full_boxes_come_first_exponents_before_codes():
    # Two rows of 20: two full boxes, then two of four values; one byte exponent each.
    x = torch.tensor([[1.0] * 16 + [4.0] * 4, [2.0] * 16 + [-8.0] * 4])
    ones = 0b01_01_01_01
    minus_ones = 0b11_11_11_11
    expected = [127, 128] + [ones] * 8 + [129, 130] + [ones, minus_ones]
    assert pack(x, BlockFloat(2)).data.tolist() == expected


@pytest.mark.parametrize("fmt", SCALED_INTEGERS, ids=str)
def test_the_bytes_of_any_box_decode_by_hand(fmt):
    # Values as far as a static scale reaches and a little beyond.
    reach = 2.0 ** (fmt.bits - fmt.bits // 2)
    for seed, count in enumerate([16, 16, 16, 5, 5, 1, 1]):
        x = (torch.rand(count, generator=seeded(seed)) - 0.5) * reach * 1.1
        packed = pack(x, fmt)
        assert len(packed.data) == 1 + math.ceil(count * fmt.bits / 8)
        exponent, values = decode_bytes(packed.data.tolist(), count, fmt)
        assert_equal_bits(torch.tensor(values), fake_quantize(x, fmt))
        if isinstance(fmt, BlockFloat) or fmt.fraction_bits is None:
            assert exponent - 127 == math.frexp(x.abs().max().item())[1] - 1
        else:
            assert exponent - 127 == fmt.bits - 2 - fmt.fraction_bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_at_every_exponent_has_its_bits(bits):
    largest = 2 ** (bits - 1) - 1
    magnitudes = [float(magnitude) for magnitude in range(largest + 1)]
    codes = magnitudes + [-magnitude for magnitude in magnitudes]
    for exponent in range(-126, 128):
        x = torch.tensor([math.ldexp(code, exponent - (bits - 2)) for code in codes])
        packed = pack(x, BlockFloat(bits))
        # Sign-magnitude in this order counts 0, 1, 2, ... through all 2^bits patterns.
        patterns = sum(pattern << (pattern * bits) for pattern in range(2**bits))
        expected = [exponent + 127, *patterns.to_bytes(math.ceil(2**bits * bits / 8), "little")]
        assert packed.data.tolist() == expected
        assert_equal_bits(packed.dequantize(), x)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_of_a_static_scale_has_its_bits(bits):
    # Two's complement in this order counts 0, 1, 2, ... through all 2^bits patterns.
    codes = [*range(2 ** (bits - 1)), *range(-(2 ** (bits - 1)), 0)]
    patterns = sum(pattern << (pattern * bits) for pattern in range(2**bits))
    for fraction_bits in range(bits + 1):
        x = torch.tensor([math.ldexp(code, -fraction_bits) for code in codes])
        packed = pack(x, FixedPoint(bits, fraction_bits))
        exponent_byte = 127 + bits - 2 - fraction_bits
        expected = [exponent_byte, *patterns.to_bytes(math.ceil(2**bits * bits / 8), "little")]
        assert packed.data.tolist() == expected
        assert_equal_bits(packed.dequantize(), x)


@pytest.mark.parametrize("fmt", BLOCK_FLOATS, ids=str)
def test_inf_and_nan_mark_their_box_with_255(fmt):
    x = torch.randn(48, generator=seeded(0))
    for special in (math.nan, math.inf, -math.inf):
        x[20] = special
        packed = pack(x, fmt)
        assert packed.data[1] == 255
        assert 255 not in packed.data[[0, 2]]
        result = packed.dequantize()
        assert result[16:32].isnan().all()
        assert result[:16].isfinite().all()
        assert result[32:].isfinite().all()


def test_the_bytes_of_a_nan_box_do_not_depend_on_the_sign_of_the_nan():
    for fmt in (BlockFloat(4), BlockFloat(12), FixedPoint(4)):
        boxes = [torch.tensor([1.0, math.copysign(math.nan, sign), -2.0]) for sign in (1, -1)]
        assert boxes[0][1].signbit() != boxes[1][1].signbit()
        assert torch.equal(pack(boxes[0], fmt).data, pack(boxes[1], fmt).data)


def test_zeros_have_the_smallest_exponent():
    assert pack(torch.zeros(4), BlockFloat(2)).data.tolist() == [1, 0]


# How many bytes


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_box_of_sixteen_takes_two_bytes_a_bit_and_one(bits):
    assert pack(torch.randn(16), BlockFloat(bits)).nbytes == 2 * bits + 1
    assert pack(torch.randn(7, 32), BlockFloat(bits)).nbytes == 7 * 2 * (2 * bits + 1)


@pytest.mark.parametrize("fmt", SCALED_INTEGERS, ids=str)
def test_bytes_held_are_the_bytes_stated(fmt):
    for shape, dim in SHAPES_AND_DIMS:
        packed = pack(torch.ones(shape), fmt, dim)
        assert packed.nbytes == fmt.nbytes(shape, dim)
        assert packed.data.dtype == torch.uint8
        # Nothing larger is kept alive behind a view.
        assert packed.data.untyped_storage().nbytes() == packed.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_holds_the_tensor_itself(dtype):
    x = awkward_tensor((5, 7), dtype)
    packed = pack(x, Float32())
    assert packed.data is x
    assert packed.dequantize() is x
    assert packed.nbytes == x.numel() * x.element_size()


# The container


@pytest.mark.parametrize("fmt", [BlockFloat(5), FixedPoint(5), Float32()], ids=str)
def test_bytes_and_spec_put_a_packed_tensor_together_again(fmt):
    x = awkward_tensor((3, 40), torch.bfloat16, seed=1, finite=True)
    packed = pack(x, fmt, 0)
    assert packed.spec == (x.shape, x.dtype, fmt, 0)
    assert_equal_bits(QuantizedTensor(packed.data.clone(), *packed.spec).dequantize(), packed.dequantize())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [BlockFloat(4), FixedPoint(4), FixedPoint(4, 2)], ids=str)
def test_nothing_is_changed_in_place(fmt, dtype, rounding):
    for view in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[1:, :32]):
        x = awkward_tensor((48, 35), dtype, seed=1)
        before = x.clone()
        packed = pack(view(x), fmt, 0, rounding)
        assert torch.equal(bit_view(x), bit_view(before))
        data = packed.data.clone()
        first = packed.dequantize()
        assert torch.equal(packed.data, data)
        first_bits = bit_view(first).clone()
        first.fill_(1.0)
        assert torch.equal(bit_view(packed.dequantize()), first_bits)


def test_the_stash_does_not_follow_the_tensor():
    x = torch.randn(4, 40, generator=seeded(0))
    packed = pack(x, BlockFloat(6))
    expected = fake_quantize(x, BlockFloat(6))
    x.zero_()
    assert_equal_bits(packed.dequantize(), expected)


# Arguments


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"x: got {dtype}, expected float32, bfloat16 or float16"):
        pack(torch.zeros(16, dtype=dtype), BlockFloat(4))


@pytest.mark.parametrize(("shape", "dim"), [((4, 5), 2), ((4, 5), -3), ((), 1), ((), -2)])
@pytest.mark.parametrize("fmt", [BlockFloat(4), FixedPoint(4), Float32()], ids=str)
def test_a_dim_the_tensor_lacks_is_refused(fmt, shape, dim):
    with pytest.raises(IndexError, match=f"dim: got {dim}, expected .* {len(shape)} dimensions"):
        pack(torch.zeros(shape), fmt, dim)


@pytest.mark.parametrize("fmt", [BlockFloat(4), FixedPoint(4), Float32()], ids=str)
def test_an_unknown_rounding_is_refused(fmt):
    with pytest.raises(ValueError, match="rounding: got 'up', expected one of nearest, stochastic"):
        pack(torch.zeros(16), fmt, rounding="up")


def test_the_lists_of_formats_cover_every_width():
    for fmts in (BLOCK_FLOATS, DYNAMIC_FIXED, STATIC_FIXED):
        assert [fmt.bits for fmt in fmts] == list(range(2, 33))
