"""What operations other than GEMMs keep for backward under the stash scope ``all``."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.gelu import gelu, gelu_accurate
from fairseq.utils import relu_squared
from nn.common import (
    HEADS,
    context,
    difference,
    gradients_of,
    held_bytes,
    loss_of,
    normal,
    saved_tensors,
    seeded,
    tiny_batch,
    tiny_transformer,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_dsq.formats import BlockFloat
from fairseq_dsq.nn import DSQDropout, DSQLayerNorm, DSQRMSNorm, convert, log_softmax
from fairseq_dsq.nn.log_softmax import _LogProbabilities
from fairseq_dsq.nn.saved import VALUES_PER_PIECE, Activation, dropout, gated, softmax
from fairseq_dsq.quantized import fake_quantize

EIGHT = BlockFloat(8)
LEVEL = (4, 4, 4, 16)


def everything(*q, **options):
    """A context of the stash scope ``all``; without numbers float32."""
    how = context(*q, **options)
    how.stash_scope = "all"
    return how


def gradients(function, *inputs, seed=9):
    """Output, gradients of the inputs for a random gradient of the output, and what was saved."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    with saved_tensors() as saved:
        y = function(*inputs)
    grads = torch.autograd.grad(y, inputs, normal(*y.shape, seed=seed).to(y.dtype))
    return y.detach(), grads, held_bytes(saved, inputs)


# One operation at a time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["gemm", "all"])
def test_relu_keeps_a_bit_per_value_and_its_exact_gradient(scope, dtype):
    how = context(*LEVEL)
    how.stash_scope = scope
    x = normal(5, 37, dtype=dtype)
    x[1, 3:6] = torch.tensor([0.0, -0.0, torch.nan])
    y, (grad,), held = gradients(Activation(F.relu, how), x)
    expected, (expected_grad,), _ = gradients(F.relu, x)
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert grad.dtype == dtype and torch.equal(grad, expected_grad)
    assert held == {torch.uint8: -(-5 * 37 // 8)}


@pytest.mark.parametrize("function", [gelu, gelu_accurate, relu_squared, F.gelu, F.silu, torch.tanh])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 1000.0])
def test_other_activations_keep_eight_bits_of_their_derivative(function, scale):
    x = normal(64, 40) * scale
    y, (grad,), held = gradients(Activation(function, everything(*LEVEL)), x)
    expected, (float_grad,), _ = gradients(function, x)
    grad_y = normal(64, 40, seed=9)
    derivative = torch.autograd.functional.jvp(function, x, torch.ones_like(x))[1]
    assert torch.equal(y, expected)
    assert torch.equal(grad, fake_quantize(derivative, EIGHT) * grad_y)
    assert difference(grad, float_grad) < 0.01
    assert held == {torch.uint8: 64 * (2 * 17 + 9)}


@pytest.mark.parametrize("function", [gelu, gelu_accurate, relu_squared, F.gelu, F.silu, torch.tanh, torch.sigmoid])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [32, 37])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e4, -1e4])
def test_an_extreme_input_of_an_activation_changes_no_other_gradient(function, value, length, dtype):
    x = normal(6, length, dtype=dtype)
    x[1, 5] = x[2, -1] = x[4, 0] = value
    _, (grad,), _ = gradients(Activation(function, everything(*LEVEL)), x)
    _, (expected,), _ = gradients(function, x)
    others = x != value if value == value else ~x.isnan()
    assert torch.equal(grad.isfinite(), expected.isfinite())
    if function is relu_squared and value == 1e4:
        return  # its derivative is as large: the box's other values have its steps
    assert difference(grad[others], expected[others]) < 0.01
    finite = expected.isfinite()
    assert difference(grad[finite], expected[finite]) < 0.01


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 0), (2, 3, 5)], ids=str)
def test_tensors_of_any_shape(shape):
    how = everything(*LEVEL)
    layer = nn.LayerNorm(shape[-1:] or (1,))
    pairs = [
        (Activation(F.gelu, how), F.gelu),
        (Activation(F.relu, how), F.relu),
        (lambda x: softmax(x, how), lambda x: torch.softmax(x, -1)),
        (lambda x: log_softmax(x, how), lambda x: torch.log_softmax(x, -1)),
    ]
    if shape:
        pairs.append((DSQLayerNorm.from_float(layer, how), layer))
    for ours, plain in pairs:
        for x in (normal(*shape), normal(*shape, 2)[..., 0]):
            y, (grad,), _ = gradients(ours, x)
            expected, (expected_grad,), _ = gradients(plain, x)
            assert y.shape == x.shape and torch.equal(y, expected)
            assert torch.allclose(grad, expected_grad, atol=0.02)


