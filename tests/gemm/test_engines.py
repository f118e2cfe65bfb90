"""Which engine a product runs on, that all of them are exact, and who rounds."""

from __future__ import annotations

import math
import warnings
from unittest import mock

import pytest
import torch
from command import together
from nn.common import multiply, normal, operand

from fairseq_dsq import gemm
from fairseq_dsq.bench.mocked_gpu import engines_of_a_gpu
from fairseq_dsq.formats import BlockFloat, FixedPoint, Float32, parse
from fairseq_dsq.gemm import Engine, Operand, Side, float32, int8, plan
from fairseq_dsq.kernels import native, ops
from fairseq_dsq.nn import GemmConfig, linear, matmul
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.quantized import fake_quantize

HAS_KERNEL = native.kernels is not None and native.kernels.has_gemm
TAKES_VALUES = native.kernels is not None and native.kernels.gemm_takes_values
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="no GEMM kernel for this CPU")
KERNEL_OF_VALUES = "native" if TAKES_VALUES else "float32"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def planned_anew():
    yield
    plan.cache_clear()


def engines(a, b, mode="auto", along=True, dtype=torch.float32):
    """The engines of the product of two formats, but for int8, which declines what is small."""
    planned = plan(Side(parse(a), along), Side(parse(b), along), CPU, dtype, mode).engines
    return [engine.name for engine in planned if engine.name != "int8"]


@needs_kernel
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("bfp2", "bfp9", "native"),
        ("bfp16", "bfp4", "native"),
        ("bfp4", "bfp16", "native"),
        ("bfp16", "bfp16", "native"),
        ("bfp17", "bfp2", KERNEL_OF_VALUES),
        ("bfp2", "bfp17", KERNEL_OF_VALUES),
        ("bfp18", "bfp2", "float32"),
        ("bfp2", "bfp18", "float32"),
        ("fixed8", "fixed8", KERNEL_OF_VALUES),
        ("bfp4/32", "bfp4/32", KERNEL_OF_VALUES),
        ("float32", "float32", "float32"),
        ("bfp4", "float32", "float32"),
    ],
)
def test_a_cpu_takes_the_kernel_where_it_is_exact(a, b, expected):
    assert engines(a, b)[0] == expected
    assert engines(a, b, along=False)[0] == (expected if TAKES_VALUES else "float32")
    assert engines(a, b, "float32") == ["float32"]
    assert engines(a, b, "native")[0] == expected
    assert engines(a, b, dtype=torch.bfloat16) == ["float32"]


@pytest.mark.parametrize(
    ("a", "b", "dtype", "said"),
    [
        ("bfp4", "bfp4", torch.float32, None),
        (
            "bfp16",
            "bfp18",
            torch.float32,
            "bfp16 by bfp18 in float32",
        ),
        (
            "bfp4",
            "bfp4",
            torch.bfloat16,
            "bfp4 by bfp4 in bfloat16",
        ),
        ("bfp4", "float32", torch.float32, None),
        ("float32", "float32", torch.bfloat16, None),
    ],
)
@needs_kernel
def test_products_that_the_engine_asked_for_leaves_to_another_are_said(a, b, dtype, said):
    plan.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        engines(a, b, "native", dtype=dtype)
        engines(a, b, "auto", dtype=dtype)
        engines(a, b, "float32", dtype=dtype)
    lines = [] if said is None else [f"--dsq-gemm native: does not multiply {said} on cpu; float32 does"]
    assert [str(warning.message) for warning in found] == lines


def test_without_the_kernel_products_are_float32(monkeypatch):
    monkeypatch.setattr(native, "kernels", None)
    plan.cache_clear()
    assert engines("bfp2", "bfp2") == ["float32"]
    with pytest.raises(ValueError, match="got native, which does not run here: "):
        gemm.check_mode("native")


