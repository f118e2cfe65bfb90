"""Weights held as codes: their scales, the integer update, and a layer with no float behind it."""

import copy
import math

import pytest
import torch
from nn.common import normal, tensors_of
from torch import nn

from fairseq_dsq.adam import LowBitAdam
from fairseq_dsq.formats import parse
from fairseq_dsq.kernels import native
from fairseq_dsq.nn import (
    CodedLinear,
    CodedWeight,
    DSQAttention,
    DSQContext,
    DSQLinear,
    GemmConfig,
    convert,
    decoded,
    formats_of_codes,
    hold_codes,
    update_codes,
    weight_bytes,
    weight_format,
)
from fairseq_dsq.nn.coded import code_limits
from fairseq_dsq.nn.coded_linear import _say_slow, holds_codes
from fairseq_dsq.precision import PrecisionConfig, Rule
from fairseq_dsq.quantized import fake_quantize, noise_seed

FORMATS = ["int8/row", "int8/tensor", "int4/row", "int3/row", "int3/tensor", "int12/row", "ternary", "ternary/row"]
LEVEL = PrecisionConfig(("int8/row", "int8/row", "int8/row", "float32"))


def layer(fmt="int8/row", sizes=(21, 10), level=LEVEL, rule="own", seed=1):
    """A coded layer, its float weight of before, and its context."""
    k, n = sizes
    context = DSQContext(GemmConfig(level))
    linear = DSQLinear(k, n, context)
    with torch.no_grad():
        linear.weight.copy_(normal(n, k, seed=seed))
    weight = linear.weight.detach().clone()
    return CodedLinear.of(linear, weight_format(fmt), rule), weight, context


# Scales


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", ["own", "absmean", "absmax", "mse"])
def test_a_weight_is_the_nearest_codes_under_its_scale(fmt, rule):
    fmt, weight = weight_format(fmt), normal(12, 21) * torch.logspace(-3, 3, 12)[:, None]
    held = CodedWeight.of(weight, fmt, rule)
    codes = held.integers().double()
    odd = rule == "absmean" and fmt.family == "int"
    assert torch.equal(codes, codes.round()) and (codes.min() == -fmt.max_code - 1 if odd else True)
    exact = (weight.double() / held.scale).clamp(-fmt.max_code - odd, fmt.max_code)
    assert (codes - exact).abs().max() <= 0.5 + 1e-6 * fmt.max_code
    assert held.nbytes == held.codes.numel() + held.scale.numel() * 4
    groups = weight if fmt.group == "row" else weight.reshape(1, -1)
    mean, largest = groups.abs().mean(1, keepdim=True), groups.abs().amax(1, keepdim=True)
    if rule == "absmax" or (rule == "own" and fmt.family == "int"):
        torch.testing.assert_close(held.scale, largest / fmt.max_code)
    elif rule != "mse":
        torch.testing.assert_close(held.scale, mean / fmt.max_code)


def test_own_scales_are_the_format_s():
    for text in FORMATS:
        held = CodedWeight.of(normal(12, 24), weight_format(text))
        assert torch.equal(held.dequantize(), fake_quantize(normal(12, 24), parse(text)))


@pytest.mark.parametrize(
    ("fmt", "absmean", "best", "multiple"),
    [
        ("ternary/tensor", 0.264, 0.190, 1.55),
        ("int3/tensor", 0.184, 0.044, 2.45),
        ("int4/tensor", 0.207, 0.0115, 3.10),
        ("int8/tensor", 0.230, 0.0001, 4.80),
    ],
)
def test_the_error_of_a_gaussian_weight_is_the_known_one(fmt, absmean, best, multiple):
    weight = normal(256, 1024)
    errors = {}
    for rule in ("absmean", "mse"):
        held = CodedWeight.of(weight, weight_format(fmt), rule)
        errors[rule] = float((held.dequantize() - weight).square().mean() / weight.square().mean())
    assert errors["absmean"] == pytest.approx(absmean, abs=0.004)
    assert errors["mse"] == pytest.approx(best, rel=0.15)
    found = float(held.scale) * weight_format(fmt).max_code / float(weight.abs().mean())
    assert found == pytest.approx(multiple, abs=0.25)


def test_a_row_of_zeros_has_the_others_scale_and_zeros_alone_have_none():
    weight = normal(4, 8)
    weight[1] = 0
    scale = CodedWeight.of(weight, weight_format("int4/row")).scale
    assert float(scale[1]) == pytest.approx(float(scale[[0, 2, 3]].mean()))
    with pytest.raises(ValueError, match="holds nothing but zeros"):
        CodedWeight.of(torch.zeros(4, 8), weight_format("int4/row"))
    weight[2, 3] = math.nan
    assert CodedWeight.of(weight, weight_format("int4/row"), "mse").dequantize().isnan().any(1).tolist()[2]