@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_keeps_eight_bits_of_its_normalized_input(affine, mean):
    layer = nn.LayerNorm(40, elementwise_affine=affine)
    if affine:
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    twin = DSQLayerNorm.from_float(layer, everything(*LEVEL))
    assert twin.weight is layer.weight and twin.bias is layer.bias
    x = (3 * (normal(3, 64, 40) + mean)).requires_grad_()
    with saved_tensors() as saved:
        y = twin(x)
    assert held_bytes(saved, twin.parameters()) == {torch.uint8: 3 * 64 * (2 * 17 + 9), torch.float32: 4 * 3 * 64}
    expected, mean_of_rows, rstd = torch.native_layer_norm(x, (40,), layer.weight, layer.bias, layer.eps)
    assert torch.equal(y, expected)
    wanted = [x, *layer.parameters()]
    grad = normal(*y.shape, seed=4)
    actual = torch.autograd.grad(y, wanted, grad)
    of_float = torch.autograd.grad(expected, wanted, grad)
    for index, gradient in enumerate(actual):
        assert difference(gradient, of_float[index]) < 0.008
    assert difference(actual[0], of_float[0]) > 0
    if affine:
        kept = fake_quantize((x.detach() - mean_of_rows) * rstd, EIGHT)
        assert difference(actual[1], (grad * kept).sum((0, 1))) < 1e-5


