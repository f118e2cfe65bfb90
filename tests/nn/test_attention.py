"""DSQMultiheadAttention against fairseq's attention; its quantized GEMMs against plain formulas."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from fairseq.modules import MultiheadAttention
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.sequence_generator import SequenceGenerator
from nn.common import (
    BFP_MIXED,
    PROJECTIONS,
    Attend,
    config,
    context,
    dictionary,
    difference,
    normal,
    tiny_batch,
    tiny_transformer,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_dsq.ledger import Gemm
from fairseq_dsq.nn import (
    FLOAT32,
    DSQAttention,
    DSQContext,
    GemmConfig,
    LedgerKey,
    convert,
)
from fairseq_dsq.nn import attention as nn_attention
from fairseq_dsq.nn.attend import attend
from fairseq_dsq.nn.saved import DSQDropout
from fairseq_dsq.plugin.attention import DSQMultiheadAttention
from fairseq_dsq.precision import PrecisionConfig

EMBED_DIM, HEADS, BATCH = 24, 2, 6
TGT_LEN, SRC_LEN = 5, 7
# One attention over the source and the target's past.
CROSS_SELF = {"cross_self_attention": True, "no_cross_attention": True}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def float_attention(kind, fused=False, **options):
    """fairseq's attention with biases; ``fused`` runs F.multi_head_attention_forward."""
    options |= {
        "self": {"self_attention": True},
        "encoder-decoder": {"encoder_decoder_attention": True, "kdim": 20, "vdim": 20},
        "general": {"kdim": 20, "vdim": 12},
    }[kind]
    torch.manual_seed(0)
    attention = MultiheadAttention(EMBED_DIM, HEADS, **options)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    if not fused:
        attention._set_skip_embed_dim_check()
    return attention


def pair(kind, how=None, **options):
    """fairseq's attention and its twin, with parameters of their own."""
    attention = float_attention(kind, **options)
    return attention, convert(copy.deepcopy(attention), how or context())


def inputs_of(kind, tgt_len=TGT_LEN, src_len=SRC_LEN, batch=BATCH, dtype=torch.float32):
    """query, key and value as fairseq's layers pass them: equal ones are one object."""
    query = normal(tgt_len, batch, EMBED_DIM, seed=1, dtype=dtype)
    if kind == "self":
        return query, query, query
    key = normal(src_len, batch, 20, seed=2, dtype=dtype)
    value = key if kind == "encoder-decoder" else normal(src_len, batch, 12, seed=3, dtype=dtype)
    return query, key, value


def padding_mask(src_len, batch=BATCH):
    """batch x src_len; every second sentence ends in padding."""
    mask = torch.zeros(batch, src_len, dtype=torch.bool)
    mask[::2, -2:] = True
    return mask


def causal_mask(length):
    return torch.full((length, length), -math.inf).triu(1)


def step(attention, inputs, grad_seed=9, **options):
    """Output, weights and every gradient of one call on fresh leaves."""
    leaves = {}  # one leaf per distinct input
    for x in inputs:
        leaves.setdefault(id(x), x.clone().requires_grad_())
    attention.zero_grad()
    output, weights = attention(*(leaves[id(x)] for x in inputs), **options)
    output.backward(normal(*output.shape, seed=grad_seed).to(output.dtype))
    gradients = {name: parameter.grad for name, parameter in attention.named_parameters()}
    gradients |= {f"input {index}": leaf.grad for index, leaf in enumerate(leaves.values())}
    return output.detach(), None if weights is None else weights.detach(), gradients


def assert_same_step(actual, expected, **tolerance):
    tolerance = tolerance or TOLERANCE
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    if expected[1] is None:
        assert actual[1] is None
    else:
        torch.testing.assert_close(actual[1], expected[1], **tolerance)
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        scale = max(1.0, gradient.abs().max().item())
        wrong = (actual[2][name] - gradient).abs() > 1e-5 * (scale + gradient.abs())
        assert not wrong.any(), name


# float32 equals fairseq


KINDS = pytest.mark.parametrize("kind", ["self", "encoder-decoder", "general"])


