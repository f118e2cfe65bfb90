"""LowBitAdam: fairseq's bits in float32, and in low bits the published weak spots of other low-bit Adams."""

import copy
import math

import pytest
import torch
from fairseq.optim.adam import Adam

from fairseq_dsq.adam import SMALL, LowBitAdam, Moments
from fairseq_dsq.formats import Float32, parse
from fairseq_dsq.nn import FLOAT32, DSQContext, DSQLinear, GemmConfig
from fairseq_dsq.nn.coded_linear import CodedLinear
from fairseq_dsq.quantized import noise_seed, pack

SHAPES = [(80, 64), (64, 16, 3, 3), (SMALL,), (7, 5), ()]
PAIRS = [
    ("int8/row", "log8/row"),
    ("int4/128", "log8/128"),
    ("int8/row", "int8/row"),
    ("float32", "log6/row"),
    ("int8/tensor", "float32"),
    ("bfp8", "log8/tensor"),
]


def parameters(seed=0, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer, parameters, steps, seed=1, first=0):
    """The same gradients for every optimizer."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def states(optimizer):
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y) if torch.is_tensor(x) else x == y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_with_float32_moments_it_gives_the_bits_of_fairseq_s_adam(decay, dtype):
    flags = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": decay}
    theirs, ours = parameters(dtype=dtype), parameters(dtype=dtype)
    reference, optimizer = Adam(theirs, **flags), LowBitAdam(ours, **flags, moment1="float32", moment2="float32")
    train(reference, theirs, 50)
    train(optimizer, ours, 50)
    assert_equal(theirs, ours)
    assert_equal(states(reference), states(optimizer))


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_the_bytes_held_are_those_of_the_formula_and_no_float_hides(pair):
    ours = parameters()
    optimizer = LowBitAdam(ours, moment1=pair[0], moment2=pair[1])
    train(optimizer, ours, 2)
    optimizer.zero_grad()
    moments = Moments(*map(parse, pair))
    assert optimizer.state_nbytes == sum(moments.nbytes(p.shape) for p in ours)
    expected = 8 * (SMALL + 35 + 1) + sum(parse(text).nbytes(shape) for text in pair for shape in ((80, 64), (64, 144)))
    assert optimizer.state_nbytes == expected
    for p in ours:
        for name, fmt in zip(("exp_avg", "exp_avg_sq"), moments.formats(p.shape), strict=True):
            held = optimizer.state[p][name]
            assert held.dtype is (torch.float32 if fmt == Float32() else torch.uint8)
            assert held.untyped_storage().nbytes() == held.numel() * held.element_size()
        assert {type(value) for value in optimizer.state[p].values()} <= {int, torch.Tensor}


def test_small_and_one_dimensional_tensors_are_updated_as_by_fairseq_s_adam():
    theirs, ours = (parameters(shapes=[(4096,), (63, 65), ()]) for _ in range(2))
    train(Adam(theirs), theirs, 20)
    train(LowBitAdam(ours), ours, 20)
    assert_equal(theirs, ours)


def reference_step(p, m, v, grad, lr, betas, eps, decay, step):
    """In plain float64."""
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad**2
    p = p - lr * decay * p
    return p - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + 0 * eps), m, v


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_step_is_that_of_the_plain_formulas_on_what_the_bytes_say(rounding):
    ours = parameters(shapes=[(64, 80)])
    flags = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.1}
    optimizer = LowBitAdam(ours, **flags, rounding=rounding, seed=5)
    moments = Moments(parse("int8/row"), parse("log8/row"), rounding)
    train(optimizer, ours, 3)
    state = optimizer.state[ours[0]]
    m, v = (x.double() for x in moments.decode(state["exp_avg"], state["exp_avg_sq"], ours[0].shape))
    expected, m, v = reference_step(ours[0].detach().double(), m, v, 0, 1e-3, (0.9, 0.999), 0, 0.1, 4)
    grad = torch.zeros(64, 80)
    ours[0].grad = grad
    optimizer.step()
    torch.testing.assert_close(ours[0].detach().double(), expected, rtol=1e-5, atol=1e-6)
    new_m, new_v = moments.decode(state["exp_avg"], state["exp_avg_sq"], ours[0].shape)
    assert (new_v / v - 1).abs().max() < 2 ** (32 / 255) - 1 + 1e-6
    root = new_v.double().sqrt()
    step = (m / root).abs().amax(1, keepdim=True) / 127
    assert ((new_m - m).abs() <= root * step * (0.5001 if rounding == "nearest" else 1.0001)).all()


def spread_gradients(decades, rows, columns, generator):
    """Whose scale falls by so many decades along a row."""
    return torch.randn(rows, columns, generator=generator) * torch.logspace(0, -decades, columns)


@pytest.mark.parametrize("decades", [0, 2, 3, 4])
def test_a_spread_of_the_gradient_along_a_row_does_not_spoil_the_update(decades):
    """rms error of the parameters' change against Adam in float32; others: 0.02 to 36, see README."""
    changes = []
    for make in (Adam, LowBitAdam):
        (p,) = parameters(shapes=[(16, 512)])
        start, generator = p.detach().clone(), torch.Generator().manual_seed(1)
        optimizer = make([p], lr=1e-3, betas=(0.9, 0.999))
        for _ in range(60):
            p.grad = spread_gradients(decades, 16, 512, generator)
            optimizer.step()
        changes.append(p.detach() - start)
    error = (changes[1] - changes[0]).square().mean().sqrt() / changes[0].square().mean().sqrt()
    assert error < 0.07