def test_a_layer_norm_of_several_dimensions_and_many_rows():
    layer = nn.LayerNorm((24, 30))
    x = normal(2, VALUES_PER_PIECE // 720 + 3, 24, 30) + 5
    twin = DSQLayerNorm.from_float(layer, everything(*LEVEL))
    y, (grad,), held = gradients(twin, x)
    expected, (expected_grad,), _ = gradients(layer, x)
    assert torch.equal(y, expected) and difference(grad, expected_grad) < 0.01
    assert held[torch.uint8] == x.numel() // 16 * 17


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_layer_norms_row_that_is_not_finite_changes_no_other_row(value):
    layer = nn.LayerNorm(40, elementwise_affine=False)
    x = normal(5, 40)
    x[2, 7] = value
    _, (grad,), _ = gradients(DSQLayerNorm.from_float(layer, everything(*LEVEL)), x)
    _, (expected,), _ = gradients(layer, x)
    assert torch.equal(grad.isfinite(), expected.isfinite())
    assert difference(grad[[0, 1, 3, 4]], expected[[0, 1, 3, 4]]) < 0.01


def test_a_frozen_layer_norm_still_passes_the_gradient():
    twin = DSQLayerNorm.from_float(nn.LayerNorm(40).requires_grad_(False), everything(*LEVEL))
    _, (grad,), _ = gradients(twin, normal(7, 40))
    _, (expected,), _ = gradients(nn.LayerNorm(40), normal(7, 40))
    assert difference(grad, expected) < 0.01 and twin.weight.grad is None


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
def test_an_rms_norm_keeps_eight_bits_of_its_normalized_input(affine, eps):
    layer = nn.RMSNorm(40, eps, elementwise_affine=affine)
    if affine:
        nn.init.normal_(layer.weight)
    twin = DSQRMSNorm.from_float(layer, everything(*LEVEL))
    assert twin.weight is layer.weight
    x = (0.3 * (normal(3, 64, 40) + 1)).requires_grad_()
    with saved_tensors() as saved:
        y = twin(x)
    assert held_bytes(saved, twin.parameters()) == {torch.uint8: 3 * 64 * (2 * 17 + 9), torch.float32: 4 * 3 * 64}
    wanted = [x, *layer.parameters()]
    grad = normal(*y.shape, seed=4)
    actual = torch.autograd.grad(y, wanted, grad)
    plain = layer(x)
    assert torch.equal(y, plain)
    for ours, theirs in zip(actual, torch.autograd.grad(plain, wanted, grad), strict=True):
        assert 0 < difference(ours, theirs) < 0.008
    # In float64, of the normalized input that was kept.
    rstd = (x.detach().double().square().mean(-1, keepdim=True) + (layer.eps or torch.finfo(x.dtype).eps)).rsqrt()
    kept = fake_quantize((x.detach() * rstd).float(), EIGHT).double()
    scaled = grad * layer.weight if affine else grad
    assert difference(actual[0], (rstd * (scaled - kept * (scaled * kept).mean(-1, keepdim=True))).float()) < 1e-5
    if affine:
        assert difference(actual[1], (grad * kept).sum((0, 1)).float()) < 1e-5


def test_an_rms_norm_of_many_rows_one_of_which_is_not_finite():
    layer = nn.RMSNorm(40)
    x = normal(VALUES_PER_PIECE // 40 + 3, 40)
    x[2, 7] = math.inf
    y, (grad,), _ = gradients(DSQRMSNorm.from_float(layer, everything(*LEVEL)), x)
    expected, (expected_grad,), _ = gradients(layer, x)
    others = torch.arange(len(x)) != 2
    assert torch.equal(y[others], expected[others]) and torch.equal(grad.isfinite(), expected_grad.isfinite())
    assert difference(grad[others], expected_grad[others]) < 0.01


@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.sigmoid])
def test_a_gated_activation_keeps_eight_bits_of_its_two_derivatives(function):
    gate, up = normal(64, 40), normal(64, 40, seed=1)
    y, grads, held = gradients(lambda a, b: gated(function, a, b, everything(*LEVEL)), gate, up)
    expected, float_grads, _ = gradients(lambda a, b: function(a) * b, gate, up)
    assert torch.equal(y, expected)
    assert held == {torch.uint8: 2 * 64 * (2 * 17 + 9)}
    grad_y = normal(64, 40, seed=9)
    derivative = torch.autograd.functional.jvp(function, gate, torch.ones_like(gate))[1]
    assert torch.equal(grads[0], fake_quantize(derivative * up, EIGHT) * grad_y)
    assert torch.equal(grads[1], fake_quantize(function(gate), EIGHT) * grad_y)
    assert all(0 < difference(*pair) < 0.01 for pair in zip(grads, float_grads, strict=True))


def test_softmax_keeps_eight_bits_of_the_probabilities():
    how = everything(*LEVEL)
    x = normal(3, 20, 37) * 3
    x[:, :, 30:] = -math.inf
    y, (grad,), held = gradients(lambda x: softmax(x, how), x)
    expected, (float_grad,), _ = gradients(lambda x: torch.softmax(x, -1), x)
    assert torch.equal(y, expected)
    largest, place = y.max(-1, keepdim=True)
    kept = fake_quantize(y.scatter(-1, place, 0.0), EIGHT).scatter(-1, place, largest)
    kept /= kept.sum(-1, keepdim=True)
    grad_y = normal(3, 20, 37, seed=9)
    assert torch.allclose(grad, kept * (grad_y - (kept * grad_y).sum(-1, keepdim=True)), atol=1e-6)
    assert 0 < difference(grad, float_grad) < 0.01
    assert held == {torch.uint8: 60 * (2 * 17 + 6), torch.float32: 60 * 4, torch.int32: 60 * 4}


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_what_the_gradients_of_a_row_of_softmax_have_in_common_cancels(offset):
    scores = normal(30, 40).requires_grad_()
    grad = normal(30, 40, seed=1) + offset
    results = [
        torch.autograd.grad(y, scores, grad)[0]
        for y in (softmax(scores, everything(*LEVEL)), torch.softmax(scores.double(), -1))
    ]
    assert difference(*results) < 0.01


# The criterion's log-softmax