@KINDS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_float32_equals_fairseq(kind, fused, mask_dtype, need_weights):
    attention, twin = pair(kind, fused=fused)
    inputs = inputs_of(kind)
    options = {"need_weights": need_weights}
    if mask_dtype is not None:
        options["key_padding_mask"] = padding_mask(len(inputs[1])).to(mask_dtype)
    expected = step(attention, inputs, **options)
    assert (expected[1] is not None) == need_weights
    assert_same_step(step(twin, inputs, **options), expected)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
def test_an_additive_mask(fused, padded):
    attention, twin = pair("self", fused=fused)
    inputs = inputs_of("self")
    options = {"attn_mask": causal_mask(TGT_LEN)}
    if padded:
        options["key_padding_mask"] = padding_mask(TGT_LEN)
    expected = step(attention, inputs, **options)
    assert_same_step(step(twin, inputs, **options), expected)
    assert (expected[1].triu(1) == 0).all()

    attention, twin = pair("general", fused=fused)
    inputs = inputs_of("general")
    options = {"attn_mask": normal(TGT_LEN, SRC_LEN, seed=5)}
    assert_same_step(step(twin, inputs, **options), step(attention, inputs, **options))


@pytest.mark.parametrize("how", ["fairseq", "own", "repeated"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_mask_of_bools_hides_where_it_is_true(how, padded, monkeypatch):
    repeated = []
    monkeypatch.setattr(nn_attention, "attend", lambda *given: repeated.append(1) or attend(*given))
    own = DSQContext(GemmConfig(PrecisionConfig((4, 4, 4, 16))), stash_scope="all" if how == "repeated" else "gemm")
    if how == "fairseq":
        _, twin = pair("self", own)
    else:
        torch.manual_seed(0)
        twin = DSQAttention(EMBED_DIM, HEADS, own, dropout=DSQDropout(nn.Dropout(0.0), own))
    length = 40  # where it takes less to compute scores again
    inputs, options = inputs_of("self", length), {"need_weights": how != "repeated"}
    if padded:
        options["key_padding_mask"] = padding_mask(length)
    hidden = step(twin, inputs, attn_mask=causal_mask(length) < 0, **options)
    added = step(twin, inputs, attn_mask=causal_mask(length), **options)
    assert_same_step(hidden, added, rtol=0, atol=0)
    assert len(repeated) == 2 * (how == "repeated")


@pytest.mark.parametrize("make", [MultiheadAttention, DSQAttention])
@pytest.mark.parametrize(
    "mask", [torch.zeros(TGT_LEN, TGT_LEN, dtype=torch.uint8), torch.zeros(BATCH * HEADS, TGT_LEN, TGT_LEN),
             torch.zeros(TGT_LEN, TGT_LEN + 1)], ids=["integers", "of a head", "a key more"],
)  # fmt: skip
def test_other_masks_are_refused(make, mask):
    twin = pair("self")[1] if make is MultiheadAttention else DSQAttention(EMBED_DIM, HEADS, context())
    expected = rf"attn_mask: got {mask.dtype} of shape \({', '.join(map(str, mask.shape))}\), expected T x S, \(5, 5\)"
    with pytest.raises(ValueError, match=expected):
        twin(*inputs_of("self"), attn_mask=mask)


@KINDS
def test_the_weights_of_each_head(kind):
    attention, twin = pair(kind)
    inputs = inputs_of(kind)
    options = {
        "need_head_weights": True,
        "need_weights": False,  # implied
        "key_padding_mask": padding_mask(len(inputs[1])),
    }
    expected = step(attention, inputs, **options)
    actual = step(twin, inputs, **options)
    assert actual[1].shape == (HEADS, BATCH, TGT_LEN, len(inputs[1]))
    assert_same_step(actual, expected)


@KINDS
def test_before_softmax(kind):
    attention, twin = pair(kind)
    inputs = inputs_of(kind)
    options = {"before_softmax": True, "key_padding_mask": padding_mask(len(inputs[1]))}
    if kind == "self":
        options["attn_mask"] = causal_mask(TGT_LEN)
    scores, values = attention(*inputs, **options)
    actual_scores, actual_values = twin(*inputs, **options)
    torch.testing.assert_close(actual_scores, scores, **TOLERANCE)
    torch.testing.assert_close(actual_values, values, **TOLERANCE)


def test_projections_without_bias():
    attention, twin = pair("self", bias=False)
    inputs = inputs_of("self")
    assert set(twin.state_dict()) == {f"{name}.weight" for name in PROJECTIONS}
    assert_same_step(step(twin, inputs), step(attention, inputs))


def test_one_head_and_many():
    for heads in (1, 4, EMBED_DIM):
        torch.manual_seed(0)
        attention = MultiheadAttention(EMBED_DIM, heads, self_attention=True)
        twin = convert(copy.deepcopy(attention), context())
        inputs = inputs_of("self")
        assert_same_step(step(twin, inputs), step(attention, inputs))


def test_no_grad_and_evaluation():
    attention, twin = pair("encoder-decoder")
    inputs, mask = inputs_of("encoder-decoder"), padding_mask(SRC_LEN)
    for module in (attention, twin):
        module.eval()
    with torch.no_grad():
        expected = attention(*inputs, key_padding_mask=mask)
        for _ in range(2):
            actual = twin(*inputs, key_padding_mask=mask)
            for result, reference in zip(actual, expected, strict=True):
                torch.testing.assert_close(result, reference, **TOLERANCE)


def test_a_fairseq_built_twin_and_a_built_one_are_alike():
    """The constructor's own options do what fairseq's do."""
    attention = float_attention("encoder-decoder")
    options = {"kdim": 20, "vdim": 20, "encoder_decoder_attention": True}
    built = DSQMultiheadAttention(EMBED_DIM, HEADS, context(), **options)
    built.load_state_dict(attention.state_dict())
    inputs = inputs_of("encoder-decoder")
    assert_same_step(step(built, inputs), step(attention, inputs))
    with pytest.raises(ValueError, match="num_heads: got 5, expected a divisor of embed_dim 24"):
        DSQMultiheadAttention(EMBED_DIM, 5, context())


def test_attention_without_fairseqs_interface_is_the_same():
    torch.manual_seed(0)
    plain = DSQAttention(EMBED_DIM, HEADS, context(), kdim=20, vdim=12)
    twin = DSQMultiheadAttention(EMBED_DIM, HEADS, context(), kdim=20, vdim=12)
    twin.load_state_dict(plain.state_dict())
    query, key, value = (torch.randn(length, BATCH, size) for length, size in ((5, EMBED_DIM), (7, 20), (7, 12)))
    options = {"key_padding_mask": torch.rand(BATCH, 7) > 0.7, "attn_mask": torch.randn(5, 7)}
    for own, others in zip(plain(query, key, value, **options), twin(query, key, value, **options), strict=True):
        assert torch.equal(own, others)


def test_old_checkpoints_load_as_into_fairseqs():
    """fairseq splits the in_proj_weight of old checkpoints, released RoBERTa models among them."""
    attention, twin = pair("self")
    state = attention.state_dict()
    order = ("q_proj", "k_proj", "v_proj")
    old = {"attention.out_proj." + name: state["out_proj." + name] for name in ("weight", "bias")}
    for name in ("weight", "bias"):
        old[f"attention.in_proj_{name}"] = torch.cat([state[f"{proj}.{name}"] for proj in order])
    ours = dict(old)
    attention.upgrade_state_dict_named(old, "attention")
    assert set(old) == {f"attention.{name}" for name in state}
    twin.upgrade_state_dict_named(ours, "attention")
    assert ours.keys() == old.keys()
    assert all(torch.equal(ours[name], old[name]) for name in old)


# Dropout on the attention weights


def uniform_attention(dropout, how=None):
    """Every value is 1 and every score equal: the output is the sum of the dropped-out weights."""
    attention = DSQMultiheadAttention(2, 1, how or context(), dropout=dropout)
    with torch.no_grad():
        for name in PROJECTIONS:
            projection = getattr(attention, name)
            projection.weight.zero_()
            projection.bias.zero_()
        attention.v_proj.bias.fill_(1)
        attention.out_proj.weight.copy_(torch.eye(2))
    return attention


@pytest.mark.parametrize("make", [float, FairseqDropout, nn.Dropout])
def test_dropout_is_unbiased_and_applied_in_training_only(make):
    p, keys, queries = 0.3, 400, 200
    attention = uniform_attention(make(p))
    query, key = torch.randn(queries, 4, 2), torch.randn(keys, 4, 2)
    torch.manual_seed(0)
    output, weights = attention(query, key, key)
    samples = output[..., 0].detach()
    # Each of the keys is kept with 1 - p and then weighs 1 / (keys * (1 - p)).
    deviation = math.sqrt(p / ((1 - p) * keys))
    assert abs(samples.mean() - 1) < 4 * deviation / math.sqrt(samples.numel())
    assert samples.std() == pytest.approx(deviation, rel=0.1)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / keys))  # before dropout
    output, _ = attention.eval()(query, key, key)
    torch.testing.assert_close(output, torch.ones_like(output))