@pytest.mark.parametrize("text", ["bfp8", "int8/16", "float32", "fixed8"])
def test_formats_that_hold_no_weight_are_refused(text):
    with pytest.raises(ValueError, match=f"got {text}, expected integers with a scale by row or tensor"):
        weight_format(text)


# The update


def exact_update(codes, delta, uniform):
    """code' in float64, of a uniform number in [0, 1) for each code."""
    magnitude = delta.double().abs()
    away = magnitude.floor() + (uniform < magnitude - magnitude.floor())
    return (codes.double() + delta.double().sign() * away).clamp(-127, 127)


def test_the_update_is_that_of_the_plain_formula():
    codes, delta = normal(50, 40).mul(40).round(), normal(50, 40, seed=1) * torch.logspace(-8, 2, 50)[:, None]
    new = update_codes(codes, delta, (-127, 127), seed=11)
    from fairseq_dsq.formats import definition

    uniform = definition.random_bits(torch.arange(2000).view(50, 40), 11).double() / 2.0**32
    assert torch.equal(new.double(), exact_update(codes, delta, uniform))
    below = (codes.double() + delta.double()).floor().clamp(-127, 127)
    assert ((new - below) >= 0).all() and ((new - below) <= 1).all()


@pytest.mark.parametrize("size", [3e-7, 1e-4, 0.3, 2.75, -1e-4, -0.9])
def test_an_update_is_unbiased_even_where_it_is_far_below_a_code(size):
    count = 1 << 20
    new = update_codes(torch.full((count,), 100.0), torch.full((count,), size), (-128, 127), seed=5)
    fraction = abs(size) % 1
    sigma = math.sqrt(fraction * (1 - fraction) / count)
    assert abs(float(new.double().mean()) - 100 - size) < 3 * sigma + 1e-9


def test_codes_end_at_their_limits_and_absmean_has_the_odd_one():
    assert code_limits(weight_format("int4/row"), "absmean") == (-8, 7)
    assert code_limits(weight_format("ternary"), "absmean") == (-1, 1)
    for rule, low in (("absmean", -8), ("absmax", -7)):
        coded, _, _ = layer("int4/row", rule=rule)
        coded.subtract_(torch.full((10, 21), 1e3), 1)
        assert set(coded.coded.integers().flatten().tolist()) == {low}
        coded.subtract_(torch.full((10, 21), -1e3), 2)
        assert set(coded.coded.integers().flatten().tolist()) == {7}


def test_noise_differs_between_updates_parameters_and_seeds_and_on_nothing_else():
    seeds = {noise_seed(seed, update, index) for seed in range(4) for update in range(50) for index in range(20)}
    assert len(seeds) == 4 * 50 * 20 and all(0 <= seed < 2**62 for seed in seeds)
    first, _, _ = layer()
    second = copy.deepcopy(first)
    step = normal(10, 21) * 0.01
    for update in range(5):
        torch.manual_seed(update)
        first.subtract_(step, noise_seed(1, update, 3))
        torch.rand(7)
        second.subtract_(step, noise_seed(1, update, 3))
    assert torch.equal(first.weight_codes, second.weight_codes)
    first.subtract_(step, noise_seed(1, 5, 3))
    second.subtract_(step, noise_seed(1, 5, 4))
    assert not torch.equal(first.weight_codes, second.weight_codes)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_layer_s_update_is_that_of_its_codes_whatever_it_is_cut_into(fmt, monkeypatch):
    from fairseq_dsq.nn import coded_linear

    whole, _, context = layer(fmt)
    before, scale = whole.coded.integers(), whole.weight_scale.clone()
    parts = copy.deepcopy(whole)
    step = normal(10, 21, seed=9) * scale * 3
    whole.weight.dsq_codes.subtract_(step, 7)
    expected = update_codes(before, step / -scale, code_limits(weight_format(fmt), "own"), 7)
    assert torch.equal(whole.coded.integers(), expected) and torch.equal(whole.weight_scale, scale)
    assert context.ledger.drain_updates() == (int((expected != before).sum()), 210)
    assert context.ledger.drain_updates() == (0, 0)
    monkeypatch.setattr(coded_linear, "_AT_A_TIME", 50)
    parts.subtract_(step, 7)
    assert torch.equal(parts.weight_codes, whole.weight_codes)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_rest_of_a_step_is_what_rounding_left_undone(fmt, monkeypatch):
    from fairseq_dsq.nn import coded_linear

    monkeypatch.setattr(coded_linear, "_AT_A_TIME", 50)
    coded, _, _ = layer(fmt)
    low, high = code_limits(coded.weight_format, "own")
    step = normal(10, 21, seed=9) * coded.weight_scale * 3
    before, rest = coded.coded.integers().double(), step.clone()
    coded.subtract_(rest, 7, leave_rest=True)
    scale = coded.weight_scale.double()
    exact = (before - step.double() / scale).clamp(low, high)
    torch.testing.assert_close(rest.double(), (coded.coded.integers() - exact) * scale, rtol=1e-5, atol=1e-6)
    assert (rest.abs() <= coded.weight_scale).all() and rest.any()
    # The codes are the same, whether the rest is asked for or not.
    plain, _, _ = layer(fmt)
    plain.subtract_(step, 7)
    assert torch.equal(plain.weight_codes, coded.weight_codes)


