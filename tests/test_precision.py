"""Which operand is held at which q, and how levels are read from a flag."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import pytest

from fairseq_dsq.formats import BlockFloat, FixedPoint, Float32, FormatOptions
from fairseq_dsq.ledger import Gemm
from fairseq_dsq.nn import GemmConfig
from fairseq_dsq.precision import PrecisionConfig, levels_to_str, parse_levels, parse_q


def qs(levels):
    return [level.q for level in levels]


# Operands


def operand_bits(level, kind):
    return tuple(member.bits for member in level.operand_members(kind))


def test_each_q_has_its_operand():
    precision = PrecisionConfig((3, 5, 7, 9))
    assert precision.operands("output")[0] == BlockFloat(3)
    assert precision.stash("input") == BlockFloat(5)
    assert precision.operands("grad_input")[1] == BlockFloat(7)
    assert precision.operands("grad_input")[0] == BlockFloat(9)


def test_each_gemm_has_its_operands():
    precision = PrecisionConfig((3, 5, 7, 9))
    assert operand_bits(precision, "output") == (3, 3)
    assert operand_bits(precision, "grad_input") == (9, 7)
    assert operand_bits(precision, "grad_weight") == (5, 9)


def test_operands_have_the_named_format_and_its_options():
    extra = PrecisionConfig((2, 2, 2, 16), options=FormatOptions(sign_bit_extra=True))
    assert extra.operands("output")[0] == BlockFloat(3)
    assert extra.operands("grad_input")[0] == BlockFloat(17)
    assert operand_bits(extra, "grad_input") == (16, 2)  # q as the flag gives it
    assert PrecisionConfig((4, 4, 4, 8), "fixed").operands("grad_weight")[1] == FixedPoint(8)
    static = PrecisionConfig((4, 4, 4, 8), "fixed", FormatOptions(fixed_scale="static"))
    assert static.stash("input") == FixedPoint(4, 2)
    assert PrecisionConfig((32, 32, 32, 32), "float32").stash("weight") == Float32()


def test_float32_requires_four_times_32():
    for index in range(4):
        q = [32, 32, 32, 32]
        q[index] = 16
        with pytest.raises(ValueError, match=rf"q{index} = 16: bits: got 16, expected 32"):
            PrecisionConfig(tuple(q), "float32")


def test_a_config_is_a_value():
    assert PrecisionConfig((2, 2, 2, 16)) == PrecisionConfig((2, 2, 2, 16))
    assert len({PrecisionConfig((2, 2, 2, 16)), PrecisionConfig((2, 2, 2, 16))}) == 1
    assert PrecisionConfig((2, 2, 2, 16)) != PrecisionConfig((2, 2, 2, 16), "fixed")
    assert str(PrecisionConfig((2, 2, 2, 16))) == "[2,2,2,16]"


def test_a_sign_on_top_of_q_moves_the_range_of_q():
    extra = FormatOptions(sign_bit_extra=True)
    assert PrecisionConfig((1, 2, 2, 31), "bfp", extra).formats == PrecisionConfig((2, 3, 3, 32)).formats
    for bad in (0, 32):
        with pytest.raises(ValueError, match=f"q0: got {bad}, expected 1 to 31"):
            PrecisionConfig((bad, 2, 2, 16), "bfp", extra)


def test_another_process_finds_a_level_that_was_pickled(tmp_path):
    level = PrecisionConfig((2, 2, 2, "mxfp8e5m2"))
    config = GemmConfig(level)
    assert hash(level) and config.plans == {}
    config.plans["made here"] = None
    (tmp_path / "level").write_bytes(pickle.dumps((level, config)))
    script = (
        "import pickle, sys; from fairseq_dsq.precision import PrecisionConfig; "
        "level, config = pickle.load(open(sys.argv[1], 'rb')); "
        "assert level in {PrecisionConfig((2, 2, 2, 'mxfp8e5m2'))} and config.precision == level and not config.plans"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "level"], check=True)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("bad", [-2, 0, 1, 33])
def test_a_q_out_of_range_is_named_by_its_index(index, bad):
    q = [2, 2, 2, 2]
    q[index] = bad
    with pytest.raises(ValueError, match=f"q{index}: got {bad}, expected 2 to 32"):
        PrecisionConfig(tuple(q))


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("bad", [2.0, "2", None, True])
def test_a_q_that_is_no_integer_is_named_by_its_index(index, bad):
    q = [2, 2, 2, 2]
    q[index] = bad
    with pytest.raises(TypeError, match=f"q{index}: got {bad!r}, expected an integer"):
        PrecisionConfig(tuple(q))


@pytest.mark.parametrize("q", [(), (2,), (2, 2, 2), (2, 2, 2, 2, 2)], ids=len)
def test_four_numbers_are_required(q):
    with pytest.raises(ValueError, match=f"got {len(q)} numbers .* expected four"):
        PrecisionConfig(q)


@pytest.mark.parametrize("q", [(2, 2, 2, 16), ("bfp4",) * 4], ids=str)
def test_an_unknown_format_is_refused_whatever_q_names(q):
    with pytest.raises(ValueError, match="format_name: got 'other', expected one of bfp, "):
        PrecisionConfig(q, "other")


# Formats and pairs as q


def test_a_q_may_be_a_formats_text_or_a_pair():
    level = PrecisionConfig(("int8/row|bfp4/32", "fixed8", 4, "bfp16|bfp8"))
    assert [tuple(map(str, level.operands(kind))) for kind in ("output", "grad_input", "grad_weight")] == [
        ("int8/row", "bfp4/32"),
        ("bfp16", "bfp4"),
        ("fixed8", "bfp8"),
    ]
    assert (str(level.stash("input")), str(level.stash("weight"))) == ("fixed8", "bfp4")
    assert [[member.bits for member in pair] for pair in level.members] == [[8, 4], [8, 8], [4, 4], [16, 8]]
    assert [member.family for member in level.operand_members("output")] == ["int", "bfp"]
    assert level.operand_members("grad_weight")[0].family == "fixed"
    assert level.by_value == "[int8/row|bfp4/32,fixed8,bfp4,bfp16|bfp8]"
    assert parse_levels(str(level)) == (level,)


def test_a_pair_may_mix_bits_and_formats():
    level = PrecisionConfig(("8|int4/row", 4, 4, 16), "fixed", FormatOptions(sign_bit_extra=True))
    assert [str(fmt) for fmt in level.operands("output")] == ["fixed9", "int4/row"]
    assert operand_bits(level, "output") == (8, 4)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        ((4, "4|8", 4, 16), "q1: got 4|8, expected one format at most"),
        ((4, 4, "bfp4|bfp8", 16), "q2: got bfp4|bfp8, expected one format at most"),
        (("4|4|4", 4, 4, 16), "q0: got 4|4|4, expected a pair at most"),
        (("bfp99", 4, 4, 16), "q0 = bfp99: bits: got 99"),
        (("what8", 4, 4, 16), "q0 = what8: format: got 'what8', expected such as bfp4"),
        ((4, 4, 4, "16|40"), "q3: got 16|40, expected 2 to 32"),
    ],
)
def test_a_q_that_stands_for_no_format_is_named_by_its_index(q, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PrecisionConfig(q)


# GEMMs


def test_macs_and_elements_of_a_gemm():
    assert Gemm("output", 2, 3, 5).macs == 30
    assert Gemm("output", 2, 3, 5).elements == 6 + 15 + 10
    assert Gemm("output", 2, 3, 5, batch=7).macs == 7 * 30
    assert Gemm("output", 2, 3, 5, batch=7).elements == 7 * 31


# Reading the flag


@pytest.mark.parametrize("text", ["[2,2,2,16]", "2,2,2,16", "[2, 2, 2, 16]", "[ 2,2 ,2,16 ]"])
def test_four_integers_brackets_optional(text):
    assert parse_q(text) == (2, 2, 2, 16)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "[2,2,2]", "[2,2,2,16,16]", "[2,2,2,16", "2,2,2,16]", "[[2,2,2,16]]"),
        *("(2,2,2,16)", "{2,3,4,16}", "[2 2 2 16]", "[2,2,2,16];", "[2,2,2,2*8]", "[2,2,2,x]"),
        *("[2,2,2,16.0]", "[2,2,2,'16']", "[2,2,2,True]", "[2,2,2,None]"),
    ],
)
def test_anything_but_four_integers_is_refused_and_quoted(text):
    with pytest.raises(ValueError, match="expected four integers") as error:
        parse_q(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["[{[]: 1},2,2,16]", "[{[]},2,2,16]"])
def test_what_python_cannot_even_build_is_refused_alike(text):
    with pytest.raises(ValueError, match="expected four integers"):
        parse_q(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[2,2,2,16]", [(2, 2, 2, 16)]),
        ("[2,2,2,16] [16,4,4,16]", [(2, 2, 2, 16), (16, 4, 4, 16)]),
        ("2,2,2,16 16,4,4,16", [(2, 2, 2, 16), (16, 4, 4, 16)]),
        ("2, 2,2 ,16 16,4,4,16", [(2, 2, 2, 16), (16, 4, 4, 16)]),
        ("  [2, 2, 2, 16]\n\t[16, 4, 4, 16] ", [(2, 2, 2, 16), (16, 4, 4, 16)]),
        ("[2,2,2,16][16,4,4,16]", [(2, 2, 2, 16), (16, 4, 4, 16)]),
        ("[2,2,2,2] [2,2,2,2] [32,32,32,32]", [(2,) * 4, (2,) * 4, (32,) * 4]),
    ],
)
def test_levels_lowest_first(text, expected):
    assert qs(parse_levels(text)) == expected


def test_levels_carry_format_and_options():
    options = FormatOptions(fixed_scale="static")
    levels = parse_levels("[4,4,4,8] [8,8,8,8]", "fixed", options)
    assert {(level.format_name, level.options) for level in levels} == {("fixed", options)}
    assert levels[1].stash("input") == FixedPoint(8, 4)


def test_levels_and_their_text_are_inverse():
    text = "[2,2,2,16] [16,4,4,16] [32,32,32,32]"
    assert levels_to_str(parse_levels(text)) == text
    assert parse_levels(levels_to_str(parse_levels(text))) == parse_levels(text)


def test_levels_may_come_in_any_order():
    assert [level.q[0] for level in parse_levels("[16,4,4,16] [2,2,2,16]")] == [16, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[2,2,2,16],[16,4,4,16]", "got .*, expected .* nothing but spaces between them$"),
        ("[2,2,2,16]; [16,4,4,16]", "got .*, expected .* nothing but spaces between them$"),
        ("[[2,2,2,16],[16,4,4,16]]", "got .*, expected .* nothing but spaces between them$"),
        ("[2,2,2,16] 16,4,4,16", "got .*, expected .* nothing but spaces between them$"),
        ("[bfp40,4,4,16]", "level 0: got bfp40 in .*: bits: got 40, expected 2 to 32"),
        ("[4,4,4,16|fixed8.9]", "level 0: got fixed8.9 in .*: fraction_bits: got 9, expected 0 to 8$"),
        ("[4,4,4,fp8e4m3]", "level 0: got fp8e4m3 in .*, or formats such as bfp4, .*fp8e4m3/tensor"),
        ("[2,2,2]", "level 0: .*expected four"),
        ("[2,2,2,16] [16,4,16]", "level 1: .*expected four"),
        ("[2,2,2,16] [16,4,4,4,16]", "level 1: .*expected four"),
        ("[2,2,2,16] [16,4,4,x]", "level 1: .*expected four integers"),
        ("[2,2,2,16] [16,4,4,16.5]", "level 1: .*got 16.5 .*expected four integers"),
        ("[2,2,2,16] [16,4,4,True]", "level 1: .*got True .*expected four integers"),
        ("[2,2,2,16] [16,4,4,33]", "level 1: q3: got 33, expected 2 to 32"),
        ("[1,2,2,16] [16,4,4,16]", "level 0: q0: got 1, expected 2 to 32"),
        ("[2,-2,2,16]", "level 0: q1: got -2, expected 2 to 32"),
    ],
)
def test_a_malformed_level_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_levels(text)


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "fp8e4m3", "ternary"])
def test_bits_of_a_format_of_one_width_are_refused_with_what_to_write(name):
    with pytest.raises(ValueError, match=f"for {name}, or name formats: ") as error:
        parse_levels("[2,2,2,16]", name)
    (level,) = parse_levels(str(error.value).rpartition(": ")[2])
    assert {member.fmt.family for pair in level.members[:3] for member in pair} == {name}


def test_bits_of_other_formats_are_refused_without():
    for name in ("bfp", "int", "float32"):
        with pytest.raises(ValueError, match="expected") as error:
            parse_levels("[33,2,2,17]" if name != "float32" else "[2,2,2,2]", name)
        assert "name formats" not in str(error.value)


@pytest.mark.parametrize("text", ["", "   ", "\n", "[]", "[] [2,2,2,16]"])
def test_no_level_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_levels(text)


@pytest.mark.parametrize(
    "text",
    [
        "[2,2,2,16",
        "2,2,2,16]",
        "[2,2,2,16] [16,4,4,16",
        "[2,2,2,16] 16,4,4,16]",
        "[2,2,2,16]] [16,4,4,16]",
        "[[2,2,2,16] [16,4,4,16]]",
        "[[2,2,2,16]",
        "]2,2,2,16[",
        "[2,2,2,16],[16,4,4,16]",
        "[2,2,2,16] 16,4,4,16",
        "[2,2,2,16] x",
        "[2,2,2,1 6]",
    ],
)
def test_unbalanced_brackets_and_stray_text_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_levels(text)


def test_float32_levels():
    assert qs(parse_levels("[32,32,32,32]", "float32")) == [(32, 32, 32, 32)]
    with pytest.raises(ValueError, match="level 1: q1 = 16: bits: got 16, expected 32"):
        parse_levels("[32,32,32,32] [32,16,32,32]", "float32")
