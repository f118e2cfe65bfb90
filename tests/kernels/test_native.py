"""The CPU kernels against the plain-torch definition, bit for bit, under each instruction set of this machine."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.common import (
    BLOCK_FLOATS,
    DYNAMIC_FIXED,
    FITTED,
    MX_FORMATS,
    NVFP4_FORMATS,
    SCALED_INTEGERS,
    SHAPES_AND_DIMS,
    STATIC_FIXED,
    WIDTHS,
    Odd,
    assert_equal_bits,
    assert_implements_definition,
    awkward_tensor,
    kernels_here,
    odd_registered,
    property_test,
    seeded,
)

from fairseq_dsq.formats import MXFP4, BlockFloat, FixedPoint, definition, parse
from fairseq_dsq.formats.definition import noise
from fairseq_dsq.formats.minifloat import E4M3
from fairseq_dsq.kernels import masks, native, ops
from fairseq_dsq.quantized import ROUNDINGS, fake_quantize, pack, quantize_and_pack

SEEDS = (None, 123456789 << 32 | 987654321)
# Both sides of every edge: of a vector, of a box of 16, of a run of 64 boxes and of a tile of 512 columns.
EDGES = [
    ((3, 1040), 1),
    ((5, 1024), 1),
    ((33, 40), 0),
    ((2, 33, 17), 1),
    ((16, 515), 0),
    ((2, 48, 16), 1),
    ((32, 7), 0),
    ((3000,), 0),
    ((1, 64, 1), 1),
]
AWKWARD_BOXES = [BlockFloat(bits, box_size) for bits in (2, 4, 5, 8, 16, 25) for box_size in (1, 3, 8, 32, 100)]


KERNELS = kernels_here()
HERE = list(KERNELS)
needs_kernels = pytest.mark.skipif(not HERE, reason=f"no kernels: {native.unavailable}")


@pytest.fixture(params=HERE)
def isa(request, monkeypatch):
    monkeypatch.setattr(native, "kernels", native.Kernels(request.param))
    return request.param


def assert_equals_definition(x, fmt, dim, seed):
    """The operators against the functions that define them, under each instruction set."""
    assert_implements_definition(x, fmt, dim, seed, KERNELS.values())


# Bit for bit


@needs_kernels
@pytest.mark.parametrize("fmt", SCALED_INTEGERS + FITTED, ids=str)
def test_every_width_equals_the_definition(fmt):
    for index, (shape, dim) in enumerate(EDGES):
        x = awkward_tensor(shape, seed=index, finite=isinstance(fmt, FixedPoint) and index > 0)
        assert_equals_definition(x, fmt, dim, SEEDS[(index + fmt.bits) % 2])


@needs_kernels
@pytest.mark.parametrize("fmt", AWKWARD_BOXES, ids=str)
def test_every_box_size_equals_the_definition(fmt):
    for index, (shape, dim) in enumerate([*EDGES, *SHAPES_AND_DIMS]):
        assert_equals_definition(awkward_tensor(shape, seed=index), fmt, dim, SEEDS[index % 2])


@needs_kernels
@pytest.mark.parametrize("fmt", MX_FORMATS, ids=str)
def test_mx_equals_the_definition(fmt):
    for index, (shape, dim) in enumerate([*EDGES, ((64, 1030), 0), ((64, 1024), 1), *SHAPES_AND_DIMS]):
        assert_equals_definition(awkward_tensor(shape, seed=index), fmt, dim, SEEDS[index % 2])


@pytest.mark.parametrize("fmt", [fmt for fmt in MX_FORMATS if str(fmt).endswith("/row-ceil")], ids=str)
def test_every_byte_of_mx_unpacks_as_defined(isa, fmt):
    # Every scale is a row of every code.
    codes = definition.to_bytes(torch.arange(1 << fmt.bits), fmt.bits)
    data = torch.cat([torch.arange(256, dtype=torch.uint8), codes.repeat(256)])
    shape = [256, 1 << fmt.bits]
    for dtype in (torch.float32, torch.bfloat16):
        expected = definition.unpack(data, shape, fmt, 1, dtype)
        assert_equal_bits(ops.unpack(data, shape, 1, fmt.text, dtype), expected)


@needs_kernels
@pytest.mark.parametrize("fmt", NVFP4_FORMATS, ids=str)
def test_nvfp4_equals_the_definition(fmt):
    for index, (shape, dim) in enumerate([*EDGES, ((64, 1030), 0), ((64, 1024), 1), *SHAPES_AND_DIMS]):
        seed = SEEDS[index % 2]
        assert_equals_definition(awkward_tensor(shape, seed=index), fmt, dim, seed)
        # Scales of blocks that are numbers, not the smallest; of the tensor, the smallest and the largest.
        x = torch.randn(shape, generator=seeded(index))
        for size in (1.0, 2.0**-120, 2.0**126):
            assert_equals_definition(x * size, fmt, dim, seed)


@needs_kernels
def test_nvfp4_rounds_around_its_ties_in_the_order_of_the_definition():
    # Halfway between two elements under every scale of a block, and the float32 beside it: the last bit decides.
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    scales = E4M3.from_codes(torch.arange(1, 0x7F))[:, None]
    for size in (1.0 + torch.rand(40, generator=seeded(1))).tolist():
        halfway = ties * scales * size
        beside = torch.nextafter(halfway, torch.tensor(0.0))
        x = torch.cat([6.0 * scales * size, halfway, -beside], 1)
        assert_equals_definition(x, parse("nvfp4"), 1, None)


def test_every_byte_of_nvfp4_unpacks_as_defined(isa):
    fmt = parse("nvfp4")
    codes = definition.to_bytes(torch.arange(16).expand(256, 16), fmt.bits).flatten()
    data = torch.cat([torch.tensor([0.37]).view(torch.uint8), torch.arange(256, dtype=torch.uint8), codes])
    expected = definition.unpack(data, [256 * 16], fmt, 0, torch.float32)
    assert expected.isnan().any() and not expected.isnan().all()
    assert_equal_bits(ops.unpack(data, [256 * 16], 0, fmt.text, torch.float32), expected)


@needs_kernels
@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
@pytest.mark.parametrize("fmt", MX_FORMATS[:: len(MX_FORMATS) // 6], ids=str)
def test_values_of_every_size_in_a_block_of_mx_equal_the_definition(fmt, seed):
    # Each block holds its scale, and float32 of every exponent below: all steps of the grid, ties among them.
    generator = seeded(1)
    significands = torch.randint(0, 64, (2000, 32), generator=generator) / 64 + 1
    exponents = torch.randint(-30, 1, (2000, 32), generator=generator)
    x = torch.ldexp(significands, exponents) * (1 - 2 * torch.randint(0, 2, (2000, 32), generator=generator))
    x[:, 7] = 1.5
    for scale in (1.0, 2.0**-120, 2.0**120):
        for dim in (0, 1):
            y = x * scale if dim == 1 else (x * scale).t().contiguous()
            assert_equals_definition(y, fmt, dim, seed)


@needs_kernels
@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
@pytest.mark.parametrize("dim", [0, 1])
def test_the_fast_widths_equal_the_definition_on_a_large_matrix(dim, seed):
    x = awkward_tensor((320, 560), seed=3)
    x[:, 5] *= 0.0
    x[7] = 0.0
    for bits in (2, 4, 8, 16):
        assert_equals_definition(x, BlockFloat(bits), dim, seed)
        assert_equals_definition(x.nan_to_num(0.0, 1.0, -1.0), FixedPoint(bits), dim, seed)


@pytest.mark.parametrize("text", ["bfp2", "bfp4", "bfp16", "bfp24", "bfp25", "mxfp4/16", "mxfp8e5m2/16", "mxint8/16"])
def test_columns_of_every_magnitude_equal_the_definition(isa, text):
    fmt = parse(text)
    sizes = torch.arange(-149, 128).repeat_interleave(16)
    mixed = sizes[torch.randperm(len(sizes), generator=seeded(1))]
    for exponents in (sizes, mixed):
        x = torch.ldexp(torch.randn(33, len(sizes), generator=seeded(2)), exponents)
        x[:, ::5] = 0.0
        expected = definition.fake_quantize(x, fmt, 0, None, torch.float32)
        assert_equal_bits(ops.fake_quantize(x, 0, text, None, torch.float32), expected)


def test_columns_may_be_read_from_where_they_are_written(isa):
    # Memory that lies before and behind x: which end of a row comes first depends on it.
    x, fmt = awkward_tensor((35, 540), seed=4)[:, :512].contiguous(), BlockFloat(4)
    expected = definition.fake_quantize(x, fmt, 0, None, torch.float32)
    for start in (0, 16, 256, 300, 511):
        memory = torch.empty(x.numel() + 512)
        out = memory[start : start + x.numel()].view_as(x)
        native.kernels.fake_quantize(x, out, (1, *x.shape), fmt.kernel_spec(), None)
        assert_equal_bits(out, expected)
        out.copy_(x)
        native.kernels.fake_quantize(out, out, (1, *x.shape), fmt.kernel_spec(), None)
        assert_equal_bits(out, expected)


@needs_kernels
@property_test
@given(
    shape=st.lists(st.integers(0, 70), min_size=1, max_size=3).filter(lambda shape: torch.Size(shape).numel() < 9000),
    data=st.data(),
    bits=st.sampled_from(WIDTHS),
    box_size=st.sampled_from([1, 7, 16, 16, 16, 17, 64]),
    seed=st.none() | st.integers(0, 2**62 - 1),
    which=st.integers(0, 999),
)
def test_any_shape_equals_the_definition(shape, data, bits, box_size, seed, which):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1), label="dim")
    x = awkward_tensor(tuple(shape), seed=which)
    fitted = BlockFloat(bits, box_size, scale="fit"), FixedPoint(bits, scale="fit")
    for fmt in (BlockFloat(bits, box_size), FixedPoint(bits), FixedPoint(bits, bits // 2), *fitted):
        assert_equals_definition(x, fmt, dim, seed)


@needs_kernels
@pytest.mark.parametrize("box_size", [1, 5, 16])
def test_a_format_nobody_here_knows(box_size):
    # Non-negative codes; a lopsided range with a signed zero; a scale far off.
    for fmt in (
        Odd(5, box_size, (0, 15), False),
        Odd(6, box_size, (-3, 31), True),
        Odd(7, box_size, (-64, 63), False, -40),
    ):
        with odd_registered():
            for seed in SEEDS:
                for shape, dim in EDGES[:5]:
                    assert_equals_definition(awkward_tensor(shape, seed=1), fmt, dim, seed)


@pytest.fixture
def two_threads(monkeypatch):
    """For the kernels; torch itself keeps its own."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@needs_kernels
