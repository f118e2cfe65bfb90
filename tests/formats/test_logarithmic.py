"""Logarithmic codes: every code, both roundings, what saturates and what is refused."""

import math

import pytest
import torch

from fairseq_dsq.formats import Logarithmic
from fairseq_dsq.quantized import fake_quantize, pack


def spread(*shape, octaves=30, seed=0):
    """Values >= 0 whose logarithms are uniform."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).mul_(-octaves).exp2_()


def values_of(bits, largest):
    """In plain float64, largest first."""
    last = 2**bits - 1
    return [largest * 2 ** (-code * 32 / last) for code in range(last + 1)]


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize("largest", [1.0, 3.7e-9, 1.9e38])
def test_every_code_is_held_exactly_once(bits, largest):
    expected = torch.tensor(values_of(bits, largest), dtype=torch.float64)
    x = expected.float().unsqueeze(0)
    packed = pack(x, Logarithmic(bits))
    assert torch.allclose(packed.dequantize().double(), expected, rtol=3e-7, atol=0)
    assert packed.dequantize().unique().numel() == 2**bits
    codes = packed.data[4:].tolist()
    if bits == 8:
        assert codes == list(range(256))
    assert torch.equal(pack(packed.dequantize(), Logarithmic(bits)).data, packed.data)


@pytest.mark.parametrize("bits", [3, 8])
def test_values_round_to_the_nearer_neighbour_by_value(bits):
    x = spread(1, 4000, octaves=33, seed=bits)
    held = torch.tensor(values_of(bits, x.max().item()), dtype=torch.float64)
    nearest = held[(x[0].double()[:, None] - held).abs().argmin(1)]
    rounded = fake_quantize(x, Logarithmic(bits))[0].double()
    assert torch.allclose(rounded, nearest, rtol=3e-7, atol=0)


@pytest.mark.parametrize("bits", [3, 8])
def test_stochastic_rounding_is_unbiased_and_seeded(bits):
    draws = 4096
    fmt, x = Logarithmic(bits), spread(1, 64, seed=3)
    y = fake_quantize(x.expand(draws, 64), fmt, -1, "stochastic", 11).double()
    held = torch.tensor(values_of(bits, x.max().item()), dtype=torch.float64)
    below = held[(held > x[0].double()[:, None]).sum(1).clamp(max=len(held) - 1)]
    share = (y > (below * 1.000001)).double().mean(0)
    step = y.amax(0) - y.amin(0)
    assert ((y.mean(0) - x[0]).abs() <= 3.5 * (share * (1 - share)).sqrt() * step / draws**0.5 + 1e-6 * x[0]).all()
    assert y.std(0).count_nonzero() > 60
    again = fake_quantize(x.expand(draws, 64), fmt, -1, "stochastic", 11).double()
    assert torch.equal(y, again)


def test_what_is_too_small_saturates_and_zeros_alone_stay_zero():
    fmt = Logarithmic(8)
    x = torch.tensor([[0.0, 0.0, 0.0], [8.0, 0.0, 2.0**-40], [8.0, 2.0**-29, 8.0]])
    for rounding in ("nearest", "stochastic"):
        y = fake_quantize(x, fmt, -1, rounding)
        assert y.tolist() == [[0.0] * 3, [8.0, 2.0**-29, 2.0**-29], [8.0, 2.0**-29, 8.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-30])
def test_a_group_with_a_negative_value_inf_or_nan_is_nan(bad):
    x = torch.ones(3, 8)
    x[1, 3] = bad
    for y in (fake_quantize(x, Logarithmic(8)), pack(x, Logarithmic(8)).dequantize()):
        assert y[1].isnan().all() and torch.equal(y[[0, 2]], x[[0, 2]])


@pytest.mark.parametrize("bits", [17, 32])
def test_wider_codes_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits: got {bits}, expected 2 to 16 for log"):
        Logarithmic(bits)
