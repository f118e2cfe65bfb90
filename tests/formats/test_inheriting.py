"""A format that inherits another one's code and changes its values runs as it is defined, whatever runs its parent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from nn.common import normal

from fairseq_dsq import formats, gemm
from fairseq_dsq.formats import (
    MXFP4,
    NVFP4,
    BlockFloat,
    FixedPoint,
    Integer,
    Logarithmic,
    MXInt8,
    ScaledE4M3,
    SmallFloat,
    Ternary,
    definition,
    parse,
)
from fairseq_dsq.nn import GemmConfig, linear, weight_format
from fairseq_dsq.precision import FLOAT32, PrecisionConfig, parse_levels
from fairseq_dsq.quantized import fake_quantize, pack, quantize_and_pack

MORE = 1 + 2.0**-9


class More:
    """Values of a format times 1 + 2^-9: no integers, and of nine significant bits more."""

    def decode(self, elements, scale):
        return super().decode(elements.mul_(MORE), scale)

    def factorize(self, elements, scale):
        return super().factorize(elements.mul_(MORE), scale)

    def __str__(self):
        return f"more-{super().__str__()}"


def inheriting(parent):
    return dataclass(frozen=True)(type(f"More{parent.__name__}", (More, parent), {}))


PARENTS = [Integer, Ternary, BlockFloat, FixedPoint, Logarithmic, MXFP4, MXInt8, NVFP4, ScaledE4M3, SmallFloat]
OWN = {parent: inheriting(parent) for parent in PARENTS}
TEXTS = ["int8/row", "int8/tensor", "int8/16", "ternary/row", "bfp8", "bfp8/row", "fixed8", "fixed8/row", "fixed8.4"]
TEXTS += ["mxfp4", "mxfp4/row", "mxint8", "nvfp4", "fp8e4m3/row", "fp8e4m3/tensor", "fp16"]


def parse_own(text):
    if not text.startswith("more-"):
        return None
    if text == "more-boxless4":
        return Boxless(4)
    plain = parse(text.removeprefix("more-"))
    return OWN[type(plain)](**vars(replace(plain)))


@pytest.fixture(autouse=True)
def registered():
    formats.register("more", None, parse_own)
    yield
    formats.unregister("more")


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("text", [*TEXTS, "log8/row"])
def test_values_are_those_of_its_definition(text, dim):
    fmt = parse(f"more-{text}")
    x = normal(40, 50).abs() + 0.01 if not fmt.signed else normal(40, 50)
    wanted = definition.fake_quantize(x, parse(text), dim, None, torch.float32)
    found = fake_quantize(x, fmt, dim)
    assert torch.allclose(found, wanted * MORE, rtol=2**-20, atol=0) and not torch.equal(found, wanted)
    assert torch.equal(pack(x, fmt, dim).dequantize(), found)
    operand, stash = quantize_and_pack(x, fmt, fmt, -1, -2)
    assert torch.equal(operand, fake_quantize(x, fmt)) and torch.equal(stash.dequantize(), fake_quantize(x, fmt, -2))
    with pytest.raises(ValueError, match=r"dtype: got torch.bfloat16 for torch.float32"):
        fake_quantize(x, fmt, dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", ["auto", *gemm.names()])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("sizes", [(5, 24, 7), (130, 160, 150)], ids=str)
def test_products_are_those_of_its_values(mode, text, sizes):
    if mode != "auto" and gemm.base._ENGINES[gemm.names().index(mode)].unavailable():
        pytest.skip(f"no {mode} engine here")
    m, k, n = sizes
    x, weight, fmt = normal(m, k, seed=1), normal(n, k, seed=2), parse(f"more-{text}")
    y = linear(x, weight, None, GemmConfig(PrecisionConfig((str(fmt), 32, 32, 32)), gemm=mode))
    a, b = fake_quantize(x, fmt).double(), fake_quantize(weight, fmt).double()
    assert ((y - a @ b.mT).abs() <= k * 2.0**-22 * (a.abs() @ b.abs().mT)).all()


@pytest.mark.parametrize("text", ["int8/row", "ternary"])
def test_it_holds_no_weight_of_codes(text):
    with pytest.raises(ValueError, match=f"got more-{text}, expected integers with a scale by row or tensor"):
        weight_format(f"more-{text}")


@dataclass(frozen=True)
class Mean(BlockFloat):
    """The scale of a box from its mean magnitude; inherits its parent's text."""

    def scale_of(self, groups):
        return super().scale_of(groups.abs().mean(-1, keepdim=True).expand_as(groups))


@dataclass(frozen=True)
class Boxless(Mean):
    def __str__(self):
        return f"more-boxless{self.bits}"


@dataclass(frozen=True)
class Nameless(Mean):
    def __str__(self):
        return f"mean{self.bits}"


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (Mean(4), r"Mean.__str__: got 'bfp4' of Mean\(bits=4, .*\), which is BlockFloat\(bits=4, .*parse reads back$"),
        (Boxless(4, 32), r"Boxless.__str__: got 'more-boxless4' of .*box_size=32.*, which is Boxless.*box_size=16"),
        (
            Nameless(4),
            "Nameless.__str__: got 'mean4' of .*, which no registered format has",
        ),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_format_whose_text_stands_for_another_is_refused(fmt, message):
    """All that runs a format is told of it by its text."""
    for run in (fake_quantize, pack, lambda x, fmt: GemmConfig(FLOAT32).with_weight(fmt)):
        with pytest.raises(ValueError, match=message):
            run(normal(3, 32), fmt)


def test_levels_refuse_a_format_whose_text_stands_for_another():
    formats.register("mean", lambda q, options: Mean(q))
    try:
        with pytest.raises(ValueError, match=r"level 0: q1 = 4: Mean.__str__: got 'bfp4' of"):
            parse_levels("[bfp4,4,bfp4,bfp16]", "mean")
    finally:
        formats.unregister("mean")


def test_claims_of_ones_own_stand():
    class Exact(OWN[Integer]):
        significand_bits = 16

        def encode(self, groups, scale, noise):
            return super().encode(groups, scale, noise)

    class OfTensors(BlockFloat):
        def of_tensor(self, x):
            return replace(self, scale="fit")

    class Renamed(Integer):
        def __str__(self):
            return "renamed"

    assert (Exact(8).significand_bits, Exact(8).row_kernel, Exact(8).integer_elements) == (16, None, False)
    assert (OfTensors(4).kernel_spec(), OfTensors(4).row_kernel) == (None, None)
    assert (Renamed(8).significand_bits, Renamed(8).row_kernel, Renamed(8).integer_elements) == (7, "int8", True)