def test_a_half_that_falls_quiet_is_followed_by_its_second_moment():
    """A change of 0.1 % a step is less than half a code: rounded to nearest it would never be seen."""
    means = {}
    for name, flags in {"float": ("float32", "float32"), "low": ("int8/row", "log8/row")}.items():
        (p,) = parameters(shapes=[(32, 256)])
        optimizer = LowBitAdam([p], 1e-4, (0.9, 0.999), moment1=flags[0], moment2=flags[1])
        generator = torch.Generator().manual_seed(2)
        for step in range(1600):
            p.grad = torch.randn(32, 256, generator=generator)
            if step >= 200:
                p.grad[:, 128:] *= 0.1
            optimizer.step()
        state, moments = optimizer.state[p], Moments(*map(parse, flags))
        _, v = moments.decode(state["exp_avg"], state["exp_avg_sq"], p.shape)
        means[name] = v[:, 128:].mean().item()
    assert means["low"] == pytest.approx(means["float"], rel=0.05)


def test_moments_are_held_without_bias():
    """Neither shifted nor shrunk, within three standard errors; nor off at any value, which the formats' tests show."""
    moments, errors = Moments(parse("int8/row"), parse("log8/row")), []
    generator = torch.Generator().manual_seed(4)
    v = torch.rand(64, 64, generator=generator).mul_(-12).exp2_()
    m = torch.randn(64, 64, generator=generator) * v.sqrt()
    for step in range(200):
        seeds = (noise_seed(0, step, 0, 0), noise_seed(0, step, 0, 1))
        held_m, held_v = moments.decode(*moments.encode(m, v, seeds), m.shape)
        off = (held_m - m) / v.sqrt()
        errors.append(torch.stack([off, off * m.sign(), held_v / v - 1]))
    samples = torch.stack(errors).double().transpose(0, 1).flatten(1)
    assert (samples.mean(1).abs() < 3 * samples.std(1) / samples.shape[1] ** 0.5).all()