@pytest.mark.parametrize("mode", ["auto", "float32"])
@pytest.mark.parametrize(
    ("a_fmt", "b_fmt"), [("bfp4", "bfp8"), ("bfp16", "bfp2"), ("fixed12", "fixed9"), ("bfp9/8", "bfp4/32")]
)
@pytest.mark.parametrize("reductions", [(-1, -1), (-1, -2), (-2, -2), (-2, -1)], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_every_arithmetic_multiplies_exactly(mode, a_fmt, b_fmt, reductions, batched):
    a_fmt, b_fmt = parse(a_fmt), parse(b_fmt)
    m, n, k = 13, 35, 53
    shapes = [(m, k) if reductions[0] == -1 else (k, m), (n, k) if reductions[1] == -1 else (k, n)]
    tensors = [
        fake_quantize(normal(*((2,) if batched else ()), *shape, seed=seed), fmt, reduction)
        for seed, (shape, fmt, reduction) in enumerate(zip(shapes, (a_fmt, b_fmt), reductions, strict=True))
    ]
    a, b = (
        operand(tensor, fmt, reduction)
        for tensor, fmt, reduction in zip(tensors, (a_fmt, b_fmt), reductions, strict=True)
    )
    bias, before = normal(n, seed=7), normal(*((2,) if batched else ()), m, n, seed=8)
    exact = a.rows.double() @ b.rows.double().mT
    for bias_or_none, add_to in ((None, None), (bias, None), (None, before.clone())):
        expected = exact if bias_or_none is None else exact + bias
        expected = expected if add_to is None else expected + before
        actual = multiply(a, b, mode, bias_or_none, add_to)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4 * exact.abs().max().item() / 10)
        assert add_to is None or actual is add_to


@pytest.mark.parametrize(("bits", "count"), [(9, 1), (10, 2), (16, 2), (17, 2), (18, 3), (25, 3)])
def test_bfloat16_terms_hold_eight_significant_bits_each(bits, count):
    fmt = BlockFloat(bits)
    assert ops.terms(fmt.significand_bits) == count
    x = fake_quantize(normal(64, 64) * 100, fmt)
    x[0, 0], x[0, 1], x[0, 2] = torch.inf, -torch.inf, torch.nan
    terms = ops.split(x, count)
    assert terms.dtype is torch.bfloat16 and len(terms) == count
    assert torch.equal(terms.double().sum(0).nan_to_num(), x.double().nan_to_num())
    assert all((term != 0).any() for term in terms)


