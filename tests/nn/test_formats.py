"""Layers and products in every format: the three GEMMs are those of the rounded operands, on whichever engine."""

from __future__ import annotations

import pytest
import torch
from nn.common import assert_product, normal, product

from fairseq_dsq.formats import parse
from fairseq_dsq.nn import GemmConfig, linear, matmul
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.quantized import fake_quantize

LEVELS = [
    # input, weight, stash, weight of grad_input, gradient of grad_input, of grad_weight
    ("mxfp6e2m3", "mxfp4/16-rceil", "nvfp4", "mxint8", "mxfp8e5m2", "fp8e5m2/row"),
    ("nvfp4", "nvfp4", "mxfp8e4m3", "fp16", "e4m3", "bf16"),
    ("fp8e4m3/tensor", "fp8e4m3/row", "mxfp6e3m2-even", "mxfp8e4m3/row", "nvfp4", "nvfp4"),
    ("bf16", "mxint8-ceil", "e5m2", "fp8e4m3/row", "fp8e5m2/tensor", "mxfp8e5m2"),
]


def config(level, **options):
    x, weight, stash, back, grad_n, grad_m = level
    return GemmConfig(PrecisionConfig((f"{x}|{weight}", stash, back, f"{grad_n}|{grad_m}")), **options)


def rounded(x, text, dim):
    return fake_quantize(x, parse(text), dim)


@pytest.mark.parametrize("mode", ["auto", "float32"])
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_a_layer_s_products_are_those_of_its_rounded_operands(level, mode):
    x, weight, grad = normal(70, 48), normal(36, 48, seed=1), normal(70, 36, seed=2)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    y = linear(*leaves, None, config(level, gemm=mode))
    y.backward(grad)
    assert_product(y.detach(), product(rounded(x, level[0], 1), rounded(weight, level[1], 1).mT))
    assert_product(leaves[0].grad, product(rounded(grad, level[4], 1), rounded(weight, level[3], 0)))
    assert_product(leaves[1].grad, product(rounded(grad, level[5], 0).mT, rounded(x, level[2], 0)))


@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_a_batched_product_s_operands_are_rounded_along_its_sums(level, transpose_b):
    a, b, grad = normal(3, 20, 36), normal(3, 36, 50, seed=1), normal(3, 20, 50, seed=2)
    leaves = [a.clone().requires_grad_(), (b.mT if transpose_b else b).clone().requires_grad_()]
    y = matmul(*leaves, config(level), transpose_b=transpose_b)
    y.backward(grad)
    grad_b = leaves[1].grad.mT if transpose_b else leaves[1].grad
    assert_product(y.detach(), product(rounded(a, level[0], -1), rounded(b, level[1], -2)))
    assert_product(leaves[0].grad, product(rounded(grad, level[4], -1), rounded(b, level[3], -1).mT))
    assert_product(grad_b, product(rounded(a, level[2], -2).mT, rounded(grad, level[5], -2)))


@pytest.mark.parametrize("text", ["mxfp4", "mxfp8e4m3/16", "nvfp4", "mxint8", "fp8e4m3/row"])
def test_no_two_rows_of_values_share_a_block(text):
    a, b = normal(2, 8, 40), normal(2, 40, 24, seed=1)
    level = GemmConfig(PrecisionConfig((f"float32|{text}", "float32", "float32", "float32")))
    before = matmul(a, b, level, apart=True)
    changed = b.clone()
    changed[:, 33] *= 3  # within the tensor's largest
    changed = changed.clamp(-b.abs().max(), b.abs().max())
    difference = matmul(a, changed, level, apart=True) - before
    fmt = parse(text)
    along = fmt.by_row() or fmt
    expected = a[..., 33:34] @ (fake_quantize(changed, along)[:, 33:34] - fake_quantize(b, along)[:, 33:34])
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)