@pytest.mark.skipif(native.kernels is None, reason="no kernels here, which is said elsewhere")
def test_codes_that_no_kernel_updates_are_said_to_be_slow_once(recwarn):
    _say_slow.cache_clear()
    for fmt in ("int8/row", "int4/row", "int4/row"):
        layer(fmt)[0].subtract_(torch.full((10, 21), 0.01), 1)
    (said,) = (str(warning.message) for warning in recwarn if "no kernel updates" in str(warning.message))
    assert said.startswith("int4/row: no kernel updates weights of these codes")


def test_a_step_with_nan_makes_its_row_nan_and_no_other():
    coded, _, _ = layer()
    step = torch.zeros(10, 21)
    step[3, 4], step[5, 0] = math.nan, math.inf
    codes = coded.weight_codes.clone()
    coded.subtract_(step, 1)
    assert torch.equal(coded.weight_codes, codes)
    assert [row for row, bad in enumerate(coded.coded.dequantize().isnan().all(1)) if bad] == [3, 5]
    coded, _, _ = layer("ternary")
    coded.subtract_(step, 1)
    assert coded.coded.dequantize().isnan().all()


# The layer


@pytest.mark.parametrize("box_dim", ["reduction", "last"])
@pytest.mark.parametrize("level", [LEVEL, PrecisionConfig((16, 4, 4, 16)), PrecisionConfig((32,) * 4, "float32")])
@pytest.mark.parametrize("fmt", FORMATS)
def test_all_three_gemms_read_the_codes_as_they_are(fmt, level, box_dim):
    coded, _, context = layer(fmt, (24, 16), level)
    context.config = GemmConfig(level, box_dim=box_dim)
    weight = coded.coded.dequantize()
    x, grad = normal(12, 24, seed=2).requires_grad_(), normal(12, 16, seed=3)
    y = coded(x)
    y.backward(grad)
    along = {"reduction": (-1, 0), "last": (-1, -1)}[box_dim]

    def fq(tensor, kind, which, dim):
        return fake_quantize(tensor.detach(), level.operands(kind)[which], dim).double()

    torch.testing.assert_close(
        y.double(), fq(x, "output", 0, -1) @ weight.double().mT + coded.bias.double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(x.grad.double(), fq(grad, "grad_input", 0, -1) @ weight.double(), rtol=1e-5, atol=1e-5)
    stash = fake_quantize(x.detach(), level.stash("input"), along[1]).double()
    expected = fq(grad, "grad_weight", 1, along[1]).mT @ stash
    torch.testing.assert_close(coded.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    held = {
        str(key.precision.operands(key.gemm.kind)[1]) for key in context.ledger.gemms if key.gemm.kind != "grad_weight"
    }
    assert held == {weight_format(fmt).text}


def test_a_held_weight_in_generation_is_the_same():
    coded, _, _ = layer()
    x = normal(5, 21)
    coded.eval()
    with torch.no_grad():
        expected = coded(x)
        coded.freeze()
        torch.testing.assert_close(coded(x), expected, rtol=1e-6, atol=1e-6)
        assert coded._held is not None
    coded.subtract_(torch.ones(10, 21), 1)
    assert coded._held is None


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_layer_holds_the_formula_s_bytes_and_no_float_weight(fmt):
    coded, _, _ = layer(fmt, (24, 16))
    coded(normal(12, 24).requires_grad_()).sum().backward()
    coded.weight.dsq_codes.subtract_(coded.weight.grad, 1)
    coded.zero_grad(set_to_none=True)
    placeholder, bias = 4, 16 * 4
    formula = weight_format(fmt).nbytes((16, 24))
    assert sum(tensors_of(coded, {}).values()) == formula + placeholder + bias
    assert weight_bytes(coded) == formula + bias


def test_backward_keeps_codes_and_the_stash():
    coded, _, _ = layer("int4/row", (64, 32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        coded(normal(8, 64).requires_grad_())
    sizes = sorted(t.numel() * t.element_size() for t in kept)
    assert sizes == sorted([32 * 32, 32 * 4, parse("int8/row").nbytes((8, 64), -2)])


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")]
)
def test_copies_and_casts_hold_no_float_weight(change):
    coded, _, _ = layer("ternary/row", (24, 16))
    values = coded.coded.dequantize()
    changed = change(nn.Sequential(coded))[0]
    assert torch.equal(changed.coded.dequantize(), values) and changed.weight_scale.dtype is torch.float32
    assert changed.weight.shape == (16, 24) and changed.weight.untyped_storage().nbytes() <= 4
    assert changed.weight.dsq_codes is changed and list(dict(changed.named_parameters())) == ["weight", "bias"]
    assert changed.weight.isnan().all()


@pytest.mark.parametrize("change", ["float", "cpu", "half"])
def test_an_optimizer_goes_on_with_a_layer_that_was_cast_or_moved(change):
    """torch keeps Parameters through casts and moves, and so do layers of codes."""
    coded, _, _ = layer("int8/row", (80, 80))
    model = nn.Sequential(coded)
    optimizer, weight, codes = LowBitAdam(model.parameters(), lr=0.1), coded.weight, coded.weight_codes.clone()
    getattr(model, change)()
    assert coded.weight is weight and weight.dtype is (torch.float16 if change == "half" else torch.float32)
    assert list(dict(model.named_parameters())) == ["0.weight", "0.bias"] and weight.stride() == (0, 0)
    model(normal(12, 80).to(weight.dtype)).sum().backward()
    optimizer.step()
    assert not torch.equal(coded.weight_codes, codes)


def test_backward_of_codes_that_were_updated_since_is_refused():
    coded, _, _ = layer("int8/row", (24, 16))
    y = coded(normal(12, 24).requires_grad_())
    coded.subtract_(torch.full((16, 24), 0.1), 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_trains(dtype):
    coded, _, _ = layer("int8/row", (24, 16))
    coded = coded.to(dtype)
    x = normal(12, 24).to(dtype).requires_grad_()
    y = coded(x)
    y.sum().backward()
    assert y.dtype is x.grad.dtype is coded.weight.grad.dtype is dtype
    expected = fake_quantize(x.detach().float(), parse("int8/row")) @ coded.coded.dequantize().mT
    torch.testing.assert_close(y.float(), expected + coded.bias.float(), rtol=2e-2, atol=2e-2)


def test_autocast_leaves_the_placeholder_alone():
    coded, _, _ = layer("int8/row", (24, 16))
    with torch.autocast("cpu", torch.bfloat16):
        y = coded(normal(12, 24).requires_grad_())
    y.float().sum().backward()
    assert coded.weight.grad.dtype is torch.float32 and coded.weight.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_state_dict_has_codes_and_scale_and_comes_back(fmt):
    coded, weight, _ = layer(fmt)
    state = nn.Sequential(coded).state_dict()
    *names, checksum = state
    assert names == ["0.bias", "0.weight_codes", "0.weight_scale", "0.weight_columns", "0.weight_format"]
    other, _, _ = layer(fmt, seed=8)
    # Who averages entries of one name, as fairseq's script does, finds no codes to add up.
    assert checksum.startswith("0.weight_checksum_") and checksum not in nn.Sequential(other).state_dict()
    nn.Sequential(other).load_state_dict(state)
    assert list(nn.Sequential(other).state_dict()) == list(state)
    assert torch.equal(other.coded.dequantize(), coded.coded.dequantize())
    float_state = decoded(state)
    assert list(float_state) == ["0.bias", "0.weight"]
    assert torch.equal(float_state["0.weight"], coded.coded.dequantize())
    plain = nn.Sequential(nn.Linear(21, 10))
    plain.load_state_dict(float_state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight"'):
        plain.load_state_dict(state)
    third, _, _ = layer(fmt, seed=9)
    nn.Sequential(third).load_state_dict({"0.weight": weight, "0.bias": state["0.bias"]})
    assert torch.equal(third.weight_codes, coded.weight_codes)


def test_codes_of_another_format_are_decoded_and_quantized():
    """An 8-bit model's weights become ternary ones, as the absmean of what they are says; so do all that ask for it."""
    for saved in FORMATS:
        before, _, _ = layer(saved)
        for fmt in FORMATS:
            after, _, _ = layer(fmt, seed=8)
            after.load_state_dict(before.state_dict())
            expected = before.coded if fmt == saved else CodedWeight.of(before.coded.dequantize(), weight_format(fmt))
            assert torch.equal(after.weight_codes, expected.codes) and torch.equal(after.weight_scale, expected.scale)
    int2, _, _ = layer("int2/tensor")
    assert int2.weight_codes.shape == layer("ternary")[0].weight_codes.shape  # nothing but its name tells them apart
    ternary, _, _ = layer("ternary", seed=8)
    ternary.load_state_dict(int2.state_dict())
    mean = int2.coded.dequantize().abs().mean()
    torch.testing.assert_close(ternary.weight_scale, mean.view(1, 1))
    assert formats_of_codes(nn.Sequential(int2, ternary).state_dict()) == {"int2/tensor", "ternary"}


def test_a_state_dict_of_another_shape_or_without_its_parts_is_refused():
    coded, _, _ = layer()
    for weight, message in (
        (torch.ones(11, 21), r"0.weight: got \(11, 21\), expected \(10, 21\)"),
        (torch.zeros(10, 21), "0.weight: holds nothing but zeros"),
    ):
        with pytest.raises(RuntimeError, match=message) as refused:
            nn.Sequential(coded).load_state_dict({"0.weight": weight, "0.bias": torch.ones(10)})
        assert "Missing" not in str(refused.value)
    assert holds_codes(coded.state_dict()) and formats_of_codes(coded.state_dict()) == {"int8/row"}
    with pytest.raises(RuntimeError, match="weight: got codes of 22 columns, expected 21"):
        coded.load_state_dict(layer(sizes=(22, 10))[0].state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight_codes"):
        coded.load_state_dict(layer(sizes=(21, 11))[0].state_dict())
    for fmt in ("int4/row", "ternary"):  # whose bytes are as many for 7 columns as for 8
        odd, even = (layer(fmt, sizes=(columns, 10))[0] for columns in (7, 8))
        with pytest.raises(RuntimeError, match="weight: got codes of 7 columns, expected 8"):
            even.load_state_dict(odd.state_dict())
    state = nn.Sequential(coded).state_dict()
    for part in ("weight_scale", "weight_columns", "weight_format"):
        with pytest.raises(
            ValueError, match=r"0\.weight_codes: got codes alone, expected weight_scale, weight_columns"
        ):
            decoded({name: value for name, value in state.items() if name != f"0.{part}"})
    with pytest.raises(RuntimeError, match="weight"):
        coded.load_state_dict({"weight": torch.zeros(3, 3), "bias": torch.zeros(10)})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 24)
        self.fc1, self.fc2, self.fc3 = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.out = nn.Linear(24, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.fc3(self.fc2(self.fc1(self.embed(x)))))


def test_tied_skipped_and_ruled_weights_follow_their_patterns():
    context = DSQContext(GemmConfig(LEVEL))
    rules = (Rule("fc2", (PrecisionConfig((16, 4, 4, 16)),)), Rule("fc3", (PrecisionConfig((32,) * 4, "float32"),)))
    model = convert(Model(), context, rules=rules)
    assert hold_codes(model, context, weight_format("int8/row")) == ["fc1", "fc2"]
    assert type(model.fc3) is DSQLinear and model.out.weight is model.embed.weight
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer_sees = {name: parameter.grad.shape for name, parameter in model.named_parameters()}
    assert optimizer_sees["fc1.weight"] == (24, 24) and len(optimizer_sees) == 7
    skipped = convert(Model(), context, skip=["fc1"])
    assert hold_codes(skipped, context, weight_format("int8/row")) == ["fc2", "fc3"]


def test_attention_s_projections_share_one_stash():
    context = DSQContext(GemmConfig(LEVEL))
    attention = DSQAttention(24, 2, context)
    assert len(hold_codes(attention, context, weight_format("int8/row"))) == 4
    x = normal(5, 2, 24).requires_grad_()
    attention(x, x, x)[0].sum().backward()
    inputs = [key for key in context.ledger.stashes if key.stash.shape == (10, 24)]
    assert sum(context.ledger.stashes[key] for key in inputs) == 2


def test_a_weight_of_zeros_is_named():
    context = DSQContext(GemmConfig(LEVEL))
    model = convert(Model(), context)
    nn.init.zeros_(model.fc2.weight)
    with pytest.raises(ValueError, match=r"fc2\.weight: holds nothing but zeros"):
        hold_codes(model, context, weight_format("int8/row"))