@pytest.fixture
def on_a_gpu():
    with engines_of_a_gpu():
        yield


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("bfp9", "bfp9", "cuda"),
        ("bfp16", "bfp9", "cuda"),
        ("bfp16", "bfp16", "cuda"),
        ("bfp25", "bfp4", "cuda"),
        ("bfp4", "bfp25", "cuda"),
        ("bfp25", "bfp16", "float32"),
        ("fixed16", "int8/row", "cuda"),
        ("int8/32", "bfp8", "cuda"),
        ("float32", "bfp8", "float32"),
        ("bfp8", "float32", "float32"),
        ("float32", "float32", "float32"),
    ],
)
def test_a_gpu_multiplies_by_tensor_cores_what_four_products_of_terms_hold(a, b, expected):
    assert engines(a, b)[0] == expected
    assert engines(a, b, "float32") == ["float32"]


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("given", ["values", "terms"])
@pytest.mark.parametrize(
    ("a_fmt", "b_fmt"),
    [
        ("bfp4", "bfp9"),
        ("bfp16", "bfp4"),
        ("bfp12", "bfp16"),
        ("bfp24", "bfp4"),
        ("bfp8", "fixed17"),
        ("fixed25", "bfp9"),
    ],
)
@pytest.mark.parametrize("reductions", [(-1, -1), (-1, -2), (-2, -2)], ids=str)
def test_products_of_terms_are_exact_whatever_torch_does_to_float32(a_fmt, b_fmt, reductions, given):
    formats_, tensors = (parse(a_fmt), parse(b_fmt)), []
    for seed, (rows, fmt, reduction) in enumerate(zip((13, 35), formats_, reductions, strict=True)):
        shape = (2, rows, 53) if reduction == -1 else (2, 53, rows)
        tensors.append(fake_quantize(normal(*shape, seed=seed) * 100, fmt, reduction))
    a, b = map(operand, tensors, formats_, reductions)
    exact = a.rows.double() @ b.rows.double().mT
    magnitudes = a.rows.double().abs() @ b.rows.double().abs().mT
    if given == "terms":
        a, b = (
            each._replace(tensor=ops.split(each.tensor, count), terms=count)
            for each, count in ((each, ops.terms(each.side.significand_bits)) for each in (a, b))
        )
    torch.set_float32_matmul_precision("high")
    try:
        with mock.patch.object(torch, "bmm", wraps=torch.bmm) as product:
            got = multiply(a, b, "auto")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ((got - exact).abs() <= 60 * 2.0**-23 * magnitudes).all()
    assert got.dtype is torch.float32
    assert product.call_count == math.prod(ops.terms(each.significand_bits) for each in formats_)
    assert all(x.dtype is torch.bfloat16 for call in product.call_args_list for x in call.args)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype):
    x, w = (fake_quantize(normal(40, 300, seed=seed).to(dtype), BlockFloat(8)) for seed in (1, 2))
    assert engines("bfp8", "bfp8", dtype=dtype)[0] == "cuda"
    got = multiply(operand(x, BlockFloat(8)), operand(w, BlockFloat(8)), "auto")
    assert torch.equal(got, (x.float() @ w.float().mT).to(dtype))


def loses_bits_from_13_on(_, setting):
    if setting == "high":
        torch.set_float32_matmul_precision("high")
    if setting == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    x = torch.empty(2, 2, device="meta")
    float32._BACKENDS["meta"] = "cuda"
    for bits, cut in ((12, False), (13, True), (16, True)):
        side = Side(BlockFloat(bits), True)
        assert float32._loses_bits(Operand(x, side, -1), Operand(x, side, -1)) == cut, bits


