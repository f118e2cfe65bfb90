"""linear, linear_group and matmul: each GEMM against float64 formulas, and autograd's contracts."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from nn.common import (
    BFP_MIXED,
    PRECISIONS,
    Product,
    assert_product,
    config,
    difference,
    linear_reference,
    matmul_reference,
    normal,
    one_coarse,
    saved_tensors,
    seeded,
    uneven,
)
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from fairseq_dsq.bench.mocked_gpu import engines_of_a_gpu
from fairseq_dsq.formats import BlockFloat, FormatOptions
from fairseq_dsq.ledger import Gemm, Stash
from fairseq_dsq.nn import (
    BOX_DIMS,
    FLOAT32,
    DSQContext,
    GemmConfig,
    Ledger,
    LedgerKey,
    StashKey,
    convert,
    functional,
    linear,
    linear_group,
    matmul,
)
from fairseq_dsq.precision import PrecisionConfig, parse_q

# M, K, N: whole boxes; short last boxes along each; less than a box; single rows and columns.
SHAPES = [(32, 16, 48), (37, 21, 18), (1, 5, 3), (17, 33, 1), (16, 1, 7)]
MIXED = GemmConfig(BFP_MIXED)
GRADIENTS = ("grad_input", "grad_weight", "grad_bias")
HALVES = [torch.bfloat16, torch.float16]
PRECISION_IDS = [f"{precision.format_name}{precision}" for precision in PRECISIONS]

every_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=PRECISION_IDS)
every_box_dim = pytest.mark.parametrize("box_dim", BOX_DIMS)
every_shape = pytest.mark.parametrize(("m", "k", "n"), SHAPES)


def trainable(*tensors):
    return tuple(None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors)


def leaves_of(tensors, needs):
    """Copies of which those that ``needs`` says require a gradient."""
    pairs = zip(tensors, needs, strict=True)
    return [tensor.clone().requires_grad_(need) for tensor, need in pairs]


def linear_operands(m, k, n, bias=True, make=uneven):
    """x, weight, bias and grad_output."""
    return (
        make(m, k, seed=1),
        make(n, k, seed=2),
        normal(n, seed=3) if bias else None,
        make(m, n, seed=4),
    )


def linear_step(x, weight, bias, grad_output, config, ledger=None):
    """Output and gradients of one step on fresh leaves."""
    x, weight, bias = trainable(x, weight, bias)
    output = linear(x, weight, bias, config, ledger)
    output.backward(grad_output)
    results = {"output": output.detach(), "grad_input": x.grad, "grad_weight": weight.grad}
    return results if bias is None else {**results, "grad_bias": bias.grad}


def matmul_operands(m, k, n, batch=3, make=uneven):
    """a, b and grad_output."""
    return make(batch, m, k, seed=1), make(batch, k, n, seed=2), make(batch, m, n, seed=3)


def matmul_step(a, b, grad_output, config, ledger=None, transpose_b=False):
    a, b = trainable(a, b)
    output = matmul(a, b, config, ledger, transpose_b)
    output.backward(grad_output)
    return {"output": output.detach(), "grad_input": a.grad, "grad_weight": b.grad}


def operands_and_step(kind):
    if kind == "linear":
        return linear_operands(37, 21, 18, bias=False), linear_step
    return matmul_operands(37, 21, 18), matmul_step


def assert_results(actual, expected):
    for name, result in actual.items():
        assert_product(result, expected[name])


# The three GEMMs


@every_precision
@every_box_dim
@every_shape
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_follows_its_legend(precision, box_dim, m, k, n, bias):
    operands = linear_operands(m, k, n, bias)
    how = GemmConfig(precision, box_dim=box_dim)
    assert_results(linear_step(*operands, how), linear_reference(*operands, how))


@every_precision
@every_box_dim
@every_shape
def test_matmul_follows_its_legend(precision, box_dim, m, k, n):
    operands = matmul_operands(m, k, n)
    how = GemmConfig(precision, box_dim=box_dim)
    assert_results(matmul_step(*operands, how), matmul_reference(*operands, how))


@every_precision
@every_box_dim
@every_shape
def test_matmul_by_a_stored_transpose_follows_its_legend(precision, box_dim, m, k, n):
    a, b, grad_output = matmul_operands(m, k, n)
    b = b.mT.contiguous()
    how = GemmConfig(precision, box_dim=box_dim)
    expected = matmul_reference(a, b, grad_output, how, transpose_b=True)
    ledger, plain = Ledger(), Ledger()
    assert_results(matmul_step(a, b, grad_output, how, ledger, transpose_b=True), expected)
    matmul_step(a, b.mT, grad_output, how, plain)
    assert ledger.gemms == plain.gemms


@pytest.mark.parametrize(
    ("index", "coarse"),
    [
        (0, {"output"}),
        (1, {"grad_weight"}),
        (2, {"grad_input"}),
        (3, {"grad_input", "grad_weight"}),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_each_q_coarsens_its_own_gemms_and_no_other(kind, index, coarse):
    operands, step = operands_and_step(kind)
    fine = step(*operands, config(32, 32, 32, 32))
    changed = step(*operands, GemmConfig(one_coarse(index)))
    for name in fine:
        if name in coarse:
            assert difference(changed[name], fine[name]) > 0.05, name
        else:
            assert torch.equal(changed[name], fine[name]), name


@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_the_two_box_directions_give_different_results(kind):
    operands, step = operands_and_step(kind)
    how = [GemmConfig(BFP_MIXED, box_dim=box_dim) for box_dim in BOX_DIMS]
    reduction, last = (step(*operands, each) for each in how)
    # Where both operands of a GEMM have their reduction dimension last, the directions are one.
    same = "output" if kind == "linear" else "grad_input"
    for name in reduction:
        if name == same:
            assert torch.equal(last[name], reduction[name]), name
        else:
            assert difference(last[name], reduction[name]) > 0.01, name


@pytest.mark.parametrize("leading", [(), (2,), (3, 7), (2, 3, 4), (0,), (0, 5)], ids=str)
def test_leading_dimensions_are_rows(leading):
    k, n = 21, 18
    x, weight, bias = uneven(math.prod(leading), k, seed=1), uneven(n, k, seed=2), normal(n, seed=3)
    grad_output = uneven(math.prod(leading), n, seed=4)
    expected = linear_step(x, weight, bias, grad_output, MIXED)
    actual = linear_step(x.view(*leading, k), weight, bias, grad_output.view(*leading, n), MIXED)
    assert actual["output"].shape == (*leading, n)
    assert actual["grad_input"].shape == (*leading, k)
    for name in expected:
        assert torch.equal(actual[name].view_as(expected[name]), expected[name]), name


def test_strides_do_not_matter():
    x, weight, bias, grad_output = linear_operands(37, 21, 18)
    expected = linear_step(x, weight, bias, grad_output, MIXED)
    transposed = [tensor.t().contiguous().t() for tensor in (x, weight, grad_output)]
    actual = linear_step(transposed[0], transposed[1], bias, transposed[2], MIXED)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5)
    operands = matmul_operands(37, 21, 18)
    expected = matmul_step(*operands, MIXED)
    actual = matmul_step(*(tensor.mT.contiguous().mT for tensor in operands), MIXED)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5)


def test_a_broadcast_gradient():
    # sum() hands back an expanded scalar.
    x, weight, bias = trainable(*linear_operands(37, 21, 18)[:3])
    linear(x, weight, bias, MIXED).sum().backward()
    operands = (tensor.detach() for tensor in (x, weight, bias))
    expected = linear_reference(*operands, torch.ones(37, 18), MIXED)
    for leaf, name in zip((x, weight, bias), GRADIENTS, strict=True):
        assert_product(leaf.grad, expected[name])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 3), (3, 4)),
        ((2, 3, 4), (2, 5, 6)),
        ((2, 3, 4), (1, 4, 6)),
        ((2, 2, 3, 4), (2, 2, 4, 5)),
    ],
    ids=str,
)
def test_matmul_names_the_shapes_that_do_not_fit(a, b):
    with pytest.raises(ValueError, match=r"got \(2, .* and .*expected \(B, M, K\) @ \(B, K, N\)"):
        matmul(torch.ones(a), torch.ones(b), MIXED)


@pytest.mark.filterwarnings("ignore:.*double precision")
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "group", "matmul"])
def test_gradcheck_in_float32(kind):
    # float64 is refused by design. Each function is linear in each operand, so that finite
    # differences over long steps have no error but float32's rounding.
    how = GemmConfig(FLOAT32)
    x, first, second = trainable(normal(2, 3, 5), normal(4, 5, seed=1), normal(2, 5, seed=2))
    bias, other = trainable(normal(4, seed=3), normal(2, 5, 3, seed=4))

    def check(function, *inputs):
        return gradcheck(function, inputs, eps=0.5, atol=1e-4, rtol=1e-4)

    if kind == "linear":
        assert check(lambda *operands: linear(*operands, how), x, first, bias)
    elif kind == "linear without bias":
        assert check(lambda x, weight: linear(x, weight, None, how), x, first)
    elif kind == "group":
        assert check(
            lambda x, first, second, bias: linear_group(
                x, [(first, bias), (second, None)], how
            ),
            x, first, second, bias,
        )  # fmt: skip
    else:
        assert check(lambda a, b: matmul(a, b, how), x, other)


def test_float64_is_refused():
    with pytest.raises(TypeError, match=r"float64, expected float32, bfloat16 or float16"):
        linear(torch.ones(2, 3).double(), torch.ones(4, 3).double(), None, MIXED)


# Stochastic rounding


def stochastic_means(step, operands, how, runs):
    """Mean and standard error of each result over ``runs`` draws."""
    draws = [step(*operands, how) for _ in range(runs)]
    return {
        name: (
            torch.stack([draw[name] for draw in draws]).double().mean(0),
            torch.stack([draw[name] for draw in draws]).double().std(0) / math.sqrt(runs),
        )
        for name in draws[0]
    }


def unsaturated(*shape, seed):
    """Multiples of 0.1 below 0.9, with ones so placed that no box along any dimension saturates."""
    x = torch.randint(-8, 9, shape, generator=seeded(seed)) / 10
    rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    return torch.where((rows - columns) % 4 == 0, 1.0, x)


@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_stochastic_rounding_is_unbiased_in_all_three_gemms(kind):
    how = GemmConfig(config(3, 3, 3, 3).precision, "stochastic")
    if kind == "linear":
        operands, step = linear_operands(16, 16, 16, bias=False, make=unsaturated), linear_step
        exact = linear_reference(*operands, GemmConfig(FLOAT32))
    else:
        operands, step = matmul_operands(16, 16, 16, batch=2, make=unsaturated), matmul_step
        exact = matmul_reference(*operands, GemmConfig(FLOAT32))
    torch.manual_seed(0)
    for name, (mean, error) in stochastic_means(step, operands, how, runs=300).items():
        assert (error > 0).all(), f"{name} never changes"
        deviations = (mean - exact[name].value).abs() / error
        assert deviations.mean() < 1.0, name  # 0.8 of a normal distribution
        assert deviations.max() < 5.0, name


@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_torchs_seed_decides_stochastic_rounding(kind):
    how = GemmConfig(BFP_MIXED, "stochastic")
    operands, step = operands_and_step(kind)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(step(*operands, how))
    for name in ("output", "grad_input", "grad_weight"):
        assert torch.equal(results[0][name], results[1][name]), name
        assert not torch.equal(results[0][name], results[2][name]), name


# What needs a gradient


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_linear_computes_the_gradients_that_are_needed(needs):
    m, k, n = 37, 21, 18
    x, weight, bias, grad_output = linear_operands(m, k, n)
    leaves = leaves_of((x, weight, bias), needs)
    ledger = Ledger()
    output = linear(*leaves, MIXED, ledger)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.backward(grad_output)
    expected = linear_reference(x, weight, bias, grad_output, MIXED)
    for leaf, need, name in zip(leaves, needs, GRADIENTS, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_product(leaf.grad, expected[name])

    needs_x, needs_weight, _ = needs
    gemms = {Gemm("output", m, k, n)}
    gemms |= {Gemm("grad_input", m, n, k)} if needs_x else set()
    gemms |= {Gemm("grad_weight", k, m, n)} if needs_weight else set()
    training = needs_x or needs_weight
    assert ledger.gemms == Counter({LedgerKey(gemm, BFP_MIXED, training): 1 for gemm in gemms})
    assert ledger.stashes == ({StashKey(Stash("input", (m, k), -2), BFP_MIXED): 1} if needs_weight else {})
    assert ledger.stash_bytes == (BlockFloat(3).nbytes((m, k), 0) if needs_weight else 0)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)), ids=str)
def test_float32_products_are_torchs_own_and_are_counted_when_they_run(needs):
    """No autograd Function of Python stands between; the counts and bytes are those of a level that rounds."""
    a, b, weight = (leaf.requires_grad_(need) for leaf, need in zip(
        (normal(2, 5, 8, seed=1), normal(2, 8, 6, seed=2), normal(6, 8, seed=3)), (needs[0], needs[1], needs[1]),
        strict=True,
    ))  # fmt: skip
    calls = {
        "linear": lambda how, ledger: linear(a, weight, None, how, ledger),
        "a @ b": lambda how, ledger: matmul(a, b, how, ledger),
        "a @ b^T": lambda how, ledger: matmul(a, b.mT.contiguous(), how, ledger, transpose_b=True),
    }
    for name, call in calls.items():
        ledger, rounding = Ledger(scope="here"), Ledger(scope="here")
        y, rounded = call(GemmConfig(FLOAT32), ledger), call(MIXED, rounding)
        assert "_Linear" not in str(y.grad_fn) and "_Matmul" not in str(y.grad_fn)
        assert {key.gemm.kind for key in ledger.gemms} == {"output"}
        for result, of in ((y, ledger), (rounded, rounding)):
            of.scope = "elsewhere"
            if any(needs):
                result.sum().backward()
        expected = rounding.drain().at_precision(FLOAT32)
        work = ledger.drain()
        assert (work.gemms, work.stashes) == (expected.gemms, expected.stashes), name
        assert work.stash_bytes == sum(4 * key.stash.elements for key in work.stashes)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)), ids=str)
def test_matmul_computes_the_gradients_that_are_needed(needs):
    batch, m, k, n = 3, 37, 21, 18
    a, b, grad_output = matmul_operands(m, k, n, batch)
    leaves = leaves_of((a, b), needs)
    ledger = Ledger()
    output = matmul(*leaves, MIXED, ledger)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.backward(grad_output)
    expected = matmul_reference(a, b, grad_output, MIXED)
    for leaf, need, name in zip(leaves, needs, GRADIENTS[:2], strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_product(leaf.grad, expected[name])

    needs_a, needs_b = needs
    gemms = {Gemm("output", m, k, n, batch)}
    gemms |= {Gemm("grad_input", m, n, k, batch)} if needs_a else set()
    gemms |= {Gemm("grad_weight", k, m, n, batch)} if needs_b else set()
    assert ledger.gemms == Counter({LedgerKey(gemm, BFP_MIXED, any(needs)): 1 for gemm in gemms})
    stashes = {StashKey(Stash("input", (batch, m, k), -2), BFP_MIXED): 1} if needs_b else {}
    stashes |= {StashKey(Stash("weight", (batch, k, n), -1), BFP_MIXED): 1} if needs_a else {}
    assert ledger.stashes == stashes
    stash_a = BlockFloat(3).nbytes((batch, m, k), 1) if needs_b else 0
    stash_b = BlockFloat(6).nbytes((batch, k, n), 2) if needs_a else 0
    assert ledger.stash_bytes == stash_a + stash_b


def test_no_grad_keeps_nothing_and_counts_inference():
    x, weight, bias, grad_output = linear_operands(37, 21, 18)
    a, b, _ = matmul_operands(37, 21, 18)
    leaves = trainable(x, weight, bias)
    ledger = Ledger()
    with torch.no_grad(), saved_tensors() as saved:
        y = linear(*leaves, MIXED, ledger)
        z = matmul(*trainable(a, b), MIXED, ledger)
    assert not y.requires_grad and not z.requires_grad and not saved
    assert_product(y, linear_reference(x, weight, bias, grad_output, MIXED)["output"])
    assert_product(z, matmul_reference(a, b, z, MIXED)["output"])
    assert ledger.gemms == Counter(
        {
            LedgerKey(Gemm("output", 37, 21, 18), BFP_MIXED, False): 1,
            LedgerKey(Gemm("output", 37, 21, 18, 3), BFP_MIXED, False): 1,
        }
    )
    assert ledger.stash_bytes == 0


@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_gradients_of_gradients_are_refused(kind):
    # They would be those of rounded operands: wrong without notice.
    if kind == "linear":
        leaves = trainable(*linear_operands(5, 4, 3)[:3])
        output = linear(*leaves, MIXED)
    else:
        leaves = trainable(*matmul_operands(5, 4, 3)[:2])
        output = matmul(*leaves, MIXED)
    loss = output.square().sum()
    (grad,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Several layers on one input


def group_params(k, widths, biases):
    return [
        (uneven(n, k, seed=10 + n), normal(n, seed=20 + n) if bias else None)
        for n, bias in zip(widths, biases, strict=True)
    ]


@pytest.mark.parametrize("box_dim", BOX_DIMS)
@pytest.mark.parametrize("unused", [None, 1])
def test_a_group_equals_separate_layers_and_stashes_once(box_dim, unused):
    k, widths, shape = 21, (18, 5, 33), (3, 7)
    how = GemmConfig(BFP_MIXED, box_dim=box_dim)
    x = uneven(*shape, k, seed=1)
    params = group_params(k, widths, (True, False, True))
    grads = [uneven(*shape, n, seed=30 + n) for n in widths]

    def backward(outputs):
        used = [index for index in range(len(widths)) if index != unused]
        torch.autograd.backward([outputs[i] for i in used], [grads[i] for i in used])

    (together,), (apart,) = trainable(x), trainable(x)
    group, separate = ([trainable(*pair) for pair in params] for _ in range(2))
    group_ledger, separate_ledger = Ledger(), Ledger()
    with saved_tensors() as saved:
        group_outputs = linear_group(together, group, how, group_ledger)
    separate_outputs = [linear(apart, *pair, how, separate_ledger) for pair in separate]
    backward(group_outputs)
    backward(separate_outputs)

    for y, expected in zip(group_outputs, separate_outputs, strict=True):
        assert torch.equal(y, expected)
    torch.testing.assert_close(together.grad, apart.grad, rtol=1e-5, atol=1e-3)
    for tensor, expected in zip(itertools.chain(*group), itertools.chain(*separate), strict=True):
        if expected is not None and expected.grad is not None:
            assert torch.equal(tensor.grad, expected.grad)
        elif expected is not None:
            assert tensor.grad is None
    assert group_ledger.gemms == separate_ledger.gemms
    stash = BlockFloat(3).nbytes((21, k), 0 if box_dim == "reduction" else 1)
    assert group_ledger.stash_bytes == stash
    assert separate_ledger.stash_bytes == 3 * stash
    assert sum(tensor.nbytes for tensor in saved if tensor.dtype == torch.uint8) == stash


def test_a_group_with_frozen_layers():
    k = 21
    params = group_params(k, (18, 5), (True, True))
    (x,) = trainable(uneven(37, k, seed=1))
    frozen, trained = params[0], trainable(*params[1])
    ledger = Ledger()
    first, second = linear_group(x, [frozen, trained], MIXED, ledger)
    grads = uneven(37, 18, seed=2), uneven(37, 5, seed=3)
    torch.autograd.backward([first, second], list(grads))
    references = [
        linear_reference(x.detach(), weight, bias, grad, MIXED)
        for (weight, bias), grad in zip(params, grads, strict=True)
    ]
    parts = [reference["grad_input"] for reference in references]
    total = Product(*(one + other for one, other in zip(*parts, strict=True)))
    assert_product(x.grad, total)
    assert_product(trained[0].grad, references[1]["grad_weight"])
    assert frozen[0].grad is None and frozen[1].grad is None
    kinds = Counter(key.gemm.kind for key in ledger.gemms)
    assert kinds == {"output": 2, "grad_input": 2, "grad_weight": 1}


# Half precision and autocast


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("precision", [BFP_MIXED, FLOAT32], ids=["bfp", "float32"])
@pytest.mark.parametrize("box_dim", BOX_DIMS)
def test_half_precision_keeps_its_dtype(dtype, precision, box_dim):
    how = GemmConfig(precision, box_dim=box_dim)

    def make(*shape, seed):
        return normal(*shape, seed=seed, dtype=dtype)

    x, weight, bias, grad_output = linear_operands(37, 21, 18, make=make)
    operands = x, weight, bias.to(dtype), grad_output
    results = linear_step(*operands, how)
    assert {result.dtype for result in results.values()} == {dtype}
    assert_results(results, linear_reference(*operands, how))

    operands = matmul_operands(37, 21, 18, make=make)
    results = matmul_step(*operands, how)
    assert {result.dtype for result in results.values()} == {dtype}
    assert_results(results, matmul_reference(*operands, how))


def test_autocast_computes_in_its_dtype_and_returns_the_parameters_own():
    dtype = torch.bfloat16
    x, weight, bias, grad_output = linear_operands(37, 21, 18, make=normal)
    leaves = trainable(x, weight, bias)
    with torch.autocast("cpu", dtype=dtype):
        y = linear(*leaves, MIXED)
    y.backward(grad_output.to(dtype))
    assert y.dtype == dtype
    rounded = [tensor.to(dtype) for tensor in (x, weight, bias, grad_output)]
    expected = linear_step(*rounded, MIXED)
    assert torch.equal(y, expected["output"])
    for leaf, name in zip(leaves, GRADIENTS, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected[name].float())

    a, b, grad_output = matmul_operands(37, 21, 18, make=normal)
    leaves = trainable(a, b)
    with torch.autocast("cpu", dtype=dtype):
        # One operand is in half precision already: so float32 scores and values meet.
        y = matmul(leaves[0], leaves[1].to(dtype), MIXED)
    y.backward(grad_output.to(dtype))
    assert y.dtype == dtype
    expected = matmul_step(a.to(dtype), b.to(dtype), grad_output.to(dtype), MIXED)
    assert torch.equal(y, expected["output"])
    for leaf, name in zip(leaves, GRADIENTS[:2], strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected[name].float())


@pytest.mark.parametrize("q", ["[bfp16,bfp16,bfp16,bfp16]", "[int16/row,int16/row,int16/row,int16/row]"])
def test_a_backward_pass_under_autocast_is_the_same(q):
    how = GemmConfig(PrecisionConfig(parse_q(q)), gemm="float32")  # whose operands autocast would cut
    x, weight, bias, grad_output = linear_operands(37, 21, 18, make=normal)
    a, b, grad_product = matmul_operands(37, 21, 18, make=normal)
    for operands, run, grad in (((x, weight, bias), linear, grad_output), ((a, b), matmul, grad_product)):
        found = []
        for autocast in (False, True):
            leaves = trainable(*operands)
            y = run(*leaves, how)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                y.backward(grad)
            found.append([leaf.grad for leaf in leaves])
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("q", ["[16,float32,16,16]", "[16,32,16,16]", "[16,16,8,24]", "[bf16,float32,bf16,bf16]"])
def test_a_gradient_in_terms_goes_to_no_engine_that_adds_none(q):
    """grad_input on a GPU's tensor cores, grad_weight on float32."""
    how = GemmConfig(PrecisionConfig(parse_q(q), "fixed"))
    operands = linear_operands(37, 21, 18, make=normal)
    expected = linear_step(*operands, how)
    with engines_of_a_gpu():
        torch.testing.assert_close(linear_step(*operands, how), expected, rtol=1e-5, atol=1e-5)


