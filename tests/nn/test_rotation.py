"""Rotated operands: the matrix in float64, products that stay what they were, less error of heavy-tailed gradients."""

import itertools

import pytest
import torch
from nn.common import assert_product, difference, normal, product, saved_tensors

from fairseq_dsq.formats import parse
from fairseq_dsq.nn import (
    ROTATIONS,
    STASH_SCOPES,
    DSQAttention,
    DSQContext,
    GemmConfig,
    Rotation,
    convert,
    hold_codes,
    linear,
    matmul,
)
from fairseq_dsq.nn.rotation import rotate
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.quantized import fake_quantize

SIZES = [1, 2, 13, 16, 37, 64]
EXACT = ("bfp32", "bfp32", "bfp32", "bfp32")


def config(q, rotation="off", **options):
    return GemmConfig(PrecisionConfig(q), rotation=Rotation.of(rotation, 7), **options)


def hadamard(size):
    """Sylvester's."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def matrix_of(length, rotation):
    """The rotation of so many positions: blocks of Hadamard matrices over their roots, times signs."""
    sizes, block, left = [], rotation.block, length
    while left:
        sizes += [block] * (left // block)
        left, block = left % block, block // 2
    blocks = torch.block_diag(*(hadamard(size) / size**0.5 for size in sizes))
    signs = torch.randint(2, (rotation.block,), generator=torch.Generator().manual_seed(rotation.seed)) * 2 - 1
    return blocks * signs.repeat(-(-length // rotation.block))[:length]


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("length", SIZES)
def test_it_is_an_orthogonal_matrix_along_either_dimension(length, block):
    rotation = Rotation("grad_weight", block, 7)
    q = matrix_of(length, rotation)
    torch.testing.assert_close(q @ q.mT, torch.eye(length, dtype=torch.float64))
    x = normal(2, length, 5)
    assert_product(rotate(x, -2, rotation), product(q, x))
    assert_product(rotate(x.mT, -1, rotation), product(x.mT, q.mT))
    half = rotate(x.bfloat16(), -2, rotation)
    assert half.dtype is torch.bfloat16 and difference(half, q @ x.double()) < 0.01


def test_the_seed_draws_the_signs_and_nothing_is_drawn_of_torch_s():
    state, x = torch.get_rng_state(), normal(16, 3)
    first, second, again = (rotate(x, 0, Rotation("grad_weight", 16, seed)) for seed in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def linear_step(config, x, weight, grad):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight, None, config)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def matmul_step(config, a, b, grad, transpose_b):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = matmul(a, b, config, transpose_b=transpose_b)
    y.backward(grad)
    return y.detach(), a.grad, b.grad


@pytest.mark.parametrize("rotation", ROTATIONS[1:])
@pytest.mark.parametrize("q", [EXACT, ("bfp32", "float32", "float32", "bfp32"), ("bfp32", "bfp32", *["float32"] * 2)])
@pytest.mark.parametrize("box_dim", ["reduction", "last"])
def test_products_stay_what_they_were_but_for_rounding(q, rotation, box_dim):
    x, weight, grad = normal(37, 21, seed=1), normal(18, 21, seed=2), normal(37, 18, seed=3)
    plain, rotated = (linear_step(config(q, text, box_dim=box_dim), x, weight, grad) for text in ("off", rotation))
    assert torch.equal(plain[0], rotated[0])
    assert all(difference(mine, theirs) < 2e-6 for mine, theirs in zip(rotated, plain, strict=True))
    assert not torch.equal(plain[2], rotated[2])
    assert torch.equal(plain[1], rotated[1]) == (rotation.startswith("grad_weight") or q[2:] == ("float32", "float32"))
    a, b, grad = normal(3, 13, 21, seed=1), normal(3, 21, 18, seed=2), normal(3, 13, 18, seed=3)
    for transpose_b in (False, True):
        operands = a, b.mT.contiguous() if transpose_b else b, grad, transpose_b
        plain, rotated = (matmul_step(config(q, text, box_dim=box_dim), *operands) for text in ("off", rotation))
        assert all(difference(mine, theirs) < 2e-6 for mine, theirs in zip(rotated, plain, strict=True))


@pytest.mark.parametrize("scope", STASH_SCOPES)
def test_attention_s_gradients_stay_what_they_were_but_for_rounding(scope):
    found = []
    for rotation in ("off", "backward/16"):
        torch.manual_seed(3)
        module = DSQAttention(32, 2, DSQContext(config(EXACT, rotation), stash_scope=scope))
        x = normal(19, 2, 32, seed=1).requires_grad_()
        module(x, x, x, need_weights=False)[0].square().sum().backward()
        found.append([x.grad, *(layer.weight.grad for layer in (module.q_proj, module.k_proj, module.v_proj))])
    assert all(difference(mine, theirs) < 1e-5 for mine, theirs in zip(*found, strict=True))
    assert not torch.equal(found[0][3], found[1][3])


@pytest.mark.parametrize("gemm", ["auto", "float32"])
@pytest.mark.parametrize(
    "q", [("bfp4",) * 4, ("bfp16", "bfp4", "bfp4", "bfp3|bfp5"), ("nvfp4",) * 4, ("int8/row",) * 4], ids=str
)
def test_both_operands_are_rotated_and_then_quantized(q, gemm):
    level, rotation = PrecisionConfig(q), Rotation("backward", 16, 7)
    x, weight, grad = normal(37, 21, seed=1), normal(18, 21, seed=2), normal(37, 18, seed=3)
    with saved_tensors() as saved:
        linear(x, weight.clone().requires_grad_(), None, config(q, "backward/16"))
    assert level.stash("input").nbytes(x.shape, 0) in [tensor.numel() for tensor in saved]
    _, grad_input, grad_weight = linear_step(config(q, "backward/16", gemm=gemm), x, weight, grad)

    def fq(x, fmt, dim):
        return fake_quantize(rotate(x, dim, rotation), fmt, dim)

    (grad_n, weight_n), (stash, grad_m) = (level.operands(kind) for kind in ("grad_input", "grad_weight"))
    assert_product(grad_input, product(fq(grad, grad_n, 1), fq(weight, weight_n, 0)))
    assert_product(grad_weight, product(fq(grad, grad_m, 0).mT, fq(x, stash, 0)))


def outliers():
    """Gradients of which two in a hundred are thirty times as large."""
    generator = torch.Generator().manual_seed(5)
    return normal(256, 64, seed=4) * (1.0 + 30.0 * (torch.rand(256, 64, generator=generator) < 0.02))


@pytest.mark.parametrize("q", ["mxfp4", "bfp4", "int4/row"])
def test_the_error_of_heavy_tailed_gradients_falls(q):
    x, weight, grad = normal(256, 64, seed=1), normal(64, 64, seed=2), outliers()
    exact, errors = linear_step(config(EXACT), x, weight, grad), []
    for rotation in ("off", "backward/16"):
        found = linear_step(config(("bfp16", "bfp16", "bfp16", q), rotation), x, weight, grad)
        errors.append([difference(mine, theirs) for mine, theirs in zip(found[1:], exact[1:], strict=True)])
    assert all(rotated < 0.95 * plain for plain, rotated in zip(*errors, strict=True)), errors


def test_of_nvfp4_fewer_gradients_become_zero():
    grad, fmt = outliers(), parse("nvfp4")
    rotated = rotate(grad, 0, Rotation("grad_weight", 16, 1))
    plain, less = ((fake_quantize(x, fmt, 0) == 0).float().mean() for x in (grad, rotated))
    assert less < plain / 3


def test_nothing_is_rotated_where_nothing_is_rounded():
    x, weight, grad = normal(37, 21, seed=1), normal(18, 21, seed=2), normal(37, 18, seed=3)
    steps = (linear_step(config(("float32",) * 4, text), x, weight, grad) for text in ("off", "backward/16"))
    assert all(itertools.starmap(torch.equal, zip(*steps, strict=True)))


def test_codes_are_multiplied_as_they_are():
    context = DSQContext(config(("int8/row", "int8/row", "int8/row", "bfp16"), "backward/16"))
    with pytest.raises(ValueError, match="expected grad_weight alone"):
        hold_codes(convert(torch.nn.Sequential(torch.nn.Linear(4, 4)), context), context, parse("int8/row"))


@pytest.mark.parametrize("text", ["grad_weight/8", "grad_input/16", "on", "backward/"])
def test_another_rotation_is_refused(text):
    with pytest.raises(ValueError, match="expected one of off, grad_weight/16"):
        Rotation.of(text, 1)