@pytest.mark.parametrize("setting", ["high", "allow_tf32", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"])
def test_float32_products_on_a_gpu_are_not_cut_to_tf32(monkeypatch, setting):
    """Asked in a process of its own; where a variable says so, in a new one, as is started in vendors' containers."""
    variable = setting.isupper()
    if variable:
        monkeypatch.setenv(setting, "1")
    together(loses_bits_from_13_on, (setting,), 1, anew=variable)


@needs_kernel
@pytest.mark.parametrize("box_dim", ["reduction", "last"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("fmt", ["bfp", "fixed"])
@pytest.mark.parametrize("q", [(2, 2, 2, 16), (16, 4, 4, 16), (8, 8, 8, 8), (4, 16, 16, 4), (9, 10, 3, 12)], ids=str)
def test_a_step_is_the_same_on_either_arithmetic(q, fmt, rounding, box_dim):
    results = []
    for mode in ("auto", "float32"):
        config = GemmConfig(PrecisionConfig(q, fmt), rounding, box_dim, mode)
        torch.manual_seed(5)
        x, weight, bias = normal(37, 21, seed=1).requires_grad_(), normal(18, 21, seed=2).requires_grad_(), normal(18)
        y = linear(x, weight, bias, config)
        y.backward(normal(37, 18, seed=3))
        a, b = normal(3, 33, 20, seed=4).requires_grad_(), normal(3, 20, 17, seed=5).requires_grad_()
        z = matmul(a, b, config)
        z.backward(normal(3, 33, 17, seed=6))
        results.append([y, z, x.grad, weight.grad, a.grad, b.grad])
    for auto, plain in zip(*results, strict=True):
        torch.testing.assert_close(auto, plain, rtol=1e-5, atol=2e-5)


def test_two_terms_hold_every_number_of_sixteen_bits_and_not_of_seventeen():
    sixteen = torch.arange(-(2**16) + 1, 2**16).float()
    assert torch.equal(ops.split(sixteen, ops.terms(16)).double().sum(0), sixteen.double())
    assert ops.terms(16) == 2 and (ops.split(torch.tensor([2.0**17 - 1]), 2).double().sum() != 2**17 - 1)
    if TAKES_VALUES:  # times the identity, each term of each number
        values = sixteen[:-1].reshape(-1, 2)
        for eye, b_fmt in ((torch.eye(2), "bfp2"), (torch.eye(2), "bfp17")):
            product = multiply(operand(values, parse("bfp17"), -1), operand(eye, parse(b_fmt), -2), "native")
            assert torch.equal(product, values)


@pytest.mark.parametrize(("a_fmt", "b_fmt"), [("fixed8", "fixed8"), ("fixed3", "fixed8"), ("fixed8.4", "fixed6.3")])
@pytest.mark.parametrize("reductions", [(-1, -1), (-2, -2)], ids=str)
def test_integers_give_what_float32_gives(a_fmt, b_fmt, reductions):
    sizes = (130, 150, 200)
    tensors = [
        fake_quantize(normal(*((rows, 200) if reduction == -1 else (200, rows)), seed=rows) * 3, parse(fmt), reduction)
        for rows, fmt, reduction in zip(sizes, (a_fmt, b_fmt), reductions, strict=False)
    ]
    a, b = (
        operand(tensor, parse(fmt), reduction)
        for tensor, fmt, reduction in zip(tensors, (a_fmt, b_fmt), reductions, strict=True)
    )
    product = int8.Int8Engine().multiply(a, b, None, None)
    # Sums of so few 8-bit products are integers that a float32 holds.
    assert torch.equal(product, (a.rows.double() @ b.rows.double().mT).float())
    assert torch.equal(multiply(a, b, "auto", add_to=product.clone()), 2 * product)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_integers_do_not_hide_inf_and_nan(value):
    fmt = FixedPoint(8)
    x = torch.ones(128, 128)
    x[3, 5] = value
    x = fake_quantize(x, fmt)
    product = multiply(operand(x, fmt, -1), operand(torch.ones(128, 128), fmt, -1), "auto")
    assert product.isnan().all()  # fixed point with one scale: all of it is NaN


def test_the_code_that_two_s_complement_has_on_one_side_alone_survives():
    fmt = FixedPoint(8, 4)
    x = torch.full((128, 128), -8.0)  # code -128
    product = multiply(operand(x, fmt, -1), operand(x, fmt, -1), "auto")
    assert torch.equal(product, torch.full((128, 128), 64.0 * 128))


def test_zeros_have_a_scale_too():
    fmt = FixedPoint(8)
    zeros = torch.zeros(128, 128)
    assert torch.equal(multiply(operand(zeros, fmt, -1), operand(zeros, fmt, -1), "auto"), zeros)


@pytest.mark.parametrize("mode", ["auto", "float32"])
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.zeros(3, 20), torch.zeros(8, 24), None),
        (torch.zeros(3, 24), torch.zeros(8, 24).bfloat16(), None),
        (torch.zeros(3, 24).bfloat16(), torch.zeros(8, 24), None),
        (torch.zeros(3, 24), torch.zeros(8, 24), torch.zeros(5)),
    ],
    ids=["width", "weight's dtype", "input's dtype", "bias's shape"],
)
def test_operands_that_do_not_fit_are_refused_as_torch_refuses_them(mode, x, weight, bias):
    with pytest.raises(RuntimeError):
        torch.nn.functional.linear(x, weight, bias)
    with pytest.raises(RuntimeError):
        linear(x, weight, bias, GemmConfig(PrecisionConfig((4, 4, 4, 16)), gemm=mode))


def test_batched_operands_that_do_not_fit_are_refused():
    config = GemmConfig(PrecisionConfig((4, 4, 4, 16)))
    with pytest.raises(RuntimeError):
        matmul(torch.zeros(2, 3, 4), torch.zeros(2, 4, 5).bfloat16(), config)


@pytest.mark.parametrize("bias", [torch.arange(16.0)[::2], torch.ones(1).expand(8)], ids=["strided", "expanded"])
def test_a_bias_may_lie_in_memory_as_it_likes(bias):
    x, weight = normal(3, 24), normal(8, 24)
    config = GemmConfig(PrecisionConfig((4, 4, 4, 16)))
    assert torch.equal(linear(x, weight, bias, config), linear(x, weight, bias.clone(), config))


@pytest.mark.parametrize("extremes", [(1.0, -1.0), (1.0, -0.5), (0.5, -1.0), (1.0, 0.0), (0.0, -1.0)], ids=str)
@pytest.mark.parametrize("fmt", [*(f"fixed{bits}" for bits in range(2, 9)), "fixed8.4", "fixed4.4", "fixed2.0"])
def test_integers_keep_the_largest_values_of_either_sign(fmt, extremes):
    fmt = parse(fmt)
    x = (normal(256, 192, seed=1) / 8).clamp(extremes[1], extremes[0])
    x[3, 5], x[200, 100] = extremes
    x, w = fake_quantize(x * 4, fmt), fake_quantize(normal(130, 192, seed=2), fmt)
    a, b = operand(x, fmt, -1), operand(w, fmt, -1)
    product = int8.Int8Engine().multiply(a, b, None, None)
    assert product is not None
    assert torch.equal(product, (x.double() @ w.double().mT).float())
    assert torch.equal(multiply(a, b, "auto"), product)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 16, 512), (129, 128, 131), (256, 256, 256), (300, 700, 260)], ids=str)