def test_a_twin_keeps_fairseqs_dropout():
    attention, twin = pair("self", dropout=0.4)
    inputs = inputs_of("self")
    for training in (True, False):
        results = []
        for module in (attention, twin):
            module.train(training)
            torch.manual_seed(1)
            results.append(step(module, inputs))
        assert_same_step(results[1], results[0])
    # fairseq's --retain-dropout drops out in evaluation too.
    twin.dropout_module.make_generation_fast_("", retain_dropout=True)
    assert not torch.equal(twin(*inputs)[0], results[1][0])


# Incremental decoding


def decode(attention, queries, key_padding_mask=None, state=None):
    """One call of a decoder's self-attention per target position; mask: batch x tgt_len."""
    state = {} if state is None else state
    outputs = []
    for position, query in enumerate(queries):
        mask = None if key_padding_mask is None else key_padding_mask[:, position : position + 1]
        if mask is not None and not mask.any():
            mask = None  # fairseq passes a mask only where there is padding
        x = query[None]
        outputs.append(attention(x, x, x, mask, state, need_weights=False)[0])
    return torch.cat(outputs)


def left_padding(tgt_len):
    """batch x tgt_len: padding in the first steps of some sentences, none in others."""
    mask = torch.zeros(BATCH, tgt_len, dtype=torch.bool)
    mask[1, :2] = mask[4, :3] = True
    return mask