def nll(logits, target, how=None, ignore=1, smoothing=0.1):
    """fairseq's label-smoothed loss, of log_softmax or torch's own."""
    log_probs = F.log_softmax(logits, -1) if how is None else log_softmax(logits, how)
    log_probs = log_probs[:, 1:].contiguous().view(-1, log_probs.size(-1))
    target = target[:, 1:].reshape(-1, 1)
    picked = -log_probs.gather(dim=-1, index=target).masked_fill(target == ignore, 0.0)
    smooth = -log_probs.sum(dim=-1, keepdim=True).masked_fill(target == ignore, 0.0)
    loss = (1 - smoothing) * picked.sum() + smoothing / log_probs.size(-1) * smooth.sum()
    return loss, F.nll_loss(log_probs, target.flatten(), ignore_index=ignore, reduction="sum")


@pytest.mark.parametrize("which", [0, 1], ids=["label smoothing", "nll_loss"])
@pytest.mark.parametrize("confidence", [1.0, 4.0, 5.0], ids=["early", "confident", "sure"])
def test_a_criterion_keeps_eight_bits_of_the_probabilities(confidence, which):
    vocabulary = 1003
    assert 4 * 130 * vocabulary > 1.9 * VALUES_PER_PIECE
    target = torch.randint(0, vocabulary, (4, 130), generator=seeded(2))
    logits = normal(4, 130, vocabulary) + F.one_hot(target, vocabulary) * confidence**2
    losses, grads = [], []
    for how in (None, everything(*LEVEL)):
        x = logits.clone().requires_grad_()
        with saved_tensors() as saved:
            loss = nll(x, target, how)[which]
        grads.append(torch.autograd.grad(loss, x)[0])
        losses.append(loss)
    assert type(losses[1]) is torch.Tensor
    assert torch.allclose(*losses, rtol=1e-6)
    assert 0 < difference(grads[1], grads[0]) < 0.01
    held = held_bytes(saved)
    assert held.pop(torch.uint8) == 520 * (62 * 17 + 12)  # a box of 11 values at a row's end
    assert held.pop(torch.int32) == 520 * 4
    assert sum(held.values()) < 40 * 520  # the largest of each row, both losses' indices and masks


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"weight": torch.rand(21, generator=seeded(4))}, {"ignore_index": 0}],
    ids=str,
)
def test_nll_loss_of_log_probabilities_is_torchs(options):
    target = torch.randint(0, 21, (33,), generator=seeded(3))
    _, (grad,), _ = gradients(
        lambda x: F.nll_loss(log_softmax(x, everything(*LEVEL)), target, **options), normal(33, 21)
    )
    _, (expected,), _ = gradients(lambda x: F.nll_loss(F.log_softmax(x, -1), target, **options), normal(33, 21))
    assert difference(grad, expected) < 0.01
    value = F.nll_loss(F.log_softmax(normal(33, 21), -1), target, **options)
    x = normal(33, 21).requires_grad_()
    for dtype in (torch.int64, torch.uint8):
        assert torch.allclose(F.nll_loss(log_softmax(x, everything(*LEVEL)), target.to(dtype), **options), value)


def test_what_is_computed_from_log_probabilities_is_plain():
    y = log_softmax(normal(6, 21).requires_grad_(), everything(*LEVEL))
    assert isinstance(y, _LogProbabilities) and isinstance(y.view(2, 3, 21)[:, 1:], _LogProbabilities)
    for other in (y.sum(), y.argmax(1), y.exp(), y + 1, y.gather(1, torch.zeros(6, 1, dtype=torch.long)), y.detach()):
        assert type(other) is torch.Tensor
    assert type(log_softmax(normal(6, 21), everything(*LEVEL))) is torch.Tensor


