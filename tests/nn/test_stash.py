"""What is held for backward: the packed bytes, and no float copy beside them."""

from __future__ import annotations

import gc

import pytest
import torch
from nn.common import (
    BATCH,
    BFP_MIXED,
    FFN_DIM,
    SRC_LEN,
    TGT_LEN,
    context,
    held_bytes,
    loss_of,
    normal,
    saved_tensors,
    tiny_batch,
    tiny_transformer,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import UninitializedTensorMixin

from fairseq_dsq.formats import BlockFloat, FormatOptions, make_format
from fairseq_dsq.nn import (
    BOX_DIMS,
    FLOAT32,
    DSQContext,
    DSQLinear,
    GemmConfig,
    convert,
    linear,
    matmul,
)
from fairseq_dsq.plugin.attention import DSQMultiheadAttention
from fairseq_dsq.precision import PrecisionConfig

Q1, Q2 = BlockFloat(BFP_MIXED.q[1]), BlockFloat(BFP_MIXED.q[2])
STATIC = FormatOptions(fixed_scale="static")


def live_float_storages():
    """Addresses of the float memory that Python objects hold, autograd nodes among them."""
    gc.collect()
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.Tensor)
        and not isinstance(tensor, UninitializedTensorMixin)  # which other tests may leave, and which has no size
        and tensor.is_floating_point()
        and tensor.numel()
    }


