"""QuantizedTensor: held bytes, written again, laid along another dimension, moved."""

import pytest
import torch

from fairseq_dsq.formats import parse
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.quantized import fake_quantize, pack, quantize_and_pack


@pytest.mark.parametrize("fmt", ["bfp4", "bfp8/row", "fixed8", "int8/row", "int4/16"])
def test_values_are_written_into_the_bytes_that_are_held(fmt):
    fmt, x = parse(fmt), torch.randn(6, 20)
    held = pack(torch.zeros_like(x), fmt)
    address = held.data.data_ptr()
    assert held.copy_(x) is held and held.data.data_ptr() == address
    assert torch.equal(held.dequantize(), fake_quantize(x, fmt))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    held.copy_(x, "stochastic", generators[0])
    assert torch.equal(held.dequantize(), fake_quantize(x, fmt, -1, "stochastic", generators[1]))
    with pytest.raises(ValueError, match=r"values: got \(6, 21\), expected \(6, 20\)"):
        held.copy_(torch.zeros(6, 21))


@pytest.mark.parametrize("fmt", ["bfp4", "bfp8/row", "int8/row"])
def test_groups_along_another_dimension_are_those_of_the_held_values(fmt):
    held = pack(torch.randn(6, 20), parse(fmt))
    again = held.requantize(0)
    assert again.dim == 0 and again.nbytes == parse(fmt).nbytes((6, 20), 0)
    assert torch.equal(again.dequantize(), fake_quantize(held.dequantize(), parse(fmt), 0))


def test_it_moves_with_its_format():
    held = pack(torch.randn(6, 20), parse("bfp4"))
    moved = held.to("meta")
    assert moved.data.device.type == "meta" and moved.spec == held.spec


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fake_quantize(x, "bfp4"), r"fmt: got 'bfp4', expected a format such as formats.parse\('bfp4'\)"),
        (lambda x: pack(x, "bfp4"), r"fmt: got 'bfp4', expected a format such as formats.parse\('bfp4'\)"),
        (lambda x: quantize_and_pack(x, "bfp4", parse("bfp2")), "fmt: got 'bfp4', expected a format"),
        (lambda x: quantize_and_pack(x, parse("bfp4"), "bfp2"), "fmt: got 'bfp2', expected a format"),
        (lambda x: fake_quantize(x.numpy(), parse("bfp4")), "x: got numpy.ndarray, expected a torch.Tensor"),
        (lambda x: fake_quantize(x.tolist(), parse("bfp4")), "x: got builtins.list, expected a torch.Tensor"),
        (lambda x: fake_quantize(x.int(), parse("bfp4")), "x: got torch.int32, expected float32, bfloat16 or float16"),
        (lambda x: parse(4), "format: got 4, expected a text such as bfp4"),
        (lambda x: PrecisionConfig("2,2,2,16"), r"q: got '2,2,2,16', expected a tuple such as \(2, 2, 2, 16\)"),
        (lambda x: PrecisionConfig([2, 2, 2, 16]), r"q: got \[2, 2, 2, 16\], expected a tuple such as"),
    ],
)
def test_an_argument_of_another_type_is_named(call, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        call(torch.randn(6, 20))