def test_where_the_second_moment_is_zero_the_first_is_exactly_zero():
    (p,) = parameters(shapes=[(64, 64)])
    optimizer = LowBitAdam([p])
    before = p.detach().clone()
    for step in range(20):
        p.grad = torch.zeros(64, 64)
        p.grad[:32, 1:] = torch.randn(32, 63, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    m, v = Moments(parse("int8/row"), parse("log8/row")).decode(*states(optimizer)[1:], p.shape)
    assert not m[32:].any() and not v[32:].any() and not m[:, 0].any()
    assert torch.equal(p[32:], before[32:]) and torch.equal(p[:, 0], before[:, 0])


def test_a_gradient_with_nan_makes_nan_of_its_rows_alone():
    ours = parameters(shapes=[(64, 64)])
    optimizer = LowBitAdam(ours)
    train(optimizer, ours, 1)
    ours[0].grad[3, 5] = math.nan
    optimizer.step()
    assert ours[0].isnan().nonzero().tolist() == [[3, 5]]
    m, v = Moments(parse("int8/row"), parse("log8/row")).decode(*states(optimizer)[1:], ours[0].shape)
    for moment in (m, v):
        assert moment[3].isnan().all() and moment.isnan().sum() == 64


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(pair, tmp_path):
    flags = {"moment1": pair[0], "moment2": pair[1], "seed": 7}
    whole, stopped = parameters(), parameters()
    through, optimizer = LowBitAdam(whole, **flags), LowBitAdam(stopped, **flags)
    train(through, whole, 8)
    train(optimizer, stopped, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in stopped]
    again = LowBitAdam(resumed, **flags)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(saved)
    assert_equal(states(again), states(optimizer))
    train(again, resumed, 5, first=3)
    assert_equal(resumed, whole)
    assert_equal(states(again), states(through))
    # What was loaded is not shared.
    assert_equal([value for state in saved["state"].values() for value in state.values()], states(optimizer))


def test_half_precision_parameters_keep_their_states_as_they_are():
    ours = parameters(dtype=torch.bfloat16)
    optimizer = LowBitAdam(ours)
    train(optimizer, ours, 3)
    again = LowBitAdam(parameters(dtype=torch.bfloat16))
    again.load_state_dict(optimizer.state_dict())
    assert_equal(states(again), states(optimizer))
    assert {value.dtype for value in states(again) if torch.is_tensor(value)} == {torch.float32, torch.uint8}


@pytest.mark.parametrize("saved", [Adam, *PAIRS], ids=str)
def test_states_in_other_formats_are_encoded_in_those_of_the_flags(saved):
    ours = parameters()
    flags = {} if saved is Adam else {"moment1": saved[0], "moment2": saved[1]}
    before = Adam(ours) if saved is Adam else LowBitAdam(ours, **flags)
    train(before, ours, 5)
    for pair in (("float32", "float32"), ("int8/row", "log8/row")):
        after = LowBitAdam(parameters(), moment1=pair[0], moment2=pair[1])
        after.load_state_dict(before.state_dict())
        source = Moments(*(Float32(), Float32()) if saved is Adam else map(parse, saved))
        target = Moments(*map(parse, pair))
        for p, q in zip(ours, after.param_groups[0]["params"], strict=True):
            held = [(state["exp_avg"], state["exp_avg_sq"]) for state in (before.state[p], after.state[q])]
            (m, v), (found_m, found_v) = source.decode(*held[0], p.shape), target.decode(*held[1], p.shape)
            if "float32" in pair:
                assert torch.equal(m.where(v != 0, 0.0), found_m) and torch.equal(v, found_v)
            assert ((m - found_m) * (v != 0)).abs().max() <= 0.03 * m.abs().max()
            assert after.state[q]["step"] == 5
        assert after.param_groups[0]["moment1"] == pair[0]
        train(after, after.param_groups[0]["params"], 1)


class Coded:
    """What a weight that is held as codes offers an optimizer."""

    kernel_codes = None

    def __init__(self, weight):
        self.weight, self.seeds, self.coded = weight, [], self

    def dequantize(self):
        return self.weight.clone()

    def subtract_(self, step, seed):
        self.weight -= step
        self.seeds.append(seed)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_weight_that_is_held_as_codes_takes_its_step(decay):
    (plain,), held = parameters(shapes=[(64, 80)]), parameters(shapes=[(64, 80)])[0].detach()
    placeholder = torch.nn.Parameter(torch.full((), math.nan).expand(64, 80))
    placeholder.dsq_codes = Coded(held)
    for p in (plain, placeholder):
        train(LowBitAdam([p], 1e-3, weight_decay=decay), [p], 4)
    torch.testing.assert_close(held, plain.detach(), rtol=1e-5, atol=1e-6)
    assert len(set(placeholder.dsq_codes.seeds)) == 4
    assert placeholder.untyped_storage().nbytes() == 4


def test_double_precision_trains_too():
    ours = parameters(dtype=torch.float64)
    train(LowBitAdam(ours), ours, 2)
    assert all(p.isfinite().all() and p.dtype is torch.float64 for p in ours)


def test_states_of_other_parameters_are_refused():
    ours, others = parameters(), parameters(shapes=[(96, 64), *SHAPES[1:]])
    for flags in ({}, {"moment1": "float32", "moment2": "float32"}):
        optimizer = LowBitAdam(ours, **flags)
        train(optimizer, ours, 1)
        with pytest.raises(ValueError, match=r"state of parameter 0: exp_avg: got .*, expected"):
            LowBitAdam(others, **flags).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        LowBitAdam(ours[:2]).load_state_dict(optimizer.state_dict())
    momentum = torch.optim.SGD(ours, lr=0.1, momentum=0.9)
    train(momentum, ours, 1)
    with pytest.raises(ValueError, match="state of parameter 0: got momentum_buffer, expected step, exp_avg and"):
        LowBitAdam(ours).load_state_dict(momentum.state_dict())


def test_noise_is_a_function_of_seed_step_parameter_and_moment_alone():
    places = [(seed, step, index, which) for seed in (0, 1) for step in (1, 2) for index in (0, 1) for which in (0, 1)]
    assert len({noise_seed(*place) for place in places}) == 16
    assert all(0 <= noise_seed(*place) < 2**62 for place in places)
    ours = [parameters() for _ in range(2)]
    for replica, (p, count) in enumerate(zip(ours, (3, 5), strict=True)):
        torch.manual_seed(replica)
        optimizer = LowBitAdam(p, seed=1)
        for step in range(4):
            torch.rand(count)  # what a batch of another length draws
            train(optimizer, p, 1, first=step)
    assert_equal(*ours)
    other = parameters()
    train(LowBitAdam(other, seed=2), other, 4)
    assert not torch.equal(other[0], ours[0][0])


def test_a_copy_is_one():
    ours = parameters()
    optimizer = LowBitAdam(ours, seed=3)
    train(optimizer, ours, 2)
    ours, optimizer = copy.deepcopy((ours, optimizer))
    assert optimizer.param_groups[0]["seed"] == 3
    train(optimizer, ours, 2, first=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"moment1": "log8/row"}, "moment1: got log8/row, expected a format with negative values"),
        ({"moment1": "int8"}, "format: got 'int8', expected such as"),
        ({"moment2": "float16"}, "format: got 'float16', expected such as"),
        ({"rounding": "up"}, "rounding: got 'up', expected one of nearest, stochastic"),
        ({"residual": "m"}, "residual: got 'm', expected one of none, moment1"),
        ({"residual": "moment1", "betas": (0.0, 0.9)}, "residual: got moment1 with a beta1 of 0, expected a first"),
        ({"betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\), expected 0 or more, below 1"),
        ({"lr": -1.0}, "lr: got -1.0, expected 0 or more"),
        ({"eps": math.nan}, "eps: got nan, expected 0 or more"),
    ],
)
def test_what_is_no_format_or_rate_is_refused_of_all_parameters_or_a_group_s(flags, message):
    with pytest.raises(ValueError, match=message):
        LowBitAdam(parameters(), **flags)
    with pytest.raises(ValueError, match=message):
        LowBitAdam([{"params": parameters()} | flags])