@pytest.mark.usefixtures("two_threads")
def test_threads_do_not_matter(monkeypatch):
    x = awkward_tensor((140, 1031), seed=5)
    assert x.numel() > 2 * native.VALUES_PER_THREAD
    for fmt in (BlockFloat(4), BlockFloat(16), BlockFloat(6), FixedPoint(8)):
        for dim in (0, 1):
            assert_equals_definition(x if isinstance(fmt, BlockFloat) else x.nan_to_num(), fmt, dim, SEEDS[1])
    x[101, 517] = torch.nan
    assert_equals_definition(x, FixedPoint(8), 0, None)
    wanted = definition.fake_quantize(x, BlockFloat(4), 1, None, torch.float32)
    data = definition.pack(x, BlockFloat(2), 0, None)
    for kernels in KERNELS.values():
        monkeypatch.setattr(native, "kernels", kernels)
        assert kernels._threads(x) == 2 or not kernels.threaded
        operand, stash = quantize_and_pack(x, BlockFloat(4), BlockFloat(2))
        assert_equal_bits(operand, wanted)
        assert torch.equal(stash.data, data)


def test_two_threads_are_two_of_torchs_own():
    kernels = native.kernels
    if kernels is None or not kernels.threaded:
        pytest.skip("the kernels run in one thread here")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert kernels._threads(torch.empty(2 * native.VALUES_PER_THREAD)) == 2
        assert kernels._threads(torch.empty(2 * native.VALUES_PER_THREAD - 1)) == 1
    finally:
        torch.set_num_threads(before)