# Activation checkpointing


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("kind", ["linear", "group", "matmul", "several"])
def test_checkpointing_gives_the_same_gradients(kind, use_reentrant, rounding):
    how = GemmConfig(BFP_MIXED, rounding)
    operands = (
        uneven(3, 7, 21, seed=1), uneven(18, 21, seed=2), uneven(21, 21, seed=3), normal(18, seed=4)
    )  # fmt: skip

    def block(x, first, second, bias):
        if kind == "linear":
            return linear(x, first, bias, how)
        if kind == "matmul":
            return matmul(x, x.mT, how)
        y, z = linear_group(x, [(first, bias), (second, None)], how)
        if kind == "group":
            return torch.cat([y, z], dim=-1)
        scores = matmul(torch.tanh(z), x.mT, how)
        return matmul(torch.softmax(scores, -1), linear(torch.tanh(z), first, bias, how), how)

    def step(run):
        leaves = trainable(*operands)
        torch.manual_seed(5)
        output = run(*leaves)
        output.backward(normal(*output.shape, seed=6))
        return output.detach(), [leaf.grad for leaf in leaves]

    expected = step(block)
    actual = step(lambda *leaves: checkpoint(block, *leaves, use_reentrant=use_reentrant))
    assert torch.equal(actual[0], expected[0])
    for grad, reference in zip(actual[1], expected[1], strict=True):
        assert (grad is None) == (reference is None)
        assert grad is None or torch.equal(grad, reference)


