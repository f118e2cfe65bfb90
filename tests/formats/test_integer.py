"""Symmetric integers under a float32 scale, through rounding, bytes and a layer."""

import math

import pytest
import torch
from nn.common import normal

from fairseq_dsq.formats import Integer, parse
from fairseq_dsq.nn import GemmConfig, linear
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.quantized import fake_quantize, pack

FORMATS = [Integer(bits, group) for bits in (2, 3, 4, 8, 12, 16) for group in ("row", "tensor", 1, 5, 16, 128)]


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    "text", ["ternary", "ternary/row", "fp8e4m3/row", "fp8e5m2/tensor", "nvfp4", *map(str, FORMATS)]
)
def test_the_largest_floats_do_not_become_inf(text):
    fmt = parse(text)
    bits = torch.tensor(LARGEST).view(torch.int32) - torch.arange(60, dtype=torch.int32)
    x = bits.view(torch.float32)[:, None].repeat(1, 3) * torch.tensor([1.0, -1.0, 0.25])
    rounded = [fake_quantize(x, fmt)] + [
        fake_quantize(x[:1], fmt, rounding="stochastic", generator=seed) for seed in (1, 2)
    ]
    assert all(result.isfinite().all() for result in rounded)
    if not text.startswith("ternary"):
        torch.testing.assert_close(rounded[0][:, 0], x[:, 0], rtol=1e-5, atol=0)
        assert torch.equal(pack(x, fmt).dequantize(), rounded[0])


def test_a_scale_is_the_next_smaller_float_only_where_the_product_would_overflow():
    x = torch.tensor([[LARGEST], [LARGEST / 2], [3.0], [0.0]])
    expected = (x / 127).mul(torch.tensor([[1 - 2.0**-24], [1.0], [1.0], [1.0]]))
    assert (LARGEST / 127 * torch.ones(1)).mul(127).isinf() and torch.equal(Integer(8).scale_of(x), expected)


@pytest.mark.parametrize("fmt", [Integer(4, 5), Integer(8), Integer(8, "tensor")], ids=str)
def test_values_are_the_nearest_code_times_the_largest_magnitude_over_the_largest_code(fmt):
    x = normal(4, 10, seed=2).double()
    groups = {"row": x.split(10, 1), "tensor": [x], 5: x.split(5, 1)}[fmt.group]
    shape = (-1, 1) if fmt.group != "tensor" else ()
    parts = []
    for group in groups:
        largest = group.abs().amax(1) if fmt.group != "tensor" else group.abs().max()
        step = (largest / fmt.max_code).float().double().reshape(shape)
        parts.append((group / step).round() * step)
    assert torch.allclose(fake_quantize(x.float(), fmt).double(), torch.cat(parts, 1), rtol=1e-6, atol=0)


def test_a_group_of_zeros_or_of_next_to_nothing_is_zero_and_one_with_nan_is_nan():
    x = torch.zeros(5, 8)
    x[1] = 2.0**-149
    x[2, 3], x[3, 3], x[4, 3] = math.nan, math.inf, -1.0
    y = fake_quantize(x, Integer(8))
    assert torch.equal(y[:2], torch.zeros(2, 8)) and not y[:2].signbit().any()
    assert y[2:4].isnan().all() and torch.equal(y[4], x[4])
    assert torch.equal(pack(x, Integer(8)).dequantize().isnan(), y.isnan())


def test_stochastic_rounding_is_unbiased_and_seeded():
    x = normal(1, 64, seed=3).expand(4096, 64)
    generator = torch.Generator().manual_seed(1)
    y = fake_quantize(x, Integer(4), -1, "stochastic", generator)
    step = x[0].abs().max() / 7
    assert ((y.mean(0) - x[0]).abs() < 4 * step / 2 / 64).all()
    again = fake_quantize(x, Integer(4), -1, "stochastic", torch.Generator().manual_seed(1))
    assert torch.equal(y, again)


def test_a_layer_s_gradients_are_those_of_the_rounded_operands():
    level = PrecisionConfig(("int8/row|int4/row", "int6/row", "int8/8", "int12/row|int8/tensor"))
    x, weight, grad = normal(10, 24), normal(7, 24, seed=1), normal(10, 7, seed=2)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    y = linear(*leaves, None, GemmConfig(level))
    y.backward(grad)

    def fq(tensor, text, dim):
        return fake_quantize(tensor, parse(text), dim).double()

    for actual, expected in (
        (y, fq(x, "int8/row", 1) @ fq(weight, "int4/row", 1).mT),
        (leaves[0].grad, fq(grad, "int12/row", 1) @ fq(weight, "int8/8", 0)),
        (leaves[1].grad, fq(grad, "int8/tensor", 0).mT @ fq(x, "int6/row", 0)),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [17, 32])
def test_wider_integers_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits: got {bits}, expected 2 to 16 for int"):
        Integer(bits)


def test_what_no_kernel_runs_is_said_once():
    from fairseq_dsq.kernels import native, ops

    if native.kernels is None:
        pytest.skip("no kernels here")
    ops._say_slow.cache_clear()
    with pytest.warns(UserWarning, match="int5/7: no kernels run this format"):
        fake_quantize(normal(2, 9), Integer(5, 7))