def middle_padding(tgt_len):
    """Padding enters after steps without any, and leaves again."""
    mask = torch.zeros(BATCH, tgt_len, dtype=torch.bool)
    mask[1, 2:4] = True
    return mask


@pytest.mark.parametrize("padding", [None, left_padding, middle_padding])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_decoding_step_by_step_equals_the_whole_and_fairseqs(padding, mode):
    attention, twin = (module.train(mode == "train") for module in pair("self"))
    queries = inputs_of("self")[0]
    mask = None if padding is None else padding(TGT_LEN)
    with torch.no_grad():
        actual = decode(twin, queries, mask)
        whole, _ = twin(queries, queries, queries, mask, attn_mask=causal_mask(TGT_LEN))
        expected = decode(attention, queries, mask)
    seen = torch.ones(TGT_LEN, BATCH, dtype=torch.bool)
    if mask is not None:
        # A row that sees nothing but padding is NaN in fairseq too.
        seen = (~mask).cumsum(1).t() > 0
        assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual[seen], whole[seen], **TOLERANCE)
    torch.testing.assert_close(actual[seen], expected[seen], **TOLERANCE)


def test_several_positions_at_once():
    # A prefix in one step, then single steps.
    attention, twin = pair("self")
    queries = inputs_of("self")[0]
    mask = left_padding(TGT_LEN)
    results = []
    for module in (attention, twin):
        state = {}
        outputs = []
        for start, end in ((0, 3), (3, 4), (4, 5)):
            part = queries[start:end]
            outputs.append(module(part, part, part, mask[:, start:end], state)[0])
        results.append(torch.cat(outputs))
    torch.testing.assert_close(results[1], results[0], equal_nan=True, **TOLERANCE)