# Nothing to multiply

EMPTY = [shape for shape in itertools.product((0, 5), (0, 7), (0, 6)) if 0 in shape]
FEW = [
    MIXED.precision,
    PrecisionConfig((4, 4, 4, 8), "fixed"),
    PrecisionConfig((4, 4, 4, 8), "bfp", FormatOptions(scale="fit")),
    FLOAT32,
]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("gemm", ["auto", "float32"])
@pytest.mark.parametrize("precision", FEW, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), EMPTY)
def test_sizes_of_zero_are_torchs(m, k, n, precision, gemm, rounding):
    how = GemmConfig(precision, rounding, gemm=gemm)
    weight, bias = normal(n, k, seed=1), normal(n, seed=2)
    cases = [
        (lambda x, w, b: linear(x, w, b, how, Ledger()), nn.functional.linear, (normal(*shape, k), weight, bias))
        for shape in ((m,), (2, m), (m, 0))
    ]
    cases += [
        (lambda a, b: matmul(a, b, how, Ledger()), torch.bmm, (normal(batch, m, k), normal(batch, k, n)))
        for batch in (0, 2)
    ]
    cases += [
        (lambda a, b: matmul(a, b, how, Ledger(), True), lambda a, b: a @ b.mT, (normal(2, m, k), normal(2, n, k)))
    ]
    for ours, plain, tensors in cases:
        results = []
        for function in (ours, plain):
            leaves = trainable(*tensors)
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        for actual, expected in zip(*results, strict=True):
            assert actual.shape == expected.shape and torch.allclose(actual, expected)