@pytest.mark.parametrize("fmt", ["bfp2", "bfp8", "bfp9", "bfp16", "bfp32", "fixed4", "fixed8", "fixed16", "fixed8/row"])
def test_every_engine_is_exact_at_sizes_and_extremes_that_reach_it(threads, fmt, sizes, number):
    threads(number)
    m, k, n = sizes
    fmt, weight_fmt = parse(fmt), parse("bfp4" if fmt.startswith("bfp") else "fixed4")
    x, w = normal(m, k, seed=1) * 2.0 ** (normal(m, 1, seed=2) * 20).round(), normal(n, k, seed=3)
    x[0, 0], x[-1, -1], w[0, 0], w[-1, -1] = 2.0**20, -(2.0**20), 4.0, -4.0
    x, w = fake_quantize(x, fmt), fake_quantize(w, weight_fmt)
    exact = x.double() @ w.double().mT
    bound = k * 2.0**-22 * (x.double().abs() @ w.double().abs().mT)
    for mode in ("auto", "float32"):
        product = multiply(operand(x, fmt, -1), operand(w, weight_fmt, -1), mode)
        assert ((product - exact).abs() <= bound).all(), mode


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_no_setting_of_torch_cuts_the_operands(precision):
    fmt = parse("bfp16")
    x, w = fake_quantize(normal(200, 300, seed=1), fmt), fake_quantize(normal(200, 300, seed=2), fmt)
    a, b = operand(x, fmt, -1), operand(w, fmt, -1)
    float32._say_float64.cache_clear()
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.warns(UserWarning, match="multiplied in float64"):
            product = multiply(a, b, "float32")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(product, (x.double() @ w.double().mT).float())


class Trusting(Engine):
    """Says that it rounds, and does not."""

    name = "trusting"

    def __init__(self, fuses):
        self.fuses = fuses

    def accepts(self, a, b, device, dtype):
        return True

    def fuses_rounding(self, fmt):
        return self.fuses

    def multiply(self, a, b, bias, add_to):
        return a.rows @ b.rows.mT


