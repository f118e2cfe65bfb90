"""Rows of 8-bit codes under a float32 scale: the kernels' bytes and values are the definition's, bit for bit."""

import math
import warnings

import pytest
import torch
from kernels.common import assert_equal_bits

from fairseq_dsq.formats import definition, parse
from fairseq_dsq.kernels import native, ops

SHAPES = [(1, 1), (5, 7), (3, 16), (2, 3, 33), (40,), (4, 1030), (2, 5000), (1, 3, 0)]


@pytest.fixture(params=[isa for isa in native.ISAS if isa != "amx"])  # which leaves rows to AVX-512
def isa(request, monkeypatch):
    try:
        monkeypatch.setattr(native, "kernels", native.Kernels(request.param))
    except native.Unavailable as error:
        pytest.skip(str(error))


def values(shape, signed, octaves, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator).mul_(-octaves).exp2_()
    return x * (torch.randint(0, 2, shape, generator=generator) * 2 - 1) if signed else x


def assert_definition(x, text):
    fmt = parse(text)
    for seed in (None, 5, 2**61 + 12345):
        data = ops.pack(x, -1, text, seed)
        assert torch.equal(data, definition.pack(x, fmt, -1, seed))
        out = ops.unpack(data, x.shape, -1, text, torch.float32)
        assert_equal_bits(out, definition.unpack(data, x.shape, fmt, -1, torch.float32))
        rounded = ops.fake_quantize(x, -1, text, seed, x.dtype)
        assert_equal_bits(rounded, definition.fake_quantize(x, fmt, -1, seed, x.dtype))


@pytest.mark.parametrize("text", ["int8/row", "log8/row"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_and_values_are_the_definition_s(isa, text, shape):
    for octaves in (1, 12, 34):
        for largest in (1.0, 3e38, 1e-37, 1e-44):
            assert_definition(values(shape, text[0] == "i", octaves).mul_(largest), text)


@pytest.mark.parametrize("text", ["int8/row", "log8/row"])
def test_rows_that_are_special_are_the_definition_s(isa, text):
    x = values((9, 50), text[0] == "i", 20)
    x[0], x[1], x[2, 49], x[3, 48], x[4, 0], x[5, 20] = 0.0, -0.0, math.nan, math.inf, -math.inf, -1e-40
    x[6, ::2], x[7, 3] = -0.0, 2.0**-149
    x[8, 5] = torch.finfo(torch.float32).max
    assert_definition(x, text)


@pytest.mark.parametrize("octave", range(-33, 1))
def test_every_neighbour_of_a_logarithmic_element_is_found(isa, octave):
    """Elements, the floats beside them, and their midpoints."""
    elements = parse("log8/row").from_codes(torch.arange(256))
    bits = elements.view(torch.int32)
    beside = torch.cat([bits + offset for offset in range(-2, 3)]).clamp_(max=bits.max()).view(torch.float32)
    middles = (elements[1:].double() + elements[:-1].double()).mul(0.5).float()
    inside = torch.linspace(0.5, 1, 2000).mul_(2.0**octave)
    x = torch.cat([beside, middles, inside, torch.ones(1)]).unsqueeze(0)
    assert_definition(x, "log8/row")


def test_half_precision_and_strides_are_the_definition_s(isa):
    x = values((30, 40), True, 8)
    assert_definition(x.mT, "int8/row")
    assert_definition(x.bfloat16(), "int8/row")
    data = ops.pack(x, -1, "int8/row", None)
    out = ops.unpack(data, x.shape, -1, "int8/row", torch.bfloat16)
    assert_equal_bits(out, definition.unpack(data, x.shape, parse("int8/row"), -1, torch.bfloat16))


def test_other_widths_and_dimensions_run_the_definition(isa):
    x = values((6, 10), False, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text, dim in (("log8/row", 0), ("log7/row", -1), ("log8/5", -1), ("int8/tensor", -1)):
            assert torch.equal(ops.pack(x, dim, text, 3), definition.pack(x, parse(text), dim, 3))