def boxes_bytes(count, length, bits, box_size=16):
    """By hand: ``count`` fibres of ``length`` values in boxes of one exponent and their codes."""
    full, rest = divmod(length, box_size)
    box = 1 + box_size * bits // 8
    return count * (full * box + (1 + -(-rest * bits // 8) if rest else 0))


# A linear layer


@pytest.mark.parametrize("box_dim", BOX_DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("m", "k"), [(64, 32), (37, 21)])
def test_a_linear_layer_holds_the_packed_bytes_of_its_input(bits, m, k, box_dim):
    how = context(32, bits, 32, 32, box_dim=box_dim)
    layer = DSQLinear(k, 18, how)
    x = normal(m, k).requires_grad_() * 2
    with saved_tensors() as saved:
        y = layer(x)
    expected = boxes_bytes(k, m, bits) if box_dim == "reduction" else boxes_bytes(m, k, bits)
    assert held_bytes(saved, layer.parameters()) == {torch.uint8: expected}
    assert how.ledger.stash_bytes == expected
    assert y.requires_grad


def test_four_bits_keep_a_seventh_of_the_input():
    how = context(16, 4, 4, 16)
    layer = DSQLinear(512, 64, how)
    x = normal(1024, 512)
    with saved_tensors() as saved:
        layer(x)
    assert held_bytes(saved, layer.parameters()) == {torch.uint8: x.nbytes * 9 // 64}


@pytest.mark.parametrize(
    ("fmt", "options", "expected"),
    [
        ("fixed", FormatOptions(), 1 + -(-37 * 21 * 6 // 8)),
        ("fixed", STATIC, 1 + -(-37 * 21 * 6 // 8)),
        ("bfp", FormatOptions(sign_bit_extra=True), boxes_bytes(21, 37, 7)),
    ],
)
def test_other_formats_hold_their_own_bytes(fmt, options, expected):
    precision = PrecisionConfig((8, 6, 8, 8), fmt, options)
    how = DSQContext(GemmConfig(precision))
    layer = DSQLinear(21, 18, how)
    with saved_tensors() as saved:
        layer(normal(37, 21))
    assert held_bytes(saved, layer.parameters()) == {torch.uint8: expected}
    assert expected == make_format(fmt, 6, options).nbytes((37, 21), 0) == how.ledger.stash_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_holds_the_same_bytes(dtype):
    layer = DSQLinear(21, 18, context(*BFP_MIXED.q), dtype=dtype)
    with saved_tensors() as saved:
        layer(normal(37, 21, dtype=dtype))
    assert held_bytes(saved, layer.parameters()) == {torch.uint8: Q1.nbytes((37, 21), 0)}


def test_float32_holds_the_input_itself_and_not_a_copy():
    layer = DSQLinear(21, 18, context())
    x = normal(37, 21).requires_grad_() * 2
    with saved_tensors() as saved:
        layer(x)
    held = {tensor.untyped_storage().data_ptr() for tensor in saved}
    assert held == {x.untyped_storage().data_ptr(), layer.weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("frozen", ["weight", "everything"])
def test_a_frozen_weight_needs_no_stash(frozen):
    how = context(*BFP_MIXED.q)
    layer = DSQLinear(21, 18, how)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(frozen == "weight")
    x = normal(37, 21).requires_grad_()
    with saved_tensors() as saved:
        layer(x).sum().backward()
    assert held_bytes(saved, layer.parameters()) == {}
    assert how.ledger.stash_bytes == 0
    assert x.grad is not None and layer.weight.grad is None


# The floats are gone


def freed_after(function, *shapes, requires_grad=True):
    """Whether each input of ``function``, an op's output that the caller drops, is freed."""
    inputs = [normal(*shape).requires_grad_(requires_grad) * 2 for shape in shapes]
    storages = [StorageWeakRef(x.untyped_storage()) for x in inputs]
    output = function(*inputs)
    assert output.requires_grad
    del inputs
    gc.collect()
    return [storage.expired() for storage in storages]


LEVELS = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])


@LEVELS
@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_input_of_a_linear_layer_is_freed(rounding, requires_grad):
    layer = DSQLinear(21, 18, context(*BFP_MIXED.q, rounding=rounding))
    assert freed_after(layer, (2, 37, 21), requires_grad=requires_grad) == [True]


def test_the_operands_of_a_matmul_are_freed():
    how = GemmConfig(BFP_MIXED)
    assert freed_after(lambda a, b: matmul(a, b, how), (3, 37, 21), (3, 21, 18)) == [True, True]


def test_float_layers_do_keep_their_inputs():
    # What the two tests above look for can be seen.
    assert freed_after(nn.Linear(21, 18), (2, 37, 21)) == [False]
    assert freed_after(torch.bmm, (3, 37, 21), (3, 21, 18)) == [False, False]
    assert freed_after(DSQLinear(21, 18, context()), (2, 37, 21)) == [False]


def test_the_input_of_an_attention_is_freed():
    attention = DSQMultiheadAttention(24, 2, context(*BFP_MIXED.q), self_attention=True)
    assert freed_after(lambda x: attention(x, x, x)[0], (5, 3, 24)) == [True]


@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_no_python_object_holds_a_float_tensor(kind):
    """An attribute of the autograd node would escape autograd's own list of what is saved."""
    how = GemmConfig(BFP_MIXED)
    shapes = (3, 37, 21), (3, 21, 18), (18, 21), (18,)
    a, b, weight, bias = (normal(*shape).requires_grad_() for shape in shapes)
    before = live_float_storages()
    y = linear(a, weight, bias, how) if kind == "linear" else matmul(a, b, how)
    assert live_float_storages() - before == {y.untyped_storage().data_ptr()}


# Batched products and attention


@pytest.mark.parametrize("box_dim", BOX_DIMS)
def test_a_matmul_holds_both_operands_packed(box_dim):
    a, b = normal(3, 37, 21).requires_grad_(), normal(3, 21, 18).requires_grad_()
    with saved_tensors() as saved:
        matmul(a, b, GemmConfig(BFP_MIXED, box_dim=box_dim))
    q1, q2 = BFP_MIXED.q[1:3]
    first = boxes_bytes(3 * 21, 37, q1) if box_dim == "reduction" else boxes_bytes(3 * 37, 21, q1)
    assert held_bytes(saved) == {torch.uint8: first + boxes_bytes(3 * 21, 18, q2)}


@pytest.mark.parametrize(("needs_a", "needs_b"), [(True, False), (False, True)])
def test_a_matmul_holds_the_operand_that_a_gradient_needs(needs_a, needs_b):
    a, b = normal(3, 37, 21).requires_grad_(needs_a), normal(3, 21, 18).requires_grad_(needs_b)
    with saved_tensors() as saved:
        matmul(a, b, GemmConfig(BFP_MIXED))
    expected = Q2.nbytes(b.shape, 2) if needs_a else Q1.nbytes(a.shape, 1)
    assert held_bytes(saved) == {torch.uint8: expected}


def attention_bytes(tgt_len, src_len, batch, embed_dim, heads, inputs):
    """Stash of one attention whose projections read ``inputs`` (T, B, C), each once."""
    shape = batch * heads, embed_dim // heads
    stashes = [Q1.nbytes((length * batch, channels), 0) for length, channels in inputs]
    stashes.append(Q1.nbytes((shape[0], tgt_len, shape[1]), 1))  # q
    stashes.append(Q2.nbytes((shape[0], shape[1], src_len), 2))  # k transposed
    stashes.append(Q1.nbytes((shape[0], tgt_len, src_len), 1))  # probabilities
    stashes.append(Q2.nbytes((shape[0], src_len, shape[1]), 2))  # v
    stashes.append(Q1.nbytes((tgt_len * batch, embed_dim), 0))  # input of out_proj
    return sum(stashes)


@pytest.mark.parametrize("kind", ["self", "encoder-decoder", "general"])
def test_an_attention_holds_one_stash_per_input_and_float_probabilities(kind):
    tgt_len, src_len, batch, heads = 5, 19, 3, 2
    embed_dim, kdim, vdim = 24, 20, 12
    how = context(*BFP_MIXED.q)
    if kind == "self":
        src_len = tgt_len
        attention = DSQMultiheadAttention(embed_dim, heads, how, self_attention=True)
        query = key = value = normal(tgt_len, batch, embed_dim).requires_grad_()
        inputs = [(tgt_len, embed_dim)]
    else:
        cross = kind == "encoder-decoder"
        attention = DSQMultiheadAttention(
            embed_dim, heads, how, kdim, kdim if cross else vdim, encoder_decoder_attention=cross
        )
        query = normal(tgt_len, batch, embed_dim).requires_grad_()
        key = normal(src_len, batch, kdim).requires_grad_()
        value = key if cross else normal(src_len, batch, vdim).requires_grad_()
        inputs = [(tgt_len, embed_dim), (src_len, kdim)] + ([] if cross else [(src_len, vdim)])
    with saved_tensors() as saved:
        attention(query, key, value, need_weights=False)
    packed = attention_bytes(tgt_len, src_len, batch, embed_dim, heads, inputs)
    # Softmax stays float32: its result is what its gradient needs.
    softmax = 4 * batch * heads * tgt_len * src_len
    assert held_bytes(saved, attention.parameters()) == {
        torch.uint8: packed,
        torch.float32: softmax,
    }
    assert how.ledger.stash_bytes == packed


def test_projections_left_float_stash_apart():
    """A projection at another precision can neither use nor replace the packed bytes."""
    how = context(*BFP_MIXED.q)
    attention = DSQMultiheadAttention(24, 2, how, self_attention=True)
    attention.v_proj.context = how.float32()
    x = normal(5, 3, 24).requires_grad_() * 2
    with saved_tensors() as saved:
        attention(x, x, x, need_weights=False)
    packed = attention_bytes(5, 5, 3, 24, 2, [(5, 24)])
    assert held_bytes(saved, attention.parameters()) == {
        torch.uint8: packed,
        torch.float32: x.nbytes + 4 * 3 * 2 * 5 * 5,
    }
    assert how.ledger.stash_bytes == packed + x.nbytes


# A whole model


def test_a_transformers_packed_bytes_are_the_ledgers():
    how = context(*BFP_MIXED.q)
    model = convert(tiny_transformer(), how)
    with saved_tensors() as saved:
        loss_of(model, tiny_batch())
    held = held_bytes(saved, model.parameters())
    relu_bits = -(-SRC_LEN * BATCH * FFN_DIM // 8) + -(-TGT_LEN * BATCH * FFN_DIM // 8)
    assert held[torch.uint8] - relu_bits == how.ledger.stash_bytes > 0


def test_a_transformer_trades_floats_for_a_fraction_of_their_bytes():
    model = tiny_transformer()
    for module in model.modules():
        if hasattr(module, "_set_skip_embed_dim_check"):
            module._set_skip_embed_dim_check()  # the path of separate operations
    held = []
    for how in (None, context(*BFP_MIXED.q)):
        if how is not None:
            convert(model, how)
        with saved_tensors() as saved:
            loss_of(model, tiny_batch())
        held.append(held_bytes(saved, model.parameters()))
    floats, packed = held
    freed = floats[torch.float32] - packed[torch.float32]
    assert 0 < packed[torch.uint8] < freed / 3


def test_the_stash_is_freed_by_backward():
    layer = DSQLinear(21, 18, context(*BFP_MIXED.q))
    with saved_tensors() as saved:
        y = layer(normal(37, 21))
    packed = [tensor for tensor in saved if tensor.dtype == torch.uint8]
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in packed]
    saved.clear()
    del packed
    gc.collect()
    assert storages and not any(storage.expired() for storage in storages)
    y.sum().backward()
    gc.collect()
    assert all(storage.expired() for storage in storages)


def test_float32_context_packs_nothing():
    how = DSQContext(GemmConfig(FLOAT32))
    model = convert(tiny_transformer(), how)
    with saved_tensors() as saved:
        loss_of(model, tiny_batch())
    assert torch.uint8 not in held_bytes(saved)