TARGET = torch.randint(0, 21, (6,), generator=seeded(3))
INDEX = TARGET[:, None]
CALLS = {
    "gather by keyword": lambda y: torch.gather(input=y, dim=1, index=INDEX),
    "gather's index by keyword": lambda y: torch.gather(y, -1, index=INDEX),
    "gather, the method": lambda y: y.gather(index=INDEX, dim=-1),
    "gather along rows": lambda y: y.gather(0, torch.tensor([[0, 1, 5], [2, 2, 2]])),
    "gather nothing": lambda y: y.gather(1, INDEX[:, :0]),
    "gather of one row": lambda y: y[0].gather(-1, TARGET),
    "gather of a scalar": lambda y: y[0, 0].gather(0, torch.tensor(0)),
    "nll_loss by keyword": lambda y: F.nll_loss(input=y, target=TARGET, reduction="sum"),
    "nll_loss by position": lambda y: F.nll_loss(y, TARGET, None, None, 3, None, "sum"),
    "nll_loss, deprecated arguments": lambda y: F.nll_loss(y, TARGET, size_average=False),
    "nll_loss of one row": lambda y: F.nll_loss(y[0], TARGET[0]),
    "nll_loss of an image": lambda y: F.nll_loss(y.view(2, 3, 21).transpose(1, 2), TARGET.view(2, 3)),
    "NLLLoss": lambda y: nn.NLLLoss(reduction="none")(y, TARGET),
    "cross_entropy": lambda y: F.cross_entropy(y, TARGET, label_smoothing=0.1),
    "kl_div": lambda y: F.kl_div(y, torch.full((6, 21), 1 / 21), reduction="sum"),
    "index_select": lambda y: y.index_select(0, TARGET % 6),
    "index": lambda y: y[torch.arange(6), TARGET],
    "mask": lambda y: y[TARGET > 9],
    "take_along_dim": lambda y: torch.take_along_dim(y, INDEX, 1),
    "stack": lambda y: torch.stack([y, y.exp()]),
    "unbind": lambda y: y.unbind(0)[2],
    "masked_fill": lambda y: y.masked_fill(y < -3, 0.0),
    "half": lambda y: y.half().gather(1, INDEX),
    "double": lambda y: y.double().gather(1, INDEX).float(),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_log_probabilities_take_every_call_that_torchs_do(call):
    y, (grad,), _ = gradients(lambda x: call(log_softmax(x, everything(*LEVEL))), normal(6, 21))
    expected, (expected_grad,), _ = gradients(lambda x: call(torch.log_softmax(x, -1)), normal(6, 21))
    assert torch.equal(y, expected)
    assert difference(grad, expected_grad) < 0.01


@pytest.mark.parametrize(
    "call",
    [
        lambda y: F.nll_loss(y, TARGET[:4]),
        lambda y: F.nll_loss(y, torch.full((6,), 21)),
        lambda y: F.nll_loss(y, TARGET, reduction="all"),
        lambda y: F.nll_loss(y),
        lambda y: y.gather(1),
        lambda y: y.gather(2, INDEX),
        lambda y: torch.gather(y, 1, INDEX, INDEX),
        lambda y: y.gather(1, INDEX.float()),
    ],
)
def test_log_probabilities_refuse_what_torchs_do(call):
    y = torch.log_softmax(normal(6, 21), -1).requires_grad_()
    with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)):
        call(y)
    with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)):
        call(log_softmax(normal(6, 21).requires_grad_(), everything(*LEVEL)))


# Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropouts_gradient_has_the_mask_of_its_output(p):
    x = normal(65, 33).abs() + 1
    torch.manual_seed(3)
    with saved_tensors() as saved:
        y = dropout(x.requires_grad_(), p)
    assert held_bytes(saved) == {}
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, x * grad)
    share = (grad == 0).double().mean()
    assert abs(share - p) <= 4 * (p * (1 - p) / x.numel()) ** 0.5
    assert grad.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)] if p < 1 else [0.0])


def test_dropout_follows_torchs_seed():
    x = normal(65, 33)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("kind", [nn.Dropout, FairseqDropout])
def test_a_dropout_module_is_still_one(kind):
    twin = DSQDropout(kind(0.5), everything(*LEVEL))
    x = normal(20, 30)
    assert not torch.equal(twin(x), x)
    assert torch.equal(twin.eval()(x), x)
    twin.train().module.p = 0.0
    assert twin(x) is x or torch.equal(twin(x), x)


def test_fairseqs_dropout_may_be_kept_for_generation():
    twin = DSQDropout(FairseqDropout(0.5, "layer"), everything(*LEVEL)).eval()
    for module in twin.modules():
        if hasattr(module, "make_generation_fast_"):
            module.make_generation_fast_("layer", retain_dropout=True)
    assert not torch.equal(twin(normal(20, 30)), normal(20, 30))