@pytest.mark.parametrize("shape", [(80, 80), (8, 8)], ids=["held in low bits", "small"])
def test_backward_of_parameters_that_were_updated_since_is_refused(shape):
    p = torch.nn.Parameter(torch.full(shape, 2.0))
    y = (p * p).sum()
    p.grad = torch.ones(shape)
    LowBitAdam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_bytes_are_read_as_they_were_written():
    """One row of the published layout: a float32 scale, then the codes."""
    moments = Moments(parse("int8/row"), parse("log8/row"), "nearest")
    m, v = torch.full((64, 64), 0.5), torch.full((64, 64), 4.0)
    first, second = moments.encode(m, v)
    assert torch.equal(first, pack(m / 2, parse("int8/row")).data)
    assert second[:256].view(torch.float32).eq(4.0).all() and not second[256:].any()


def test_the_step_of_a_weight_of_codes_is_adam_s(monkeypatch):
    layer = CodedLinear.of(DSQLinear(80, 64, DSQContext(GemmConfig(FLOAT32))), parse("int8/row"))
    weight, grad = layer.coded.dequantize(), torch.randn(64, 80)
    given = []
    monkeypatch.setattr(CodedLinear, "subtract_", lambda self, step, seed: given.append((step.clone(), seed)))
    layer.weight.grad = grad
    LowBitAdam([layer.weight], lr=0.01, weight_decay=0.1, moment1="float32", moment2="float32").step()
    twin = torch.nn.Parameter(weight.clone())
    twin.grad = grad
    LowBitAdam([twin], lr=0.01, weight_decay=0.1, moment1="float32", moment2="float32").step()
    ((step, seed),) = given
    torch.testing.assert_close(weight - step, twin.detach(), rtol=1e-6, atol=1e-7)
    assert seed == noise_seed(0, 1, 0, 2)