def test_two_attentions_keep_their_states_apart():
    first, second = (convert(float_attention("self"), context()) for _ in range(2))
    queries = inputs_of("self")[0]
    alone = decode(second, queries)
    state = {}
    decode(first, queries, state=state)
    torch.testing.assert_close(decode(second, queries, state=state), alone, **TOLERANCE)
    assert len(state) == 2


def cross_steps(attention, queries, key, mask, beam_size, orders, need_head_weights=False):
    """Decoder steps of encoder-decoder attention; ``orders`` reorder hypotheses between them."""
    if beam_size > 1:
        attention.set_beam_size(beam_size)
    state, outputs = {}, []
    for query, order in itertools.zip_longest(queries, orders):
        output = attention(
            query[None], key, key, mask, state,
            static_kv=True, need_weights=True, need_head_weights=need_head_weights,
        )  # fmt: skip
        outputs.append(output)
        if order is not None:
            attention.reorder_incremental_state(state, order)
            # As fairseq's generator reorders what the encoder gave.
            key, mask = key.index_select(1, order), mask.index_select(0, order)
    return outputs


def test_a_training_pass_after_a_generator_s_is_as_before():
    """fairseq makes the generator of --eval-bleu before training, and with it tells attention of its beam."""
    _, twin = pair("encoder-decoder")
    inputs = inputs_of("encoder-decoder")
    expected = step(twin, inputs, static_kv=True)
    twin.set_beam_size(BATCH // 2)
    assert_same_step(step(twin, inputs, static_kv=True), expected, rtol=0, atol=0)
    twin.set_beam_size(BATCH - 1)
    assert_same_step(step(twin, inputs, static_kv=True), expected, rtol=0, atol=0)


def hypotheses(beam_size, sentences):
    """Queries, keys and padding of the hypotheses: those of one sentence share its source."""
    key = normal(SRC_LEN, sentences, 20, seed=2).repeat_interleave(beam_size, dim=1)
    mask = padding_mask(SRC_LEN, sentences).repeat_interleave(beam_size, dim=0)
    return key, mask


# Of each sentence's hypotheses; whole sentences finish in the last.
ORDERS_OF_3_BY_3 = [
    torch.tensor([0, 0, 1, 3, 5, 4, 8, 8, 8]),
    torch.tensor([2, 1, 0, 5, 5, 5, 6, 7, 8]),
    torch.tensor([0, 2, 1, 8, 6, 6]),
]


@pytest.mark.parametrize("need_head_weights", [True, False])
@pytest.mark.parametrize("beam_aware", [True, False], ids=["set_beam_size", "plain"])
def test_encoder_decoder_attention_follows_a_beam(beam_aware, need_head_weights):
    beam_size, sentences = 3, 3
    key, mask = hypotheses(beam_size, sentences)
    queries = [normal(count, EMBED_DIM, seed=30 + count) for count in (9, 9, 9, 6)]
    results = []
    with torch.no_grad():
        for module in pair("encoder-decoder"):
            results.append(
                cross_steps(
                    module, queries, key, mask, beam_size if beam_aware else 1, ORDERS_OF_3_BY_3,
                    need_head_weights,
                )
            )  # fmt: skip
        stateless = convert(float_attention("encoder-decoder"), context())
        for index, (expected, actual) in enumerate(zip(*results, strict=True)):
            for result, reference in zip(actual, expected, strict=True):
                torch.testing.assert_close(result, reference, **TOLERANCE)
            whole, _ = stateless(queries[index][None], key, key, mask)
            torch.testing.assert_close(actual[0], whole, **TOLERANCE)
            if index < len(ORDERS_OF_3_BY_3):
                order = ORDERS_OF_3_BY_3[index]
                key, mask = key.index_select(1, order), mask.index_select(0, order)


def test_a_beam_keeps_one_source_for_its_hypotheses():
    how = context(*BFP_MIXED.q)
    twin = convert(float_attention("encoder-decoder"), how).eval()
    key, mask = hypotheses(3, sentences=2)
    with torch.no_grad():
        cross_steps(twin, normal(1, 6, EMBED_DIM), key, mask, 3, [])
    head_dim = EMBED_DIM // HEADS
    assert how.ledger.gemms == {
        LedgerKey(Gemm("output", 6, EMBED_DIM, EMBED_DIM), BFP_MIXED, False): 2,  # q_proj, out_proj
        LedgerKey(Gemm("output", SRC_LEN * 2, 20, EMBED_DIM), BFP_MIXED, False): 2,  # k_proj, v_proj
        LedgerKey(Gemm("output", 3, head_dim, SRC_LEN, 2 * HEADS), BFP_MIXED, False): 1,
        LedgerKey(Gemm("output", 3, SRC_LEN, head_dim, 2 * HEADS), BFP_MIXED, False): 1,
    }


def test_self_attention_follows_a_reordered_beam():
    orders = [torch.tensor([0, 0, 1, 3, 5, 4]), torch.tensor([3, 3, 5])]
    queries = [normal(count, EMBED_DIM, seed=count) for count in (6, 6, 3)]
    results = []
    with torch.no_grad():
        for module in pair("self"):
            module.set_beam_size(3)
            state, outputs = {}, []
            for query, order in itertools.zip_longest(queries, orders):
                x = query[None]
                mask = padding_mask(1, len(query)) if len(outputs) == 0 else None
                outputs.append(module(x, x, x, mask, state)[0])
                if order is not None:
                    module.reorder_incremental_state(state, order)
            results.append(outputs)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, **TOLERANCE)