# The operand and the stash at once


FITTED_4 = BlockFloat(4, scale="fit")
FUSED = [
    (FITTED_4, BlockFloat(2)),
    (BlockFloat(2), FITTED_4),
    (BlockFloat(4), BlockFloat(4)),
    (BlockFloat(2), BlockFloat(16)),
    (BlockFloat(7, 5), BlockFloat(3, 20)),
]
FUSED += [
    (parse("mxfp4"), BlockFloat(4)),
    (BlockFloat(4), parse("mxfp6e2m3")),
    (parse("mxint8"), parse("mxfp8e5m2/16")),
]
NOT_FUSED = [(BlockFloat(4), FixedPoint(4)), (FixedPoint(4, 2), BlockFloat(4))]


@pytest.mark.parametrize("formats", FUSED + NOT_FUSED, ids=str)
def test_operand_and_stash_are_those_of_two_calls(isa, formats):
    operand_fmt, stash_fmt = formats
    for shape in [(48, 40), (35, 37), (3, 33, 20), (2, 0, 5), (1, 1), (20, 600)]:
        x = awkward_tensor(shape, seed=4)
        for dims in [(-1, -2), (x.dim() - 1, x.dim() - 2), (-2, -1)]:
            operand, stash = quantize_and_pack(x, operand_fmt, stash_fmt, *dims)
            assert_equal_bits(operand, fake_quantize(x, operand_fmt, dims[0]))
            expected = pack(x, stash_fmt, dims[1])
            assert torch.equal(stash.data, expected.data)
            assert stash.spec == expected.spec