@pytest.fixture
def first_engine():
    def put(fuses):
        gemm.register(Trusting(fuses), first=True)
        return plan(Side(BlockFloat(4), True), Side(BlockFloat(4), True), CPU, torch.float32)

    yield put
    gemm.unregister("trusting")


def test_an_operand_that_nobody_rounded_is_refused_and_not_multiplied(first_engine):
    """One engine is asked who rounds, another one multiplies: what the plan is there to prevent."""
    fusing = first_engine(True)
    assert fusing.fused == (True, True)
    left_to_it = operand(normal(3, 16), BlockFloat(4))._replace(rounded=False)
    assert fusing.multiply(left_to_it, left_to_it).shape == (3, 3)
    gemm.unregister("trusting")
    other = first_engine(False)
    rounded = operand(fake_quantize(normal(3, 16), BlockFloat(4)), BlockFloat(4))
    assert other.multiply(rounded, rounded).shape == (3, 3)
    for operands in ((left_to_it, rounded), (rounded, left_to_it)):
        with pytest.raises(RuntimeError, match=r"[ab]: not rounded to bfp4, and .*trusting.* does not round it"):
            other.multiply(*operands)


def test_an_operand_of_another_format_than_planned_is_refused(first_engine):
    planned = first_engine(True)
    x = operand(fake_quantize(normal(3, 16), BlockFloat(8)), BlockFloat(8))
    with pytest.raises(RuntimeError, match=r"a: got .*expected .*which the product was planned for"):
        planned.multiply(x, x)


def test_engines_of_one_plan_round_the_same(first_engine):
    planned = first_engine(True)
    assert {engine.fuses_rounding(BlockFloat(4)) for engine in planned.engines} == {True}


def test_an_engine_is_asked_before_float32_which_takes_everything():
    before = gemm.names()
    gemm.register(Trusting(False))
    try:
        assert gemm.names() == [*before[:-1], "trusting", "float32"]
        planned = plan(Side(Float32(), True), Side(Float32(), True), CPU, torch.float32)
        assert planned.engines[0].name == "trusting"
    finally:
        gemm.unregister("trusting")
    assert gemm.names() == before


def test_a_name_is_registered_once(first_engine):
    first_engine(True)
    with pytest.raises(ValueError, match="engine 'trusting' is registered already"):
        gemm.register(Trusting(True))


@pytest.mark.parametrize("mode", ["auto", "int8", "native", "float32"])
@pytest.mark.parametrize("a_fmt", ["int8/row", "int8/tensor", "int4/row", "int8/32", "bfp4"])
@pytest.mark.parametrize("b_fmt", ["int8/row", "int2/tensor", "ternary", "ternary/row"])
@pytest.mark.parametrize("sizes", [(5, 24, 7), (130, 160, 150)], ids=str)
def test_scales_of_rows_factor_out_and_codes_multiply_exactly(mode, a_fmt, b_fmt, sizes):
    if mode != "auto" and gemm.base._ENGINES[gemm.names().index(mode)].unavailable():
        pytest.skip(f"no {mode} engine here")
    m, k, n = sizes
    a_fmt, b_fmt = parse(a_fmt), parse(b_fmt)
    x, weight = normal(m, k, seed=1) * torch.arange(1, m + 1)[:, None], normal(n, k, seed=2)
    config = GemmConfig(PrecisionConfig((f"{a_fmt}|{b_fmt}", 32, 32, 32)), gemm=mode)
    y = linear(x, weight, None, config)
    wanted = fake_quantize(x, a_fmt).double() @ fake_quantize(weight, b_fmt).double().mT
    magnitudes = fake_quantize(x, a_fmt).double().abs() @ fake_quantize(weight, b_fmt).double().abs().mT
    assert ((y - wanted).abs() <= k * 2.0**-22 * magnitudes).all()
    if mode == "int8" and a_fmt.outer_scale and min(sizes) >= int8.LEAST:
        side = Side(a_fmt, True)
        assert plan(side, Side(b_fmt, True), CPU, torch.float32, mode).engines[0].name == "int8"