def test_reordering_without_a_state():
    twin = convert(float_attention("self"), context())
    assert twin.reorder_incremental_state(None, torch.tensor([0])) is None
    state = {}
    assert twin.reorder_incremental_state(state, torch.tensor([0])) == {}


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("beam_aware", [True, False], ids=["set_beam_size", "plain"])
@pytest.mark.parametrize("options", [{}, CROSS_SELF], ids=["encoder-decoder", "cross-self"])
def test_fairseqs_generator_finds_the_same_translations(beam, beam_aware, options):
    model = tiny_transformer(encoder_layers=2, decoder_layers=2, **options).eval()
    with torch.no_grad():
        # A model that is sure of its words and ends sentences at different steps: beams are
        # reordered and sentences leave the batch.
        rows = model.decoder.output_projection.weight
        rows.copy_(normal(*rows.shape, seed=4))
        rows[dictionary().eos()] = normal(EMBED_DIM, seed=44) * 1.3
    twin = convert(copy.deepcopy(model), context())
    source = tiny_batch()[0]
    source = torch.cat([source, source.flip(0) % 7 + 4])
    sample = {"net_input": {"src_tokens": source, "src_lengths": torch.full((len(source),), 7)}}
    found = []
    for translator in (model, twin):
        if beam_aware:  # the generator itself does so for a model that has the method: BART's
            translator.decoder.set_beam_size(beam)
        generator = SequenceGenerator([translator], dictionary(), beam_size=beam, max_len_b=12)
        found.append(generator.generate([translator], copy.deepcopy(sample)))
    lengths = set()
    for expected, actual in zip(*found, strict=True):
        assert len(actual) == len(expected) == beam
        for one, other in zip(actual, expected, strict=True):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            scores, reference = one["positional_scores"], other["positional_scores"]
            torch.testing.assert_close(scores, reference, **TOLERANCE)
            lengths.add(len(one["tokens"]))
    assert len(lengths) > 1


# Quantized products


GEMMS = ("q_proj", "k_proj", "v_proj", "scores", "values", "out_proj")


