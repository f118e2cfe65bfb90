"""Ternary numbers under their mean magnitude, through rounding, bytes and a layer."""

import itertools
import math

import pytest
import torch
from nn.common import normal

from fairseq_dsq.formats import FormatOptions, Ternary, definition, make_format, parse
from fairseq_dsq.nn import GemmConfig, linear
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.quantized import fake_quantize, pack

GROUPS = ["row", "tensor", 1, 5, 16]


def absmean(x):
    """BitNet b1.58's weights in float64, one scale for each row."""
    scale = x.double().abs().mean(-1, keepdim=True).float().double()
    return (x.double() / scale).round().clamp(-1, 1) * scale


@pytest.mark.parametrize("group", GROUPS)
def test_the_text_form_is_inverse_and_the_default_is_one_scale_for_the_tensor(group):
    fmt = Ternary(group_size=group)
    assert parse(str(fmt)) == fmt and parse(f"ternary/{group}") == fmt
    assert str(Ternary()) == "ternary" and parse("ternary") == Ternary(2, "tensor")
    assert fmt.mixes == (group == "tensor") and fmt.by_row() == Ternary(group_size="row")


@pytest.mark.parametrize("text", ["ternary2", "ternary/", "ternary/col", "ternary4", "Ternary", "ternary/-1"])
def test_text_that_is_no_ternary_format_is_refused(text):
    with pytest.raises(ValueError, match="format: got"):
        parse(text)


@pytest.mark.parametrize("q", [3, 8, 17])
def test_two_bits_and_no_others(q):
    assert make_format("ternary", 2, FormatOptions(box_size="row")) == parse("ternary/row")
    with pytest.raises(ValueError, match=f"bits: got {q}, expected 2 for ternary"):
        make_format("ternary", q)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("length", range(1, 8))
def test_every_row_of_codes_comes_back_from_its_bytes(group, length):
    fmt = Ternary(group_size=group)
    codes = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=length)))
    stored = fmt.to_codes(codes.clone())
    assert stored.min() >= 0 and stored.max() < 4
    assert torch.equal(fmt.from_codes(stored), codes)
    packed = pack(codes, fmt)
    assert packed.nbytes == fmt.nbytes(codes.shape)
    assert torch.equal(packed.dequantize().sign(), codes)


def test_values_are_those_of_bitnet():
    x = normal(40, 33, seed=2) * torch.logspace(-6, 6, 40)[:, None]
    by_row = fake_quantize(x, Ternary(group_size="row"))
    torch.testing.assert_close(by_row.double(), absmean(x), rtol=1e-7, atol=0)
    whole = fake_quantize(x, Ternary())
    torch.testing.assert_close(whole.double().flatten(), absmean(x.flatten()), rtol=1e-7, atol=0)


def test_halves_round_to_even_and_what_lies_beyond_clips():
    x = torch.tensor([[2.0, -2.0, 8.0, -4.0]])  # the mean magnitude is 4
    assert fake_quantize(x, Ternary()).tolist() == [[0.0, 0.0, 4.0, -4.0]]
    x = torch.tensor([[1.5, -1.5, 0.5, 0.5]])  # 1
    assert fake_quantize(x, Ternary()).tolist() == [[1.0, -1.0, 0.0, 0.0]]


def test_a_group_of_zeros_is_zero_one_with_nan_is_nan_and_no_sum_overflows():
    x = torch.zeros(5, 8)
    x[1] = 2.0**-149
    x[2, 3], x[3, 3] = math.nan, math.inf
    x[4] = 3e38
    y = fake_quantize(x, Ternary(group_size="row"))
    assert torch.equal(y[0], x[0]) and not y[0].signbit().any() and torch.equal(y[1], x[1])
    assert y[2:4].isnan().all()
    torch.testing.assert_close(y[4], x[4])


def test_stochastic_rounding_is_unbiased_where_nothing_clips():
    x = normal(1, 64, seed=3)
    scale = x.abs().mean()
    inside = x.abs()[0] <= scale
    rows = x.expand(4096, 64)
    y = fake_quantize(rows, Ternary(group_size="row"), -1, "stochastic", torch.Generator().manual_seed(1))
    assert ((y.mean(0) - x[0]).abs()[inside] < 4 * scale / 2 / 64).all() and inside.sum() > 20
    assert torch.equal(y[:, ~inside], fake_quantize(rows, Ternary(group_size="row"))[:, ~inside])


def test_the_order_of_the_sum_does_not_matter():
    x = normal(1, 4099) * 1e4
    shuffled = x[:, torch.randperm(4099, generator=torch.Generator().manual_seed(5))]
    assert torch.equal(Ternary().scale_of(x), Ternary().scale_of(shuffled))


@pytest.mark.parametrize("group", ["row", "tensor"])
@pytest.mark.parametrize("sizes", [(5, 24, 7), (130, 160, 150)], ids=str)
def test_a_layer_multiplies_codes_and_scales_the_product(group, sizes):
    m, k, n = sizes
    fmt = Ternary(group_size=group)
    level = PrecisionConfig((f"int8/row|{fmt}", "float32", "float32", "float32"))
    x, weight, grad = normal(m, k), normal(n, k, seed=1), normal(m, n, seed=2)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    y = linear(*leaves, None, GemmConfig(level))
    y.backward(grad)
    wanted = fake_quantize(x, parse("int8/row")).double() @ fake_quantize(weight, fmt).double().mT
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(leaves[0].grad.double(), grad.double() @ weight.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(leaves[1].grad.double(), grad.double().mT @ x.double(), rtol=1e-5, atol=1e-4)


def test_noise_of_one_element_is_that_of_its_place():
    x = normal(3, 8, seed=7)
    places = torch.arange(24).view(3, 8)
    scale = x.double().abs().mean(-1, keepdim=True).float()
    codes = x / scale
    up = definition.noise(places, 9) < codes - codes.floor()
    wanted = (codes.floor() + up).clamp(-1, 1) * scale
    assert torch.equal(definition.fake_quantize(x, Ternary(group_size="row"), -1, 9, torch.float32), wanted)
