"""The native update of Adam: the weight's and the moments' bits are the definition's, in plain torch."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from kernels.common import DTYPES, assert_equal_bits, kernels_here

from fairseq_dsq import adam
from fairseq_dsq.adam import LowBitAdam
from fairseq_dsq.kernels import native
from fairseq_dsq.nn import FLOAT32, CodedLinear, DSQContext, DSQLinear, GemmConfig, coded_linear, weight_format

LOW, FLOATS = ("int8/row", "log8/row"), ("float32", "float32")
# Rows of one value, of a vector's edges, of more than a cache; enough values for two threads; vectors; small tensors.
SHAPES = [(4099, 1), (300, 15), (260, 17), (64, 64), (16, 3, 89), (2, 9001), (40, 3300), (5000,), (3, 5), ()]
CODED_SHAPES = [(300, 15), (64, 64), (40, 3300), (7, 33)]


@pytest.fixture(params=kernels_here())
def kernels(request):
    return native.Kernels(request.param)


def run(monkeypatch, kernels, steps, make, **flags):
    """Train what ``make`` gives by gradients of its shapes; None of ``kernels`` runs the definition."""
    monkeypatch.setattr(native, "kernels", kernels)
    parameters, gradients = make()
    optimizer = LowBitAdam(parameters, **{"lr": 1e-2, "betas": (0.9, 0.98), **flags})
    for step in range(steps):
        for p, grad in zip(parameters, gradients(step), strict=True):
            p.grad = grad
        optimizer.step()
    states = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
    return parameters, states


def normal(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    # Spread along a row, and some rows far from others.
    return [
        torch.randn(shape, generator=generator).mul_(
            torch.rand(shape[-1:] if shape else (), generator=generator).mul_(-12).exp2_()
        )
        for shape in shapes
    ]


def plain(shapes=SHAPES, gradients=None):
    def make():
        parameters = [torch.nn.Parameter(x) for x in normal(shapes, 0)]
        return parameters, gradients or (lambda step: normal(shapes, 1 + step))

    return make


def assert_the_same(found, expected):
    for x, y in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        if x.dtype in DTYPES:
            assert_equal_bits(x.detach(), y.detach())
        else:
            assert torch.equal(x, y)


def assert_is_the_definition(monkeypatch, kernels, make, steps=3, **flags):
    expected = run(monkeypatch, None, steps, make, **flags)
    found = run(monkeypatch, kernels, steps, make, **flags)
    monkeypatch.undo()
    assert_the_same(found, expected)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_weight_and_its_moments_are_the_definition_s(monkeypatch, kernels, rounding, decay):
    assert_is_the_definition(monkeypatch, kernels, plain(), rounding=rounding, weight_decay=decay, seed=3)


def test_rows_of_special_values_are_the_definition_s(monkeypatch, kernels):
    """NaN, Inf, zeros, overflow of the square, subnormal numbers."""
    shapes = [(9, 600), (80, 55), (5000,)]

    def gradients(step):
        found = normal(shapes, 1 + step)
        for x in found[:2]:
            x[0], x[1], x[2, 5::7], x[3] = 0.0, -0.0, 0.0, 1e-42
            x[4, 3], x[4, 4], x[5, 20], x[6, -1] = (
                1e25,
                -1e30,
                math.inf if step else 1.0,
                math.nan if step == 2 else 1.0,
            )
            x[7], x[8, :-1] = 1e-23, 0.0
        found[2][17:20] = torch.tensor([math.nan, math.inf, 0.0])
        return found

    for eps in (1e-8, 0.0):
        assert_is_the_definition(monkeypatch, kernels, plain(shapes, gradients), steps=4, eps=eps)


def test_threads_do_not_matter(monkeypatch, kernels):
    shapes = [(140, 1000)]
    assert 2 * native.VALUES_PER_THREAD < 140 * 1000
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            make, layers = coded(shapes=shapes)
            results.append((*run(monkeypatch, kernels, 2, plain(shapes)), *run(monkeypatch, kernels, 2, make)[1:]))
            results[-1] += weights(layers)
    finally:
        torch.set_num_threads(before)
    assert_the_same(*results)


@pytest.mark.parametrize("octave", [0, 1, 13, 30, 31])
def test_every_second_moment_is_encoded_as_the_definition_does(monkeypatch, kernels, octave):
    """Along an octave of the logarithmic code, values between its elements and in their neighbourhood."""
    grid = torch.linspace(0.5, 1, 6000).mul_(2.0**-octave).sqrt_().view(2, 3000)
    grid[:, 0] = 1.0
    make = plain([(2, 3000)], lambda step: [grid])
    for rounding in ("stochastic", "nearest"):
        assert_is_the_definition(monkeypatch, kernels, make, 2, betas=(0.9, 0.0), rounding=rounding)


def coded(fmt="int8/row", rule="own", shapes=CODED_SHAPES, gradients=None):
    def make():
        parameters = []
        for index, (n, k) in enumerate(shapes):
            layer = DSQLinear(k, n, DSQContext(GemmConfig(FLOAT32)))
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(index))
            layers.append(CodedLinear.of(layer, weight_format(fmt), rule))
            parameters.append(layers[-1].weight)
        return parameters, gradients or (lambda step: normal(shapes, 1 + step))

    layers = []
    return make, layers


def weights(layers):
    found = [x for layer in layers for x in (layer.weight_codes, layer.weight_scale)]
    return found, [torch.tensor(layer.context.ledger.drain_updates()) for layer in layers]


def assert_codes_are_the_definition_s(monkeypatch, kernels, *arguments, steps=3, **flags):
    results = []
    for each in (None, kernels):
        make, layers = coded(*arguments)
        _, states = run(monkeypatch, each, steps, make, **flags)
        results.append((states, *weights(layers)))
    monkeypatch.undo()
    assert_the_same(results[1], results[0])
    return results[1]


@pytest.mark.parametrize(("fmt", "rule"), [("int8/row", "own"), ("int8/tensor", "absmean"), ("int8/row", "mse")])
@pytest.mark.parametrize("pair", [LOW, FLOATS, ("int8/row", "int8/row")], ids=" ".join)
def test_a_weight_of_codes_is_the_definition_s(monkeypatch, kernels, fmt, rule, pair):
    for lr, decay in ((1e-3, 0.0), (2.0, 0.1)):  # steps of less than a code, and of some that clip
        flags = {"lr": lr, "weight_decay": decay, "moment1": pair[0], "moment2": pair[1]}
        flags["residual"] = "moment1" if rule == "own" else "none"
        *_, changed = assert_codes_are_the_definition_s(monkeypatch, kernels, fmt, rule, **flags)
        assert all(0 < count < total for count, total in map(torch.Tensor.tolist, changed))


@pytest.mark.parametrize("fmt", ["int8/row", "int8/tensor"])
def test_codes_of_steps_with_nan_and_inf_are_the_definition_s(monkeypatch, kernels, fmt):
    def gradients(step):
        found = normal(CODED_SHAPES, 1 + step)
        if step:
            found[0][5, 3], found[1][63, 63], found[2][0, 3299] = math.nan, math.inf, -math.inf
        found[1][7] = 0.0
        return found

    for pair in (LOW, FLOATS):
        flags = {"moment1": pair[0], "moment2": pair[1], "eps": 0.0}
        assert_codes_are_the_definition_s(monkeypatch, kernels, fmt, "own", CODED_SHAPES, gradients, **flags)


def test_parts_of_a_weight_of_one_scale_share_its_fate(monkeypatch, kernels):
    """However many rows the definition takes at a time."""
    results = []
    for at_a_time, each in ((1, None), (1 << 20, None), (1, kernels)):
        monkeypatch.setattr(coded_linear, "_AT_A_TIME", at_a_time)
        monkeypatch.setattr(native, "kernels", each)
        make, layers = coded("int8/tensor", shapes=[(5, 40)])
        make()
        step = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
        step[1, 7] = math.nan
        layers[0].subtract_(step, 3)
        assert layers[0].weight_scale.isnan().all()
        results.append(weights(layers))
    assert_the_same(results[1], results[0])
    assert_the_same(results[2], results[0])


def test_what_the_kernels_do_not_take_runs_the_definition(monkeypatch, kernels):
    """Half and double precision, and memory in another order; a gradient in another order they take."""

    def strided():
        x, y = (torch.randn(70, 90, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
        parameters = [torch.nn.Parameter(z) for z in (x.bfloat16(), x.double(), x.clone().mT, x.clone())]
        return parameters, lambda step: [y.bfloat16(), y.double(), y.mT, y.mT.contiguous().mT]

    ran = []
    monkeypatch.setattr(native.Kernels, "adam", count_calls(ran, native.Kernels.adam))
    adam._fused(kernels)
    ran.clear()
    assert_is_the_definition(monkeypatch, kernels, strided)
    assert len(ran) == 3


def count_calls(calls, function):
    def counting(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counting


def test_kernels_that_do_not_give_the_definition_s_bits_are_left_alone(monkeypatch, kernels):
    """A torch that adds up in another order, say."""
    kernels = native.Kernels(kernels.isa)
    monkeypatch.setattr(kernels._library, "adam", lambda *_: None)
    with pytest.warns(UserWarning, match=f"dsq_adam: the {kernels.isa} kernels do not give the definition's bits"):
        assert adam._fused(kernels) is None
    assert_is_the_definition(monkeypatch, kernels, plain([(64, 64)]))


def test_torch_s_plain_arithmetic_is_followed_too():
    """On CPUs without fused multiply-add, as which torch can be told to run."""
    code = (
        "from fairseq_dsq import adam; from kernels.common import kernels_here;"
        "print([adam._fused(kernels) for kernels in kernels_here().values()])"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([False] * len(kernels_here()))


def test_roots_are_correctly_rounded():
    x = torch.rand(20000, generator=torch.Generator().manual_seed(0)).mul_(-60).exp2_()
    assert adam._root(x).tolist() == numpy.sqrt(x.numpy()).tolist()