@KINDS
@pytest.mark.parametrize("box_dim", ["reduction", "last"])
@pytest.mark.parametrize("q", [(2, 2, 2, 16), (4, 3, 6, 8)], ids=str)
def test_all_six_gemms_follow_the_context(kind, box_dim, q):
    how = context(*q, box_dim=box_dim)
    twin = convert(float_attention(kind), how)
    # Lengths beyond one box, so that the products' boxes lie differently in each direction.
    inputs = inputs_of(kind, tgt_len=19, src_len=21, batch=3)
    mask = padding_mask(len(inputs[1]), 3)
    attn_mask = causal_mask(19) if kind == "self" else None
    plain = Attend(twin, dict.fromkeys(GEMMS, how.config), mask=mask, attn_mask=attn_mask)
    expected = step(plain, inputs)
    actual = step(twin, inputs, key_padding_mask=mask, attn_mask=attn_mask)
    assert difference(actual[0], expected[0]) < 1e-4
    assert difference(actual[1], expected[1]) < 1e-4
    assert actual[2].keys() == expected[2].keys()
    scale = max(gradient.norm() for gradient in expected[2].values())
    for name, gradient in expected[2].items():
        assert (actual[2][name] - gradient).norm() < 1e-4 * max(gradient.norm(), 0.01 * scale), name


def test_attention_matmul_off_leaves_the_products_float():
    how = DSQContext(config(2, 2, 2, 16), attention_matmul=False)
    twin = convert(float_attention("self"), how)
    inputs = inputs_of("self")
    exact = GemmConfig(FLOAT32)
    each = dict.fromkeys(GEMMS, how.config) | {"scores": exact, "values": exact}
    assert_same_step(step(twin, inputs), step(Attend(twin, each), inputs))
    counts = Counter()
    for key, count in how.ledger.gemms.items():
        counts[key.precision, key.gemm.batch > 1] += count
    assert counts == {(how.config.precision, False): 4 * 3, (FLOAT32, True): 2 * 3}


