"""The exact GEMM kernels against plain torch, and their rounding against the definition."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from kernels.common import kernels_here

from fairseq_dsq.formats import BlockFloat
from fairseq_dsq.kernels import native, ops
from fairseq_dsq.quantized import fake_quantize

HERE = {isa: kernels for isa, kernels in kernels_here(native.EMULATED).items() if kernels.has_gemm}
pytestmark = pytest.mark.skipif(not HERE, reason="no GEMM kernel for this CPU")


@pytest.fixture(params=list(HERE), autouse=True)
def kernels(request, monkeypatch):
    monkeypatch.setattr(native, "kernels", HERE[request.param])
    return HERE[request.param]


def wide(*shape, low=-20, high=20):
    """Normal values times powers of two: boxes of very different scales."""
    return torch.randn(*shape) * torch.exp2(torch.randint(low, high + 1, shape).float())


def laid_out(x, outer, pad):
    """The values of x (batch, rows, k) in another layout, with NaN between the rows."""
    batch, rows, k = x.shape
    base = torch.full((batch, k, rows + pad) if outer else (batch, rows, k + pad), torch.nan)
    view = base[..., :rows].mT if outer else base[..., :k]
    return view.copy_(x)


def assert_same(actual, expected):
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(123.5), expected.nan_to_num(123.5))


def gemm(a, b, bits=(0, 0), terms=(1, 1), out=None, bias=None, accumulate=False):
    if out is None:
        out = torch.empty(a.shape[0], a.shape[1], b.shape[1])
    ops.gemm(out, a, b, *bits, *terms, bias, accumulate)
    return out


def terms_of(bits):
    return 1 if bits <= 9 else 2


@pytest.mark.parametrize("seed", range(60))
def test_any_shape_layout_and_width_is_exact_and_rounds_on_the_way_as_before_it(kernels, seed):
    torch.manual_seed(seed)
    pick = random.Random(seed).choice
    batch, m, n = pick((1, 2, 3)), pick((1, 5, 12, 13, 64, 193, 400)), pick((1, 15, 17, 31, 32, 33, 100))
    k = pick((1, 2, 15, 16, 17, 33, 53, 513, 1031))
    a_bits, b_bits = (pick((2, 3, 4, 6, 7, 8, 9, 10, 12, 16)) for _ in "ab")
    a = laid_out(wide(batch, m, k), pick((0, 1)), pick((0, 5)))
    b = laid_out(wide(batch, n, k), pick((0, 1)), pick((0, 3)))
    rounded_a, rounded_b = fake_quantize(a, BlockFloat(a_bits), -1), fake_quantize(b, BlockFloat(b_bits), -1)
    bias, accumulate = pick((None, torch.randn(n))), pick((False, True))
    before = torch.randn(batch, m, n + 4)
    terms = terms_of(a_bits), terms_of(b_bits)

    def call(x, y, bits):
        out = before.clone()
        gemm(x, y, bits, terms, out[..., :n], bias, accumulate)
        assert torch.equal(out[..., n:], before[..., n:])
        return out[..., :n]

    exact = rounded_a.double() @ rounded_b.double().mT
    size = rounded_a.abs().double() @ rounded_b.abs().double().mT + 1
    for term in (bias, before[..., :n] if accumulate else None):
        if term is not None:
            exact, size = exact + term, size + term.abs()
    given = call(rounded_a, rounded_b, (0, 0))
    fused = call(a, b, (a_bits, b_bits))
    # Each of the sums rounds; two products go into one, but where both operands are of two terms.
    tolerance = 2.0**-24 * (k * terms[0] * terms[1] / 2 + 6)
    for result in (given, fused):
        assert ((result.double() - exact).abs() / size).max() <= tolerance
    assert_same(call(rounded_a, rounded_b, (a_bits, b_bits)), fused)
    if kernels.gemm_takes_values:
        assert_same(call(a, rounded_b, (a_bits, 0)), given)
        if terms in ((1, 1), (2, 2)) or on_tiles(kernels):
            assert_same(fused, given)


def on_tiles(kernels):
    """Whether every product is one of bfloat16 terms."""
    return kernels.isa.startswith("amx")


def flushed(x):
    """bfloat16 multipliers read subnormal numbers as zero."""
    return torch.where(x.abs() < 2.0**-126, 0.0, x)


def numbers_of_every_size(m, k):
    """Normal, subnormal, tied and extreme numbers; rows 2, 3 and 4 hold Inf or NaN."""
    exponent = torch.randint(-149, 127, (m, -(-k // 16))).repeat_interleave(16, 1)[:, :k]
    x = torch.ldexp(torch.ldexp(torch.randn(m, k), exponent // 2), exponent - exponent // 2)
    x[0], x[1], x[5], x[6], x[7, 0] = 0, -0.0, torch.finfo().max, 1e-45, 2.0**-126
    x[2, 3], x[3, k - 1], x[4, 20] = torch.inf, torch.nan, -torch.inf
    ties = 1 + torch.randint(0, 2**7, (16, k)) * 2.0**-7
    x[8:24] = torch.exp2(torch.arange(16.0)[:, None] - 10) * ties
    return x


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("outer", [False, True])
def test_the_kernel_s_rounding_is_the_definition_s(kernels, bits, outer):
    torch.manual_seed(bits)
    m, k = 64, 55
    x = numbers_of_every_size(m, k)
    expected = fake_quantize(x, BlockFloat(bits), -1)
    nan = expected.isnan().any(1)  # times the identity, it spoils its whole row
    assert nan.sum() == 3
    eye, x = torch.eye(k)[None], laid_out(x[None], outer, 1)

    def check(product, wanted):
        assert product[nan].isnan().all()
        assert torch.equal(product[~nan], wanted[~nan])

    high = (expected.view(torch.int32) & -0x10000).view(torch.float32)
    of_terms = flushed(expected) if bits <= 9 else flushed(high) + flushed(expected - high)
    for eye_bits in range(2, 17):
        # Multiplied as integers or in float32, where nothing is flushed, unless both are short.
        short = kernels.gemm_takes_values and max(bits, eye_bits) <= 9
        wanted = of_terms if short or on_tiles(kernels) else expected
        check(gemm(x, eye, (bits, eye_bits))[0], wanted)
        check(gemm(eye, x, (eye_bits, bits))[0].t(), wanted)
    if kernels.gemm_takes_values:
        check(gemm(x, eye, (bits, 0))[0], of_terms)
        check(gemm(eye, x, (0, bits))[0].t(), of_terms if bits <= 9 or on_tiles(kernels) else expected)


@pytest.mark.parametrize("outer", [False, True])
def test_inf_and_nan_propagate(outer):
    a, b = (laid_out(torch.randn(1, rows, 40).bfloat16().float(), outer, 0) for rows in (13, 35))
    a[0, 0, 0], a[0, 1, 5], b[0, 2, 7] = torch.inf, torch.nan, -torch.inf
    a[0, 3] = 0
    assert_same(gemm(a, b)[0].where((a @ b.mT)[0].isinf(), 0.0), (a @ b.mT)[0].where((a @ b.mT)[0].isinf(), 0.0))
    assert torch.equal(gemm(a, b)[0].isnan(), (a @ b.mT)[0].isnan())


@pytest.mark.parametrize("bits", [(0, 0), (8, 8), (16, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("terms", [(1, 1), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("outer", [False, True])
def test_a_nan_stays_one_whatever_its_bits(kernels, bits, terms, outer):
    if bits == (0, 0) and not kernels.gemm_takes_values:
        pytest.skip("rounds its operands")
    a, b = torch.ones(1, 35, 40), torch.ones(1, 35, 40)  # no zero: times Inf it would be NaN
    # Alone in the lower half, which a cut to bfloat16 takes away; in the upper; both.
    payloads = [
        sign + pattern for sign in (0, -(2**31)) for pattern in (0x7F800001, 0x7F80FFFF, 0x7FA00000, 0x7FFFFFFF)
    ]
    for row, payload in enumerate(payloads):
        a.view(torch.int32)[0, row, row], b.view(torch.int32)[0, 2 * row + 1, 39 - row] = payload, payload
    product = gemm(laid_out(a, outer, 3), laid_out(b, outer, 3), bits, terms)[0]
    expected = a[0].isnan().any(1)[:, None] | b[0].isnan().any(1)
    assert torch.equal(product.isnan(), expected) and (product[~expected] == 40).all()


def test_empty_products():
    bias = torch.arange(4.0)
    out = torch.full((2, 3, 4), 5.0)
    assert (gemm(torch.empty(2, 3, 0), torch.empty(2, 4, 0), out=out) == 0).all()
    gemm(torch.empty(2, 3, 0), torch.empty(2, 4, 0), out=out.fill_(5), bias=bias, accumulate=True)
    assert torch.equal(out, (5 + bias).expand(2, 3, 4))
    assert gemm(torch.empty(2, 0, 3), torch.empty(2, 4, 3)).shape == (2, 0, 4)


def test_an_operand_may_be_shared_by_the_batch():
    a, b = torch.randn(40, 20).bfloat16().float(), torch.randn(3, 30, 20).bfloat16().float()
    assert torch.allclose(gemm(a.expand(3, 40, 20), b), a @ b.mT, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("bits", [(8, 8), (16, 4), (16, 16), (0, 0)], ids=str)
def test_threads_change_nothing(batch, bits):
    a, b = torch.randn(batch, 700, 600).bfloat16().float(), torch.randn(batch, 90, 600).bfloat16().float()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(gemm(a, b, bits))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def integers(rows, k, bits):
    """Integers that need all the terms of their width, so few and small that sums are exact in any order."""
    if terms_of(bits) == 1:
        return torch.randint(-7, 8, (1, rows, k)).float()
    signs = torch.randint(-20, 21, (1, rows, k))
    return torch.randint(257, 301, (1, rows, k)) * ((signs == 20).float() - (signs == -20).float())


@pytest.mark.parametrize("sizes", [(1030, 1024, 70), (1100, 1000, 33), (600, 530, 1100), (40, 1031, 1600)], ids=str)
@pytest.mark.parametrize("bits", [(4, 4), (16, 4), (4, 16), (16, 16)], ids=str)
def test_every_block_of_a_large_product_is_in_its_place(sizes, bits):
    m, n, k = sizes
    a, b = integers(m, k, bits[0]), integers(n, k, bits[1])
    assert (a.abs() @ b.abs().mT).max() < 2**24
    bias, before = torch.randint(-9, 10, (n,)).float(), torch.randint(-9, 10, (1, m, n)).float()
    exact = (a.double() @ b.double().mT).float()
    assert torch.equal(gemm(a, b, bits), exact)
    assert torch.equal(gemm(a, b, bits, out=before.clone(), bias=bias, accumulate=True), exact + bias + before)


@pytest.mark.parametrize(("bits", "accumulate"), itertools.product([(0, 0), (8, 4)], [False, True]))
def test_the_operator_is_well_formed(bits, accumulate):
    a, b = torch.randn(2, 9, 20).bfloat16().float(), torch.randn(2, 5, 20).bfloat16().float()
    arguments = (torch.randn(2, 9, 5), a, b, *bits, 1, 1, torch.randn(5), accumulate)
    torch.library.opcheck(torch.ops.fairseq_dsq.gemm.default, arguments)


@pytest.mark.parametrize("moved", ["a", "b", "bias"])
def test_operands_on_several_devices_are_refused(moved):
    """Not left to the meta device's shapes, which write nothing."""
    tensors = {"a": torch.ones(1, 3, 16), "b": torch.ones(1, 5, 16), "bias": torch.ones(5)}
    tensors[moved] = tensors[moved].to("meta")
    with pytest.raises(RuntimeError, match=f"{moved} on meta.*, expected all on one device"):
        gemm(tensors["a"], tensors["b"], out=torch.empty(1, 3, 5), bias=tensors["bias"])
    with pytest.raises(RuntimeError, match="got x on cpu, data on meta, expected all on one device"):
        ops.mask(torch.ones(3), torch.ones(1, dtype=torch.uint8, device="meta"))


def test_the_plain_torch_definition_is_near(monkeypatch):
    a, b = torch.randn(2, 9, 40), torch.randn(2, 5, 40)
    bias, before = torch.randn(5), torch.randn(2, 9, 5)
    here = gemm(a, b, (12, 8), out=before.clone(), bias=bias, accumulate=True)
    monkeypatch.setattr(native, "kernels", None)
    torch.testing.assert_close(
        gemm(a, b, (12, 8), out=before.clone(), bias=bias, accumulate=True), here, rtol=1e-5, atol=1e-5
    )