# dtypes and strides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", [*BLOCK_FLOATS[::5], DYNAMIC_FIXED[6], STATIC_FIXED[14]], ids=str)
def test_half_precision_equals_the_definition(isa, fmt, dtype):
    x = awkward_tensor((35, 40), dtype, seed=8, finite=isinstance(fmt, FixedPoint))
    for dim in (0, 1):
        for rounding in ROUNDINGS:
            seed = None if rounding == "nearest" else int(torch.randint(2**62, (), generator=seeded(5)))
            expected = definition.fake_quantize(x, fmt, dim, seed, dtype)
            assert_equal_bits(fake_quantize(x, fmt, dim, rounding, seeded(5)), expected)
            assert_equal_bits(pack(x, fmt, dim, rounding, seeded(5)).dequantize(), expected)


@pytest.mark.parametrize("bits", range(2, 10))
def test_bfloat16_holds_up_to_nine_bits_exactly(bits):
    x = awkward_tensor((64, 48), seed=bits)
    for fmt in (BlockFloat(bits), FixedPoint(bits), FixedPoint(bits, bits // 2)):
        expected = fake_quantize(x, fmt)
        assert_equal_bits(fake_quantize(x, fmt, dtype=torch.bfloat16).float(), expected)
        assert_equal_bits(pack(x, fmt).dequantize(torch.bfloat16).float(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dtype_that_would_round_again_is_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype: got {dtype} for torch.float32 in bfp10, expected torch.float32"):
        fake_quantize(torch.zeros(16), BlockFloat(10), dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype: got torch\.float16"):
        pack(torch.zeros(16), BlockFloat(4)).dequantize(torch.float16)


def test_a_transposed_matrix_is_read_as_it_lies(isa):
    x = awkward_tensor((3, 40, 33), seed=2)
    for dim in (0, 1, 2, -1, -2, -3):
        result = fake_quantize(x.mT, BlockFloat(4), dim)
        assert_equal_bits(result, fake_quantize(x.mT.contiguous(), BlockFloat(4), dim))
        assert result.mT.is_contiguous()


# A scale that does not clip, around every edge of the largest code


@needs_kernels
@pytest.mark.parametrize("make", [BlockFloat, FixedPoint])
@pytest.mark.parametrize("bits", [*range(2, 10), 16, 24, 25, 26, 32])
def test_a_scale_that_fits_at_every_edge_equals_the_definition(make, bits):
    edge = torch.tensor(float(make(bits).max_code) * 2.0 ** -(bits - 2)).view(torch.int32)
    steps = [edge - 1, edge, edge + 1, 0x3F800000, 0x3FFFFFFF, 0x40000000]
    largest = torch.tensor([int(step) for step in steps], dtype=torch.int32).view(torch.float32)
    huge = [torch.finfo(torch.float32).max, 2.0**-126, 2.0**-149, math.inf, math.nan]
    for top in [*largest.tolist(), *huge]:
        for sign in (1, -1):
            x = normal_within(16, abs(top))
            x[3] = sign * top
            for seed in SEEDS:
                assert_equals_definition(x, make(bits, scale="fit"), 0, seed)
            finite = x.isfinite().all() and top < 2.0**127
            if finite:
                fit, floor = make(bits, scale="fit"), make(bits)
                clips = top > floor.max_code * 2.0 ** (math.frexp(top)[1] - 1 - (bits - 2)) and top >= 2.0**-126
                exponents = [int(each.scale_of(x)) for each in (floor, fit)]
                assert exponents[1] - exponents[0] == clips


def normal_within(count, top):
    x = torch.randn(count, generator=seeded(1))
    return (x / x.abs().max()).clamp(-1, 1) * (top if math.isfinite(top) else 1.0)


# Noise


def test_noise_is_uniform_and_independent_of_its_neighbours():
    count = 1 << 20
    draws = [noise(torch.arange(count), seed).double() for seed in (0, 1, 1 << 61)]
    for draw in draws:
        assert draw.min() >= 0 and draw.max() < 1
        assert torch.equal(draw * 2**24, (draw * 2**24).round())
        tens = torch.histc(draw, 16, 0, 1) - count / 16
        assert (tens**2).sum() / (count / 16) < 45  # chi-squared, 15 degrees: 1e-4
        for lag in (1, 2, 16, 512):
            correlation = ((draw[lag:] - 0.5) * (draw[:-lag] - 0.5)).mean() * 12
            assert abs(correlation) < 4 / count**0.5
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(((draws[first] - 0.5) * (draws[second] - 0.5)).mean() * 12) < 4 / count**0.5


def test_noise_of_known_elements():
    # By hand with Python integers: the definition is part of the checkpointed result of a seed.
    def mix(h):
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32
        h = (h ^ h >> 15) * 0x846CA68B % 2**32
        return h ^ h >> 16

    seed = (0x2BCDEF01 << 32) | 0xFFFFFFF0
    index = [0, 1, 15, 16, 17, 2**31, 2**32 - 1, 2**32 + 5]
    expected = [(mix(mix((i + 0xFFFFFFF0) % 2**32) ^ 0x2BCDEF01) >> 8) / 2**24 for i in index]
    assert noise(torch.tensor(index), seed).tolist() == expected


# Dropout and masks of one bit

MASKED_SHAPES = [(1,), (7,), (8,), (33, 40), (1023,), (1025,), (3, 1031), (2, 0), ()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropout_and_masks_equal_the_definition(isa, dtype):
    for index, shape in enumerate(MASKED_SHAPES):
        x = awkward_tensor(shape, dtype, seed=index)
        for seed in (0, 2**62 - 1, SEEDS[1]):
            assert_equal_bits(ops.dropout(x, 0.3, 1 / 0.7, seed), masks.dropout(x, 0.3, 1 / 0.7, seed))
        data = masks.pack_positive(x)
        assert torch.equal(ops.pack_positive(x), data)
        assert_equal_bits(ops.mask(x, data), masks.mask(x, data))


@pytest.mark.usefixtures("two_threads")
def test_masks_of_a_transposed_matrix_and_of_two_threads(isa):
    x = awkward_tensor((140, 1031), seed=5)
    for y in (x, x.t()):
        data = masks.pack_positive(y)
        assert torch.equal(ops.pack_positive(y), data)
        assert_equal_bits(ops.mask(y, data), masks.mask(y, data))
        assert_equal_bits(ops.dropout(y, 0.1, 2.0, 3), masks.dropout(y, 0.1, 2.0, 3))


def test_a_mask_has_one_bit_per_value_of_which_nan_is_positive():
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, 2.0])
    assert masks.pack_positive(x).tolist() == [0b10110001, 0b1]
    assert ops.mask(x.nan_to_num(5.0), ops.pack_positive(x)).tolist()[:5] == [1.0, 0.0, 0.0, 0.0, 5.0]


def test_bytes_that_are_no_mask_of_the_shape_are_refused(isa):
    with pytest.raises(ValueError, match=r"data: got 2 of torch.uint8, expected 3 of torch.uint8"):
        ops.mask(torch.zeros(17), torch.zeros(2, dtype=torch.uint8))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_keeps_its_share_and_the_mean(p):
    x = torch.randn(1 << 20, generator=seeded(1)).abs() + 0.1
    scale = 1 / (1 - p) if p < 1 else 0.0
    y = ops.dropout(x, p, scale, 77 << 32 | 5)
    deviation = (p * (1 - p) / len(x)) ** 0.5
    assert abs((y != 0).double().mean() - (1 - p)) <= 4 * deviation
    spread = (scale * (p * (1 - p)) ** 0.5) * x.double().norm() / len(x)
    assert abs((y.double() - x).mean()) <= 4 * spread + 1e-9 or p == 1
    kept = y != 0
    assert torch.equal(y[kept], (x * scale)[kept])
    other = ops.dropout(x, p, scale, 77 << 32 | 6) != 0
    correlation = ((kept.double() - (1 - p)) * (other.double() - (1 - p))).mean()
    assert abs(correlation) <= 4 * p * (1 - p) / len(x) ** 0.5 + 1e-9


# The operators


@pytest.mark.parametrize("fmt", [BlockFloat(4), BlockFloat(5, 3), FixedPoint(8), FixedPoint(6, 3), MXFP4()], ids=str)
def test_operators_are_registered_as_torch_wants_them(fmt):
    text = str(fmt)
    x = awkward_tensor((33, 20), seed=1, finite=True)
    for seed in SEEDS:
        torch.library.opcheck(ops.fake_quantize, (x, 0, text, seed, torch.float32))
        torch.library.opcheck(ops.pack, (x, -1, text, seed))
    torch.library.opcheck(ops.fake_quantize, (x, 1, text, None, torch.bfloat16))
    torch.library.opcheck(ops.unpack, (ops.pack(x, 0, text, None), [33, 20], 0, text, torch.float32))
    if fmt.group != "tensor":
        torch.library.opcheck(ops.quantize_and_pack, (x, text, text, torch.float32))


@pytest.mark.parametrize("fmt", [BlockFloat(4, "row"), FixedPoint(8), FixedPoint(6, per_row=True)], ids=str)
def test_operators_of_factors_are_registered_as_torch_wants_them(fmt):
    x = awkward_tensor((33, 20), seed=1, finite=True)
    for seed in SEEDS:
        torch.library.opcheck(ops.factorize, (x, 1, str(fmt), seed))
    torch.library.opcheck(ops.unpack_factors, (ops.pack(x, 0, str(fmt), None), [33, 20], 0, str(fmt)))


def test_dropout_and_masks_are_registered_as_torch_wants_them():
    x = torch.randn(33, 20, generator=seeded(1))
    torch.library.opcheck(ops.dropout, (x, 0.3, 2.0, 5))
    torch.library.opcheck(ops.pack_positive, (x,))
    torch.library.opcheck(ops.mask, (x, ops.pack_positive(x)))


FOUR, BYTES = "bfp4", torch.zeros(34, dtype=torch.uint8)
X = torch.zeros(2, 16)
XS = torch.zeros(1, 2, 2), X[None], X[None]
SEED = "got {}, expected 0 to 2^62 - 1, or None for nearest rounding"
BAD_CALLS = [
    *(
        call
        for seed in (-1, 2**62)
        for call in (
            (SEED.format(seed), "fake_quantize", (X, 1, FOUR, seed, X.dtype)),
            (SEED.format(seed), "pack", (X, 1, FOUR, seed)),
            (SEED.format(seed), "dropout", (X, 0.5, 2.0, seed)),
        )
    ),
    *(
        call
        for dtype in (torch.float64, torch.int8, torch.bool)
        for call in (
            (f"dtype: got {dtype}, expected float32, bfloat16 or float16", "fake_quantize", (X, 1, FOUR, None, dtype)),
            (f"dtype: got {dtype}, expected float32", "unpack", (BYTES[:18], [32], 0, FOUR, dtype)),
            (f"x: got {dtype}, expected float32", "fake_quantize", (X.to(dtype), 1, FOUR, None, X.dtype)),
            (f"x: got {dtype}, expected float32", "pack", (X.to(dtype), 1, FOUR, None)),
            (f"x: got {dtype}, expected float32", "dropout", (X.to(dtype), 0.5, 2.0, 1)),
            (f"x: got {dtype}, expected float32", "pack_positive", (X.to(dtype),)),
            (f"x: got {dtype}, expected float32", "mask", (X.to(dtype), BYTES[:4])),
        )
    ),
    ("dim: got 2, expected one of a tensor with 2 dimensions", "fake_quantize", (X, 2, FOUR, None, X.dtype)),
    ("dim: got -3, expected one of a tensor with 2 dimensions", "pack", (X, -3, FOUR, None)),
    ("dim: got 1, expected one of a tensor with 1 dimensions", "unpack", (BYTES[:18], [32], 1, FOUR, X.dtype)),
    ("dim: got -2, expected one of a tensor with 1", "quantize_and_pack", (X[0], FOUR, FOUR, X.dtype)),
    ("got 9 of torch.uint8, expected 18 of torch.uint8", "unpack", (BYTES[:9], [32], 0, FOUR, X.dtype)),
    ("got 19 of torch.uint8, expected 18 of torch.uint8", "unpack", (BYTES[:19], [32], 0, FOUR, X.dtype)),
    ("got 18 of torch.int8, expected 18 of torch.uint8", "unpack", (BYTES[:18].char(), [32], 0, FOUR, X.dtype)),
    ("got 18 of torch.float32, expected 18", "unpack", (BYTES[:18].float(), [32], 0, FOUR, X.dtype)),
    ("got 18 of torch.uint8, expected 32 of torch.uint8", "unpack", (BYTES[:18], [2, 16], 0, FOUR, X.dtype)),
    ("got 1 of torch.uint8, expected 0 of torch.uint8", "unpack", (BYTES[:1], [0], 0, FOUR, X.dtype)),
    ("data: got 2 dimensions, expected 1", "unpack", (BYTES[:18].view(2, 9), [32], 0, FOUR, X.dtype)),
    ("shape: got [-1, 16], expected no negative size", "unpack", (BYTES[:18], [-1, 16], 0, FOUR, X.dtype)),
    ("got 3 of torch.uint8, expected 4 of torch.uint8", "mask", (X, BYTES[:3])),
    ("got 5 of torch.uint8, expected 4 of torch.uint8", "mask", (X, BYTES[:5])),
    ("got 4 of torch.float32, expected 4 of torch.uint8", "mask", (X, BYTES[:4].float())),
    ("p: got -0.1, expected 0 to 1", "dropout", (X, -0.1, 2.0, 1)),
    ("p: got nan, expected 0 to 1", "dropout", (X, math.nan, 2.0, 1)),
    *(
        call
        for bits in (1, 17, 64)
        for call in (
            (f"a_bits: got {bits}, expected 2 to 16, or 0", "gemm", (*XS, bits, 4, 1, 1, None, False)),
            (f"b_bits: got {bits}, expected 2 to 16, or 0", "gemm", (*XS, 4, bits, 1, 1, None, False)),
        )
    ),
    *(
        call
        for terms in (0, 3)
        for call in (
            (f"a_terms: got {terms}, expected 1 or 2", "gemm", (*XS, 0, 0, terms, 1, None, False)),
            (f"b_terms: got {terms}, expected 1 or 2", "gemm", (*XS, 0, 0, 1, terms, None, False)),
        )
    ),
    (
        "quantize_and_pack: expected formats with a box size",
        "quantize_and_pack", (X, FOUR, "fixed4", X.dtype),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("message", "name", "arguments"), BAD_CALLS, ids=lambda value: str(value)[:30])
def test_what_an_operator_refuses_it_refuses_in_every_implementation(message, name, arguments):
    kind = TypeError if message.startswith("x: ") else IndexError if message.startswith("dim: ") else ValueError
    for call in (*ops._OPERATORS[name][1:], getattr(ops, name)):
        with pytest.raises(kind, match=re.escape(message)):
            call(*arguments)


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("bits: got 5 for the kernels, expected 4", {"bits": 5}),
        ("box_size: got 0 for the kernels, expected 16", {"box_size": 0}),
        ("box_size: got -16 for the kernels, expected 16", {"box_size": -16}),
        ("max_code: got 8, expected 0 to 7 in 4 bits", {"max_code": 8.0}),
        ("max_code: got -1, expected 0 to 7 in 4 bits", {"max_code": -1.0}),
        ("min_code: got -8, expected -7 to 0 in 4 bits", {"min_code": -8.0}),
        ("min_code: got -9, expected -8 to 0 in 4 bits", {"min_code": -9.0, "signed_zero": 0}),
        ("min_code: got 1, expected -7 to 0 in 4 bits", {"min_code": 1.0}),
        ("fixed_exponent: got 255, expected 0 to 254", {"fixed_exponent": 255}),
        ("fixed_exponent: got -1, expected 0 to 254", {"fixed_exponent": -1}),
        ("headroom: got -1, expected 0 to 8388607", {"headroom": -1}),
        ("headroom: got 8388608, expected 0 to 8388607", {"headroom": 1 << 23}),
        ("element_exponent: got 16, expected 0 to 15", {"element_exponent": 16}),
        ("least_exponent: got 2, expected 0 or 1", {"least_exponent": 2}),
        ("exponent_bits: got 3 of 4 bits, expected 2 to 5 of at most 8", {"exponent_bits": 3}),
        ("exponent_bits: got -1 of 4 bits, expected 2 to 5 of at most 8", {"exponent_bits": -1}),
        ("max_code: got 7, expected 0 to 6 in 4 bits", {"exponent_bits": 2, "min_code": -6.0}),
    ],
)
def test_a_format_that_tells_the_kernels_what_it_is_not_is_refused(message, bad):
    class Lying(BlockFloat):
        def kernel_spec(self):
            return super().kernel_spec()._replace(**bad)

    with pytest.raises(ValueError, match=re.escape(f"bfp4: {message}")):
        _ = Lying(4).spec


def test_what_all_of_a_tensor_shares_is_nothing_for_the_kernels():
    lying = type("Lying", (MXFP4,), {"tensor_bytes": 4})
    with pytest.raises(ValueError, match="tensor_bytes: got 4 for the kernels, expected 0"):
        _ = lying().spec


@pytest.mark.parametrize("overridden", ["nbytes", "codes_nbytes"])
def test_bytes_that_the_kernels_do_not_count_so_are_refused(overridden):
    lying = type("Lying", (BlockFloat,), {overridden: lambda self, *arguments: 1})
    with pytest.raises(ValueError, match="nbytes: got False for the kernels"):
        _ = lying(4).spec


@pytest.mark.parametrize("name", ["fake_quantize", "unpack"])
def test_on_the_meta_device_too(name):
    arguments = {
        "fake_quantize": (X.to("meta"), 1, FOUR, -1, X.dtype),
        "unpack": (BYTES[:19].to("meta"), [32], 0, FOUR, X.dtype),
    }
    with pytest.raises(ValueError, match=r"expected (0 to|18 of torch.uint8)"):
        getattr(ops, name)(*arguments[name])


def test_bytes_that_do_not_fit_the_shape_are_refused(isa):
    with pytest.raises(ValueError, match=r"data: got 9 of torch.uint8, expected 18 of torch.uint8"):
        ops.unpack(torch.zeros(9, dtype=torch.uint8), [32], 0, "bfp4", torch.float32)


def test_without_kernels_the_definition_runs(monkeypatch):
    x = torch.randn(20, 40, generator=seeded(0))
    operand, stash = quantize_and_pack(x, BlockFloat(4), BlockFloat(2))
    monkeypatch.setattr(native, "kernels", None)
    monkeypatch.setattr(native, "unavailable", "the kernels were not built")
    monkeypatch.delenv(native.VARIABLE, raising=False)
    ops._say_without_native_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"^cpu: no kernels, .*, about ten times slower: the kernels were not built$"):
        again, again_stash = quantize_and_pack(x, BlockFloat(4), BlockFloat(2))
    assert_equal_bits(again, operand)
    assert torch.equal(again_stash.data, stash.data)
    assert_equal_bits(again_stash.dequantize(), stash.dequantize())


def test_who_asks_for_plain_torch_is_not_told(monkeypatch, recwarn):
    monkeypatch.setattr(native, "kernels", None)
    monkeypatch.setenv(native.VARIABLE, "torch")
    ops._say_without_native_kernels.cache_clear()
    pack(torch.ones(20), BlockFloat(4))
    ops._say_without_native_kernels.cache_clear()
    assert not recwarn


# Choosing an instruction set


def test_the_best_instruction_set_is_taken(monkeypatch):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    kernels, unavailable = native._choose()
    assert (kernels and kernels.isa) == (HERE[0] if HERE else None)
    assert bool(unavailable) == (kernels is None)


def test_the_variable_forces_an_instruction_set_or_torch(monkeypatch):
    for isa in HERE:
        monkeypatch.setenv(native.VARIABLE, isa)
        kernels, _ = native._choose()
        assert kernels is not None and kernels.isa == isa
    monkeypatch.setenv(native.VARIABLE, "torch")
    assert native._choose() == (None, "FAIRSEQ_DSQ_ISA=torch")


def test_a_wrong_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "sse")
    with pytest.raises(
        ValueError, match=r"^FAIRSEQ_DSQ_ISA: got 'sse', expected one of amx, avx512, avx2, baseline, torch$"
    ):
        native._choose()


def test_an_instruction_set_that_cannot_run_is_refused(monkeypatch):
    def without(isa):
        raise native.Unavailable(f"{isa}: this CPU does not run it")

    monkeypatch.setenv(native.VARIABLE, "avx512")
    monkeypatch.setattr(native, "Kernels", without)
    with pytest.raises(ValueError, match=r"^FAIRSEQ_DSQ_ISA=avx512: avx512: this CPU does not run it$"):
        native._choose()


@pytest.mark.skipif("avx512" not in HERE, reason="this CPU has no AVX-512")
def test_amx_is_built_wherever_the_compiler_knows_it_and_runs_where_the_cpu_does():
    compiler = subprocess.run(
        ["c++", "-mamx-tile", "-mamx-bf16", "-fsyntax-only", "-x", "c++", "/dev/null"], capture_output=True, check=False
    )
    assert hasattr(native._library(), "dsq_amx_gemm") == (compiler.returncode == 0)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert ("amx" in HERE) == ({"amx_bf16", "amx_tile"} <= set(flags) and compiler.returncode == 0)


@pytest.mark.skipif("avx512" not in HERE, reason="this CPU has no AVX-512")
def test_the_variable_has_tiles_emulated(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, native.EMULATED)
    kernels, _ = native._choose()
    assert kernels is not None
    assert (kernels.isa, kernels.has_gemm, kernels.gemm_takes_values) == ("amx_emulated", True, True)


@needs_kernels
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "source_number", lambda: 1)
    native._library.cache_clear()
    try:
        with pytest.raises(native.Unavailable, match="was built of other sources: install fairseq_dsq again"):
            native.Kernels(HERE[0])
    finally:
        native._library.cache_clear()