# What comes after a layer may work in place, as after torch's own

IN_PLACE = [lambda y: y.relu_(), lambda y: y.masked_fill_(y > 0, 0.5), lambda y: y[..., :1].add_(1)]


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shape", [(4, 21), (2, 3, 21), (21,)], ids=str)
@pytest.mark.parametrize("precision", [MIXED.precision, FLOAT32], ids=str)
def test_a_linear_layers_outputs_may_be_changed_in_place(precision, shape, change):
    weights = [normal(18, 21, seed=seed).requires_grad_() for seed in (1, 2)]
    results = []
    for clone in (True, False):
        x = normal(*shape).requires_grad_()
        outputs = linear_group(x, [(weight, None) for weight in weights], GemmConfig(precision))
        assert not any(y._is_view() for y in outputs)
        outputs = [y.clone() for y in outputs] if clone else outputs
        for y in outputs:
            change(y)
        grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *weights])
        results.append([*outputs, *grads])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("transpose_b", [True, False])
def test_a_products_output_and_gradients_may_be_changed_in_place(transpose_b):
    a, b = normal(2, 5, 7).requires_grad_(), normal(2, *((6, 7) if transpose_b else (7, 6)), seed=1).requires_grad_()
    y = matmul(a, b, MIXED, transpose_b=transpose_b)
    assert not y._is_view()
    y.relu_().sum().backward()
    for grad in (a.grad, b.grad):
        grad.mul_(2)