def coded_weight(fmt="int4/row", seed=3):
    layer = DSQLinear(80, 64, DSQContext(GemmConfig(FLOAT32)))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 80, generator=torch.Generator().manual_seed(seed)))
    return CodedLinear.of(layer, parse(fmt))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_residual_gives_the_rounding_error_to_the_first_moment_as_published(decay):
    """m += (1 - b1^t) / lr * (1 - 1/b1) * (sqrt(v / (1 - b2^t)) + eps) * e, e the exact weight less the one held."""
    lr, (beta1, beta2), layer = 0.02, (0.9, 0.98), coded_weight()
    optimizer = LowBitAdam(
        [layer.weight], lr, (beta1, beta2), 0.0, decay, "float32", "float32", seed=4, residual="moment1"
    )
    m = v = torch.zeros(64, 80, dtype=torch.float64)
    scale = layer.weight_scale.double()
    for step in range(1, 6):
        before, grad = layer.coded.dequantize().double(), torch.randn(64, 80)
        layer.weight.grad = grad
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * grad.double(), beta2 * v + (1 - beta2) * grad.double() ** 2
        deviation = (v / (1 - beta2**step)).sqrt()
        exact = before - lr * (decay * before + m / (1 - beta1**step) / deviation)
        error = exact.clamp(-7 * scale, 7 * scale) - layer.coded.dequantize()
        m = m + (1 - beta1**step) / lr * (1 - 1 / beta1) * deviation * error
        held = optimizer.state[layer.weight]["exp_avg"]
        torch.testing.assert_close(held.double(), m, rtol=1e-3, atol=1e-4)


def test_what_rounding_left_undone_is_made_up_for_in_later_steps():
    """One gradient, then none: rms distance, in codes, of the weight from the one that float Adam would reach."""
    distance = {}
    for residual in ("moment1", "none"):
        layer, grad = coded_weight("int8/row"), torch.randn(64, 80, generator=torch.Generator().manual_seed(1))
        optimizer = LowBitAdam(
            [layer.weight], 0.01, (0.9, 0.9999), moment1="float32", moment2="float32", residual=residual
        )
        exact, m, v = layer.coded.dequantize().double(), torch.zeros(()), torch.zeros(())
        for step in range(1, 401):
            layer.weight.grad = grad if step == 1 else grad * 0
            optimizer.step()
            exact, m, v = reference_step(exact, m, v, layer.weight.grad.double(), 0.01, (0.9, 0.9999), 0, 0.0, step)
        inside = exact.abs() < 120 * layer.weight_scale
        off = ((layer.coded.dequantize() - exact) / layer.weight_scale)[inside]
        distance[residual] = float(off.square().mean().sqrt())
    assert distance["moment1"] < 0.6 < 1.4 < distance["none"]


def test_no_residual_is_taken_where_the_learning_rate_is_zero():
    layer = coded_weight()
    optimizer = LowBitAdam([layer.weight], 0.0, residual="moment1")
    layer.weight.grad = torch.randn(64, 80)
    optimizer.step()
    m, v = Moments(parse("int8/row"), parse("log8/row")).decode(*states(optimizer)[1:], layer.weight.shape)
    assert m.isfinite().all() and v.isfinite().all() and m.any()