def test_stochastic_rounding_is_nearest_in_evaluation():
    how = context(3, 3, 3, 3, rounding="stochastic")
    twin = convert(float_attention("self"), how)
    inputs = inputs_of("self")
    nearest = convert(float_attention("self"), context(3, 3, 3, 3))(*inputs)[0]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            first, second = (twin.train()(*inputs)[0] for _ in range(2))
            assert not torch.equal(first, second)
            first, second = (twin.eval()(*inputs)[0] for _ in range(2))
            assert torch.equal(first, second)
            torch.testing.assert_close(first, nearest, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_half_precision(dtype, training):
    how = context(8, 8, 8, 8)
    full = convert(float_attention("self"), how)
    half = copy.deepcopy(full).to(dtype)
    mask = causal_mask(TGT_LEN)
    inputs = inputs_of("self", dtype=dtype)
    # float32 on the same rounded parameters and inputs
    full.load_state_dict(half.state_dict())
    expected = step(full, [inputs[0].float()] * 3, attn_mask=mask)
    half.train(training)
    actual = step(half, inputs, attn_mask=mask.to(dtype))
    assert actual[0].dtype == dtype
    assert {gradient.dtype for gradient in actual[2].values()} == {dtype}
    assert difference(actual[0], expected[0]) < 0.03
    for name, gradient in expected[2].items():
        if name != "k_proj.bias":  # zero but for rounding
            assert difference(actual[2][name], gradient) < 0.1, name
    with torch.no_grad():
        assert half.eval()(*inputs, attn_mask=mask.to(dtype))[0].dtype == dtype


def test_half_precision_as_fairseq_does_it():
    attention, twin = pair("self")
    attention.bfloat16(), twin.bfloat16()
    inputs = inputs_of("self", dtype=torch.bfloat16)
    mask = padding_mask(TGT_LEN)
    (expected, expected_weights), (actual, weights) = (
        module(*inputs, key_padding_mask=mask) for module in (attention, twin)
    )
    assert actual.dtype == expected.dtype and weights.dtype == expected_weights.dtype
    assert difference(actual, expected) < 0.01
    assert difference(weights, expected_weights) < 0.01


@pytest.mark.parametrize("kind", ["self", "encoder-decoder"])
@pytest.mark.parametrize("how", [None, (8, 8, 8, 8)], ids=["float32", "bfp"])
def test_autocast(kind, how):
    twin = convert(float_attention(kind), context(*(how or ())))
    inputs = inputs_of(kind)
    options = {"key_padding_mask": padding_mask(len(inputs[1]))}
    if kind == "self":
        options["attn_mask"] = causal_mask(TGT_LEN)
    expected = step(twin, inputs, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(twin, inputs, **options)
    assert actual[0].dtype == torch.bfloat16
    assert 0 < difference(actual[0], expected[0]) < 0.05
    for name, gradient in expected[2].items():
        assert actual[2][name].dtype == torch.float32
        if name != "k_proj.bias":
            assert difference(actual[2][name], gradient) < 0.2, name


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_checkpointing_with_dropout(rounding, use_reentrant):
    twin = convert(float_attention("self", dropout=0.3), context(*BFP_MIXED.q, rounding=rounding))
    x = inputs_of("self")[0]

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.twin = twin

        def forward(self, query, key, value):
            return checkpoint(lambda x: twin(x, x, x), query, use_reentrant=use_reentrant)

    results = []
    for module in (twin, Checkpointed()):
        torch.manual_seed(3)
        output, _, gradients = step(module, (x, x, x))
        results.append((output, list(gradients.values())))
    assert torch.equal(results[0][0], results[1][0])
    for expected, actual in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(actual, expected)


# The ledger


@KINDS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_an_attention_counts_its_gemms(kind, grad):
    how = context(*BFP_MIXED.q)
    twin = convert(float_attention(kind), how).train(grad)
    inputs = inputs_of(kind)
    query, key, value = (x.clone().requires_grad_(grad) for x in inputs)
    with torch.set_grad_enabled(grad):
        output, _ = twin(query, key, value)
    if grad:
        output.sum().backward()
    src_len, head_dim, batch = len(inputs[1]), EMBED_DIM // HEADS, BATCH * HEADS
    shapes = [
        (TGT_LEN * BATCH, EMBED_DIM, EMBED_DIM, 1),  # q_proj
        (src_len * BATCH, inputs[1].shape[2], EMBED_DIM, 1),  # k_proj
        (src_len * BATCH, inputs[2].shape[2], EMBED_DIM, 1),  # v_proj
        (TGT_LEN, head_dim, src_len, batch),  # scores
        (TGT_LEN, src_len, head_dim, batch),  # values
        (TGT_LEN * BATCH, EMBED_DIM, EMBED_DIM, 1),  # out_proj
    ]
    expected = Counter()
    for m, k, n, count in shapes:
        expected[LedgerKey(Gemm("output", m, k, n, count), BFP_MIXED, grad)] += 1
        if grad:
            expected[LedgerKey(Gemm("grad_input", m, n, k, count), BFP_MIXED, grad)] += 1
            expected[LedgerKey(Gemm("grad_weight", k, m, n, count), BFP_MIXED, grad)] += 1
    assert how.ledger.gemms == expected


# What has no quantized path


@pytest.mark.parametrize(
    ("option", "name"),
    [({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn")],
)
def test_options_without_a_quantized_path_are_refused(option, name):
    with pytest.raises(ValueError, match=f"attention with {name} cannot be converted"):
        DSQMultiheadAttention.from_float(float_attention("self", **option), context())
    model = nn.ModuleDict({"attention": float_attention("self", **option), "fc": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=f"^attention: attention with {name}"):
        convert(model, context())
    assert type(model["fc"]) is nn.Linear and type(model["attention"]) is MultiheadAttention


@pytest.mark.parametrize("sizes", [(0, 5, 2), (3, 0, 2), (3, 5, 0)], ids=["no queries", "no keys", "no sentences"])
def test_attention_of_nothing_is_torch_s(sizes):
    tgt_len, src_len, batch = sizes
    twin = convert(float_attention("encoder-decoder"), context())
    query, key, value = inputs_of("encoder-decoder", tgt_len=tgt_len, src_len=src_len, batch=batch)
    output, _ = twin(query.requires_grad_(), key, value)
    assert output.shape == query.shape
    output.sum().backward()
    assert not query.grad.isnan().any()