def test_an_in_place_activation_follows_a_converted_layer():
    def step(model):
        x = normal(5, 21).requires_grad_()
        y = model(x)
        y.sum().backward()
        return [y, x.grad, *(parameter.grad for parameter in model.parameters())]

    model = nn.Sequential(nn.Linear(21, 18), nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True), nn.Linear(18, 4))
    twin = convert(copy.deepcopy(model), DSQContext(GemmConfig(FLOAT32)))
    for actual, expected in zip(step(twin), step(model), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)
    twin.zero_grad()
    twin[0].context.set_precision(BFP_MIXED)
    assert all(value.isfinite().all() for value in step(twin))


@pytest.mark.parametrize(
    ("fmt", "dtype", "what"),
    [
        ("bfp4", torch.float16, "bfp4 in float16"),
        ("int16/row", torch.bfloat16, "int16/row in bfloat16"),
        ("nvfp4", None, "nvfp4"),
    ],
)
def test_what_has_no_scale_for_a_row_of_values_says_so(fmt, dtype, what):
    how = {
        boxes: GemmConfig(PrecisionConfig(parse_q(f"[{fmt},{fmt},{fmt},bfp16]")), value_boxes=boxes)
        for boxes in ("row", "feature")
    }
    a, b = normal(2, 5, 32).to(dtype), normal(2, 32, 20, seed=1).to(dtype)
    functional._say_in_features.cache_clear()
    with pytest.warns(UserWarning, match=f"^value boxes: got row, which {what} has not: .* along the features"):
        product = matmul(a, b, how["row"], apart=True)
    assert torch.equal(product, matmul(a, b, how["feature"], apart=True))


def test_rows_of_a_stored_transpose_are_apart_anyway():
    how = GemmConfig(PrecisionConfig((8, 4, 4, 16)))
    a, b = normal(2, 5, 8), normal(2, 8, 8, seed=1)
    assert torch.equal(matmul(a, b, how, transpose_b=True, apart=True), matmul(a, b, how, transpose_b=True))


@pytest.mark.parametrize("value_boxes", ["row", "feature"])
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_rows_apart_of_nothing_are_torch_s(sizes, value_boxes):
    m, k, n = sizes
    how = GemmConfig(PrecisionConfig((4, 4, 4, 16)), value_boxes=value_boxes)
    a, b = normal(2, m, k).requires_grad_(), normal(2, k, n).requires_grad_()
    product = matmul(a, b, how, apart=True)
    assert torch.equal(product, torch.zeros(2, m, n)) or k
    assert product.shape == (2, m, n)
    product.sum().backward()
    assert (a.grad.shape, b.grad.shape) == (a.shape, b.shape)
