"""Formats: their limits, their bytes, their names, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from fairseq_dsq import formats
from fairseq_dsq.formats import (
    BlockFloat,
    FixedPoint,
    Float32,
    FormatOptions,
    Integer,
    Logarithmic,
    Ternary,
    definition,
    make_format,
    parse,
)
from fairseq_dsq.precision import parse_levels

WIDTHS = range(2, 33)
MX = ["mxfp4", "mxfp6e2m3", "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2", "mxint8"]
FAMILIES = ["bfp", "fixed", "float32", "fp8e4m3", "fp8e5m2", "int", *MX, "nvfp4", "ternary"]


@pytest.mark.parametrize("text", [text for texts in formats.examples().values() for text in texts])
def test_a_format_that_was_used_and_pickled_is_the_same_and_rounds_alike(text):
    fmt, x = parse(text), torch.tensor([500.0, -1000.0, math.inf, 0.3])

    def rounded(by):
        # Of parts, too: an Inf makes its group NaN.
        values = [definition.fake_quantize(part, by, 0, None, torch.float32) for part in (x, x[:2], x[2:], x[3:])]
        return torch.cat(values).view(torch.int32).tolist()

    first = rounded(fmt)
    for again in (pickle.loads(pickle.dumps(fmt)), copy.deepcopy(fmt)):
        assert again == fmt and hash(again) == hash(fmt) and again.text == text
        assert rounded(again) == first


# Limits of the codes


@pytest.mark.parametrize("bits", range(2, 26))
def test_block_float_codes_are_sign_magnitude(bits):
    fmt = BlockFloat(bits)
    assert (fmt.min_code, fmt.max_code) == (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    assert fmt.signed_zero


@pytest.mark.parametrize("bits", range(26, 33))
def test_wide_codes_end_at_the_largest_code_of_24_significant_bits(bits):
    for fmt in (BlockFloat(bits), FixedPoint(bits), FixedPoint(bits, 8)):
        assert fmt.max_code < 2 ** (bits - 1)
        assert fmt.max_code >> (bits - 25) == 2**24 - 1
        assert fmt.max_code % 2 ** (bits - 25) == 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_dynamic_fixed_point_leaves_the_odd_code_out_and_static_uses_it(bits):
    dynamic, static = FixedPoint(bits), FixedPoint(bits, bits // 2)
    assert dynamic.min_code == -dynamic.max_code
    assert static.min_code == -(2 ** (bits - 1))
    assert static.max_code == dynamic.max_code == BlockFloat(bits).max_code
    assert not dynamic.signed_zero
    assert not static.signed_zero


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_fixed_exponent_gives_the_static_scale(bits):
    for fraction_bits in (0, 1, bits // 2, bits):
        exponent = FixedPoint(bits, fraction_bits).fixed_exponent
        assert exponent - (bits - 2) == -fraction_bits  # scale = 2^(E - (bits - 2))
    assert FixedPoint(bits).fixed_exponent is None
    assert BlockFloat(bits).fixed_exponent is None


def test_box_sizes():
    assert BlockFloat(4).group == 16
    assert BlockFloat(4, box_size=32).group == 32
    assert BlockFloat(4, box_size="row").group == "row"
    assert (FixedPoint(4).group, FixedPoint(4, per_row=True).group) == ("tensor", "row")


# Bytes


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_box_of_sixteen_takes_two_bytes_a_bit_and_one(bits):
    assert BlockFloat(bits).nbytes((16,)) == 2 * bits + 1
    assert BlockFloat(bits).nbytes((10, 32)) == 20 * (2 * bits + 1)


@pytest.mark.parametrize(
    ("fmt", "shape", "dim", "expected"),
    [
        (BlockFloat(4), (), 0, 1 + 1),
        (BlockFloat(4), (), -1, 1 + 1),
        (BlockFloat(4), (1,), 0, 1 + 1),
        (BlockFloat(3), (5,), 0, 1 + 2),  # 15 bits
        (BlockFloat(3), (21,), 0, (1 + 6) + (1 + 2)),
        (BlockFloat(4), (3, 20), 1, 3 * ((1 + 8) + (1 + 2))),
        (BlockFloat(4), (3, 20), -1, 3 * ((1 + 8) + (1 + 2))),
        (BlockFloat(4), (3, 20), 0, 20 * (1 + 2)),  # 12 bits
        (BlockFloat(4), (3, 20), -2, 20 * (1 + 2)),
        (BlockFloat(4), (2, 17, 3), 1, 6 * ((1 + 8) + (1 + 1))),
        (BlockFloat(32), (17,), 0, (1 + 64) + (1 + 4)),
        (BlockFloat(4, box_size=8), (20,), 0, 2 * (1 + 4) + (1 + 2)),
        (BlockFloat(3, box_size=3), (7,), 0, 2 * (1 + 2) + (1 + 1)),
        (BlockFloat(4), (0,), 0, 0),
        (BlockFloat(4), (5, 0), 0, 0),
        (BlockFloat(4), (5, 0), 1, 0),
        (FixedPoint(4), (), 0, 1 + 1),
        (FixedPoint(4), (3, 20), 0, 1 + 30),
        (FixedPoint(4), (3, 20), 1, 1 + 30),
        (FixedPoint(3, 1), (3, 7), 0, 1 + 8),  # 63 bits
        (FixedPoint(8), (5, 0), 0, 0),
        (BlockFloat(4, "row"), (3, 20), 1, 3 * (1 + 10)),
        (BlockFloat(4, "row"), (3, 20), 0, 20 * (1 + 2)),
        (Integer(8), (3, 20), 1, 3 * (4 + 20)),
        (Integer(4, 16), (3, 20), 1, 3 * ((4 + 8) + (4 + 2))),
        (Integer(8, "tensor"), (3, 20), 1, 4 + 60),
        (Logarithmic(8), (3, 20), 1, 3 * (4 + 20)),
        (Logarithmic(5, 16), (3, 20), 1, 3 * ((4 + 10) + (4 + 3))),
        (Ternary(), (3, 7), 1, 4 + 6),
        (Ternary(group_size="row"), (3, 7), 1, 3 * (4 + 2)),
        (Float32(), (), 0, 4),
        (Float32(), (3, 20), 0, 240),
        (Float32(), (3, 0), 1, 0),
    ],
    ids=str,
)
def test_nbytes_of_a_shape(fmt, shape, dim, expected):
    assert fmt.nbytes(shape, dim) == expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_nbytes_adds_up_box_by_box(bits):
    for box_size in (1, 8, 16, 20):
        for length in (1, 15, 16, 17, 40):
            boxes = [min(box_size, length - start) for start in range(0, length, box_size)]
            expected = 6 * sum(1 + math.ceil(values * bits / 8) for values in boxes)
            assert BlockFloat(bits, box_size).nbytes((2, length, 3), 1) == expected


# Names


@pytest.mark.parametrize("bits", WIDTHS)
def test_str_and_parse_are_inverse(bits):
    static = [FixedPoint(bits, fraction_bits) for fraction_bits in range(bits + 1)]
    boxes = [BlockFloat(bits, box_size) for box_size in (1, 8, 32, 128)]
    for fmt in (BlockFloat(bits), *boxes, FixedPoint(bits), *static, Float32()):
        assert parse(str(fmt)) == fmt


def test_a_name_with_boxes_of_nothing_is_refused():
    with pytest.raises(ValueError, match="box_size: got 0"):
        parse("bfp4/0")


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (BlockFloat(4), "bfp4"),
        (BlockFloat(16), "bfp16"),
        (BlockFloat(4, box_size=32), "bfp4/32"),
        (FixedPoint(8), "fixed8"),
        (FixedPoint(8, 4), "fixed8.4"),
        (FixedPoint(8, 0), "fixed8.0"),
        (Float32(), "float32"),
    ],
)
def test_names(fmt, text):
    assert str(fmt) == text
    assert parse(text) == fmt


@pytest.mark.parametrize(
    "text",
    [
        *("", "bfp", "4", "BFP4", "bfp 4", " bfp4", "bfp4 ", "bfp4\n", "bfp4x", "bfp4/", "bfp4/col", "bfp4/32.1"),
        *("bfp-4", "bfp4.2", "int8", "int8/0x1", "log8", "log8/col", "fixed4x8", "fixed8.", "fixed.4", "fixed8.4.2"),
        *("float16", "float3232", "float32.1"),
    ],
)
def test_text_that_names_no_format_is_refused_and_quoted(text):
    with pytest.raises(ValueError, match="format: got") as error:
        parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["bfp0", "bfp1", "bfp33", "fixed1", "fixed33", "fixed8.9"])
def test_names_of_widths_that_are_not_defined_are_refused(text):
    with pytest.raises(ValueError, match=r"bits: got \d+, expected"):
        parse(text)


# What the flags say


def test_the_choices_of_the_flag():
    assert formats.names() == FAMILIES


@pytest.mark.parametrize(
    ("name", "q", "options", "expected"),
    [
        ("bfp", 4, FormatOptions(), BlockFloat(4)),
        ("fixed", 8, FormatOptions(), FixedPoint(8)),
        ("float32", 32, FormatOptions(), Float32()),
        ("bfp", 2, FormatOptions(sign_bit_extra=True), BlockFloat(3)),
        ("fixed", 8, FormatOptions(sign_bit_extra=True), FixedPoint(9)),
        ("fixed", 8, FormatOptions(fixed_scale="static"), FixedPoint(8, 4)),
        ("fixed", 5, FormatOptions(fixed_scale="static"), FixedPoint(5, 2)),
        ("fixed", 7, FormatOptions(sign_bit_extra=True, fixed_scale="static"), FixedPoint(8, 4)),
        ("fixed", 7, FormatOptions(fixed_scale="row"), FixedPoint(7, per_row=True)),
        ("bfp", 4, FormatOptions(fixed_scale="static"), BlockFloat(4)),
        ("bfp", 4, FormatOptions(scale="fit"), BlockFloat(4, scale="fit")),
        ("fixed", 4, FormatOptions(scale="fit"), FixedPoint(4, scale="fit")),
        ("fixed", 4, FormatOptions(fixed_scale="row", scale="fit"), FixedPoint(4, per_row=True, scale="fit")),
        ("float32", 32, FormatOptions(sign_bit_extra=True), Float32()),
    ],
)
def test_name_q_and_options_make_a_format(name, q, options, expected):
    assert make_format(name, q, options) == expected


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=f"format: got 'float', expected one of {', '.join(FAMILIES)}$"):
        make_format("float", 8)


def test_a_format_without_negative_values_is_no_choice_of_the_flag_and_no_operand_s():
    assert not parse("log8/row").signed
    with pytest.raises(ValueError, match=f"format: got 'log', expected one of {', '.join(FAMILIES)}$"):
        make_format("log", 8)
    with pytest.raises(ValueError, match=r"level 0: q1 = log8/row: expected a format with negative values"):
        parse_levels("[4,log8/row,4,16]")


def test_an_extra_sign_bit_does_not_fit_on_top_of_32_bits():
    with pytest.raises(ValueError, match="bits: got 33"):
        make_format("bfp", 32, FormatOptions(sign_bit_extra=True))


def test_a_new_format_is_one_registration():
    formats.register("wide", lambda q, options: BlockFloat(options.bits(q), box_size=64))
    try:
        assert formats.names() == sorted([*FAMILIES, "wide"])
        assert make_format("wide", 4) == parse("wide4") == BlockFloat(4, box_size=64)
        with pytest.raises(ValueError, match="'wide' is registered already"):
            formats.register("wide", lambda q, options: BlockFloat(q))
    finally:
        formats.unregister("wide")
    with pytest.raises(ValueError, match="format: got 'wide4'"):
        parse("wide4")


# What is refused


@pytest.mark.parametrize("bits", [-4, 0, 1, 33, 64])
@pytest.mark.parametrize("family", [BlockFloat, FixedPoint])
def test_widths_outside_2_to_32_are_refused(family, bits):
    with pytest.raises(ValueError, match=f"bits: got {bits}, expected 2 to 32"):
        family(bits)


@pytest.mark.parametrize("bits", [4.0, "4", None, True])
@pytest.mark.parametrize("family", [BlockFloat, FixedPoint])
def test_widths_that_are_no_integers_are_refused(family, bits):
    with pytest.raises(TypeError, match="bits: got"):
        family(bits)


@pytest.mark.parametrize("box_size", [0, -16, 16.0, "16", None, True])
def test_box_sizes_that_are_not_defined_are_refused(box_size):
    with pytest.raises(ValueError, match="box_size: got"):
        BlockFloat(4, box_size=box_size)


@pytest.mark.parametrize("fraction_bits", [-1, 9, 100])
def test_fractions_that_do_not_fit_are_refused(fraction_bits):
    with pytest.raises(ValueError, match=f"fraction_bits: got {fraction_bits}, expected 0 to 8"):
        FixedPoint(8, fraction_bits)


@pytest.mark.parametrize("fraction_bits", [2.5, 4.0, True])
def test_fractions_that_are_no_integers_are_refused(fraction_bits):
    with pytest.raises(TypeError, match="fraction_bits: got"):
        FixedPoint(8, fraction_bits)


@pytest.mark.parametrize("bits", [16, 31, 64, None])
def test_float32_has_32_bits(bits):
    with pytest.raises(ValueError, match=r"bits: got .* expected 32 for float32"):
        Float32(bits)


@pytest.mark.parametrize("fmt", [BlockFloat(4), FixedPoint(4), Float32()], ids=str)
def test_formats_are_values(fmt):
    assert fmt == dataclasses.replace(fmt)
    assert len({fmt, dataclasses.replace(fmt)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bits = 5


# A scale that does not clip


FITTED = [
    BlockFloat(4, scale="fit"),
    BlockFloat(7, 5, scale="fit"),
    FixedPoint(8, scale="fit"),
    FixedPoint(8, per_row=True, scale="fit"),
]


@pytest.mark.parametrize("fmt", FITTED, ids=str)
def test_a_scale_that_fits_is_part_of_the_name(fmt):
    assert str(fmt).endswith("-fit") and parse(str(fmt)) == fmt
    assert fmt.nbytes((3, 40)) == dataclasses.replace(fmt, scale="floor").nbytes((3, 40))


@pytest.mark.parametrize("text", ["float32-fit", "fixed8.4-fit", "bfp4-floor", "bfp4-fit-fit"])
def test_names_that_no_scale_has_are_refused(text):
    with pytest.raises(ValueError, match=f"format: got '{text}', expected such as"):
        parse(text)


def test_a_scale_that_is_none_is_refused():
    for family in (BlockFloat, FixedPoint):
        with pytest.raises(ValueError, match="scale: got 'ceil', expected one of floor, fit"):
            family(4, scale="ceil")
    with pytest.raises(ValueError, match="scale: got 'fit' beside fraction_bits"):
        FixedPoint(8, 4, scale="fit")
