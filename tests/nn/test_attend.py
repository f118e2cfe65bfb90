"""Attention that computes its scores twice: the same as attention that keeps them, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
from nn.common import normal, saved_tensors

from fairseq_dsq.formats import BlockFloat
from fairseq_dsq.nn import DSQAttention, DSQContext, GemmConfig
from fairseq_dsq.nn import attention as module
from fairseq_dsq.nn.saved import DSQDropout
from fairseq_dsq.precision import PrecisionConfig

T, S, B, HEADS, WIDTH = 24, 40, 2, 2, 32


def attention(scope, level=(4, 3, 3, 8), rounding="nearest", dropout=0.0, format_name="bfp"):
    context = DSQContext(GemmConfig(PrecisionConfig(level, format_name), rounding), stash_scope=scope)
    torch.manual_seed(0)
    return DSQAttention(WIDTH, HEADS, context, dropout=DSQDropout(torch.nn.Dropout(dropout), context))


def step(attend, inputs, seed=3, **options):
    """The output, the gradients of inputs and parameters, and what is saved."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    with saved_tensors() as saved:
        output, weights = attend(*leaves, need_weights=False, **options)
    assert weights is None
    attend.zero_grad()
    output.backward(normal(*output.shape, seed=9))
    return output.detach(), [leaf.grad for leaf in (*leaves, *attend.parameters())], saved


def inputs(tgt=T, src=S):
    return normal(tgt, B, WIDTH, seed=1), normal(src, B, WIDTH, seed=2), normal(src, B, WIDTH, seed=3)


def padding(where):
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1, : 7 if where == "left" else None] |= where == "left"
    mask[1, -7:] |= where == "right"
    return mask


MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.full((T, S), -torch.inf).triu(1)},
    "padding": {"key_padding_mask": padding("right")},
    "left padding, additive": {"key_padding_mask": padding("left"), "attn_mask": normal(T, S, seed=4)},
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_it_is_attention_whose_softmax_is_kept_in_float32_bit_for_bit(options, rounding):
    expected, twice = (attention(scope, rounding=rounding) for scope in ("gemm", "all"))
    output, grads, _ = step(expected, inputs(), **options)
    same, same_grads, _ = step(twice, inputs(), **options)
    assert torch.equal(same, output)
    for grad, other in zip(same_grads, grads, strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("format_name", ["fixed", "int8/row"])
def test_in_formats_with_other_groups(format_name):
    level = (format_name,) * 3 + ("bfp8",) if "/" in format_name else (4, 3, 3, 8)
    family = "bfp" if "/" in format_name else format_name
    expected, twice = (attention(scope, level, format_name=family) for scope in ("gemm", "all"))
    output, grads, _ = step(expected, inputs())
    same, same_grads, _ = step(twice, inputs())
    assert torch.equal(same, output)
    for grad, other in zip(same_grads, grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-6)


def test_dropout_draws_what_it_draws_where_scores_are_kept(monkeypatch):
    twice = attention("all", dropout=0.3)
    output, grads, _ = step(twice, inputs())
    monkeypatch.setattr(module, "repeats_for_less", lambda *_: False)
    kept, close, _ = step(twice, inputs())
    assert torch.equal(output, kept)
    names = ["query", "key", "value", *(name for name, _ in twice.named_parameters())]
    for name, grad, other in zip(names, grads, close, strict=True):  # softmax's gradient is of 8 bits there
        if name != "k_proj.bias":  # zero but for rounding
            assert (grad - other).norm() <= 0.15 * other.norm(), name
    assert not torch.equal(step(twice, inputs(), seed=4)[0], output)


def test_nothing_of_t_by_s_is_kept_where_that_takes_more():
    twice = attention("all")
    ledger = twice.context.ledger
    tgt, src, head = 64, 96, WIDTH // HEADS
    _, _, saved = step(twice, inputs(tgt, src))
    assert max(tensor.nbytes for tensor in saved) < HEADS * B * tgt * src * 3 // 8  # less than its stash, of three bits
    work = ledger.drain()
    outputs = [key.gemm for key, count in work.gemms.items() for _ in range(count) if key.gemm.kind == "output"]
    assert sorted(gemm.n for gemm in outputs if gemm.batch > 1) == [head, src, src]  # scores ran twice
    roles = {key.stash.role: key.stash.shape for key in work.stashes if len(key.stash.shape) == 3}
    assert roles["first operand"] == (HEADS * B, tgt, head) and roles["second operand"] == (HEADS * B, src, head)
    assert "input" in roles and roles["input"] == (HEADS * B, tgt, head)  # of q; of the weights there is none
    assert {BlockFloat(4).nbytes((HEADS * B, length, head)) for length in (tgt, src)} <= {t.nbytes for t in saved}

    short = attention("all", level=(16, 2, 2, 16))  # what is kept of these rows at 16 bits would take more
    step(short, inputs(4, 4))
    outputs = [key.gemm for key in short.context.ledger.drain().gemms if key.gemm.kind == "output"]
    assert sorted(gemm.n for gemm in outputs if gemm.batch > 1) == [4, head]


def test_weights_that_are_wanted_come_with_a_gradient():
    twice = attention("all")
    query, key, value = inputs()
    _, weights = twice(query.requires_grad_(), key, value, need_weights=True)
    weights.square().sum().backward()
    assert query.grad.abs().sum() > 0