# Whole models

DROPOUTS = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.1}


def converted(how, skip=(), **options):
    return convert(tiny_transformer(**options), how, skip)


def step(model, seed=5):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = loss_of(model, tiny_batch())
    loss.backward()
    return loss.detach(), gradients_of(model)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_transformers_gradients_stay_close_and_its_loss_the_same(activation):
    loss, grads = step(converted(context(*LEVEL), activation_fn=activation))
    same_loss, close = step(converted(everything(*LEVEL), activation_fn=activation))
    assert torch.equal(loss, same_loss)
    for name, grad in grads.items():
        if "k_proj.bias" not in name:  # zero but for rounding
            assert difference(close[name], grad) < 0.05, name
    assert any(not torch.equal(close[name], grad) for name, grad in grads.items())


def test_no_float_is_held_between_the_gemms():
    model = converted(everything(*LEVEL), **DROPOUTS)
    source, lengths, previous, _ = tiny_batch()
    with saved_tensors() as saved:
        logits, _ = model(source, lengths, previous)
    held = held_bytes(saved, model.parameters())
    src, tgt = source.numel(), previous.numel()
    norms = 4 * (2 * src + 3 * tgt)  # deviation
    largest = 4 * HEADS * tgt  # probability of each row, where the weights are wanted and scores are not computed twice
    masks = 4 * src + 4 * previous.shape[1] ** 2  # the encoder's padding, and the decoder's, which all layers share
    assert held[torch.float32] == norms + largest + masks
    assert model.decoder.layers[0].self_attn.context.ledger.stash_bytes < held[torch.uint8]
    assert logits.requires_grad


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_seed_repeats_a_step(rounding):
    model = converted(everything(*LEVEL, rounding=rounding), **DROPOUTS)
    loss, grads = step(model)
    again, same = step(model)
    other, _ = step(model, seed=6)
    assert torch.equal(loss, again) and not torch.equal(loss, other)
    assert all(torch.equal(same[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("activation", [F.relu, F.gelu], ids=["relu", "gelu"])
def test_checkpointing_changes_nothing(activation, reentrant):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24)
            self.dropout, self.activation_fn = nn.Dropout(0.3), activation

        def forward(self, x):
            return self.dropout(self.fc2(self.activation_fn(self.fc1(self.norm(x)))))

    def run(again):
        block = convert(Block(), everything(*LEVEL, rounding="stochastic"))
        x = normal(21, 24).requires_grad_()
        torch.manual_seed(2)
        y = checkpoint(block, x, use_reentrant=reentrant) if again else block(x)
        y.square().sum().backward()
        return [y, x.grad, *gradients_of(block).values()]

    for plain, repeated in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, repeated)


def test_checkpointed_layers_of_a_transformer_give_the_same_gradients():
    loss, grads = step(converted(everything(*LEVEL), **DROPOUTS))
    model = converted(everything(*LEVEL), checkpoint_activations=True, **DROPOUTS)
    again, same = step(model)
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        assert torch.allclose(same[name], grad, rtol=1e-4, atol=1e-6), name


def test_names_parameters_and_evaluation_are_the_float_models():
    model = tiny_transformer(**DROPOUTS)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    plain = convert(copy.deepcopy(model), context(*LEVEL)).eval()
    convert(model, everything(*LEVEL))
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    source, lengths, previous, _ = tiny_batch()
    with torch.no_grad(), saved_tensors() as saved:
        assert torch.equal(model.eval()(source, lengths, previous)[0], plain(source, lengths, previous)[0])
    assert not saved


def test_at_float32_everything_is_plain():
    floats, plain = tiny_transformer(**DROPOUTS), converted(everything(), **DROPOUTS)
    source, lengths, previous, _ = tiny_batch()
    held = []
    for model in (convert(floats, context()), plain):
        torch.manual_seed(0)
        with saved_tensors() as saved:
            y, _ = model(source, lengths, previous)
        held.append((y, held_bytes(saved, model.parameters())))
    assert torch.equal(held[0][0], held[1][0])
    assert held[0][1] == held[1][1] and torch.uint8 not in held[1][1]


def test_the_scope_follows_the_level_in_force():
    how = everything()
    norm = DSQLayerNorm.from_float(nn.LayerNorm(24), how)
    for levels, packed in ((context(*LEVEL), True), (context(), False)):
        how.set_precision(levels.config.precision)
        with saved_tensors() as saved:
            norm(normal(5, 24).requires_grad_())
        assert (torch.uint8 in held_bytes(saved)) == packed


def test_skipped_modules_stay_plain():
    model = converted(everything(*LEVEL), ["encoder.layers.0", "*.final_layer_norm"], **DROPOUTS)
    skipped, other = model.encoder.layers[0], model.decoder.layers[0]
    assert type(skipped.self_attn_layer_norm) is type(other.final_layer_norm) is nn.LayerNorm
    assert type(skipped.dropout_module) is type(skipped.self_attn.dropout_module) is FairseqDropout
    assert type(other.self_attn_layer_norm) is DSQLayerNorm
    assert type(other.dropout_module) is type(other.self_attn.dropout_module) is DSQDropout
    x = normal(5, 24).requires_grad_()
    with saved_tensors() as saved:
        skipped.activation_fn(x)
    assert held_bytes(saved) == {torch.float32: x.nbytes}


def test_only_what_is_known_is_replaced():
    class OwnNorm(nn.LayerNorm):
        pass

    def own(x):
        return x.clamp(min=0)

    layer = nn.Module()
    layer.fc1, layer.fc2, layer.activation_fn, layer.norm = nn.Linear(8, 8), nn.Linear(8, 8), own, OwnNorm(8)
    alone = nn.Module()
    alone.activation_fn = F.relu
    convert(nn.ModuleList([layer, alone]), everything(*LEVEL))
    assert layer.activation_fn is own and type(layer.norm) is OwnNorm and alone.activation_fn is F.relu


def test_converting_twice_changes_nothing_more():
    how = everything(*LEVEL)
    model = converted(how, **DROPOUTS)
    kinds = [type(module) for module in model.modules()]
    convert(model, how)
    assert [type(module) for module in model.modules()] == kinds


def test_a_copy_and_a_pickled_model_have_one_context_of_their_own():
    model = converted(everything(*LEVEL), **DROPOUTS)
    file = io.BytesIO()
    torch.save(model.encoder.layers, file)
    file.seek(0)
    for layers in (copy.deepcopy(model.encoder.layers), torch.load(file, weights_only=False)):
        layer = layers[0]
        own = layer.fc2.context
        assert own is not model.encoder.layers[0].fc2.context
        parts = layer.activation_fn, layer.final_layer_norm, layer.dropout_module, layer.self_attn.dropout_module
        assert all(part.context is own for part in parts)


def test_under_autocast_dtypes_are_those_of_torchs_operations():
    how = everything(*LEVEL)
    norm, twin = nn.LayerNorm(40), DSQLayerNorm.from_float(nn.LayerNorm(40), how)
    for ours, plain in ((twin, norm), (lambda x: softmax(x, how), lambda x: torch.softmax(x, -1, torch.float32))):
        x = normal(7, 40, dtype=torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = ours(x), plain(x)
        assert y.dtype == expected.dtype and torch.equal(y, expected)
        grads = [torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected)]
        assert grads[0].dtype == torch.bfloat16 and difference(*grads) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_modules_keep_their_dtype(dtype):
    how = everything(*LEVEL)
    norm, root = nn.LayerNorm(40).to(dtype), nn.RMSNorm(40).to(dtype)
    for plain, ours in (
        (norm, DSQLayerNorm.from_float(norm, how)),
        (root, DSQRMSNorm.from_float(root, how)),
        (F.gelu, Activation(F.gelu, how)),
        (gelu, Activation(gelu, how)),
    ):
        # What RMSNorm adds to the squares shows beside small values.
        for size in (1, 2.0**-7):
            y, (grad,), _ = gradients(ours, normal(16, 40, dtype=dtype) * size)
            expected, (expected_grad,), _ = gradients(plain, normal(16, 40, dtype=dtype) * size)
            assert y.dtype == grad.dtype == dtype and torch.equal(y, expected)
            assert difference(grad, expected_grad) < 0.02
