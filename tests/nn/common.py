"""What the layers' tests share: float64 references, saved tensors, a tiny fairseq model."""

from __future__ import annotations

import argparse
import contextlib
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from kernels.common import seeded
from torch import Tensor, nn

from fairseq_dsq.formats import Float32, FormatOptions, make_format
from fairseq_dsq.gemm import Operand, Side, plan
from fairseq_dsq.nn import FLOAT32, DSQContext, GemmConfig
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.quantized import fake_quantize

# A format of its own for every operand, so that no two can be mixed up.
BFP_MIXED = PrecisionConfig((4, 3, 6, 8))
PRECISIONS = [
    PrecisionConfig((2, 2, 2, 16)),
    BFP_MIXED,
    PrecisionConfig((16, 9, 5, 2)),
    PrecisionConfig((6, 4, 8, 12), "fixed"),
    PrecisionConfig((8, 12, 6, 10), "fixed", FormatOptions(fixed_scale="static")),
    PrecisionConfig((2, 3, 4, 5), "bfp", FormatOptions(sign_bit_extra=True)),
    PrecisionConfig((2, 4, 5, 9), "bfp", FormatOptions(scale="fit")),
    FLOAT32,
]
BFP32 = PrecisionConfig((32, 32, 32, 32))


def one_coarse(index, bits=2):
    """Block floating point of 32 bits but for one q."""
    q = [32, 32, 32, 32]
    q[index] = bits
    return PrecisionConfig(tuple(q))


def config(*q, rounding="nearest", box_dim="reduction"):
    """A block floating point level."""
    return GemmConfig(PrecisionConfig(q), rounding, box_dim)


def context(*q, rounding="nearest", box_dim="reduction"):
    """A context of its own with a block floating point level; without numbers float32."""
    if not q:
        return DSQContext(GemmConfig(FLOAT32, rounding, box_dim))
    return DSQContext(config(*q, rounding=rounding, box_dim=box_dim))


def formats_of(precision):
    """The formats of q0 to q3."""
    return [make_format(precision.format_name, q, precision.options) for q in precision.q]


def operand(tensor, fmt, reduction=-1, along=True):
    """A rounded operand of a GEMM."""
    return Operand(tensor, Side(fmt, along), reduction)


def multiply(a, b, mode="auto", bias=None, add_to=None):
    """The planned product of two operands."""
    return plan(a.side, b.side, a.tensor.device, a.tensor.dtype, mode).multiply(a, b, bias, add_to)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def uneven(*shape, seed=0):
    """Rows and columns of different magnitude: along which of them a box lies matters."""
    generator = seeded(seed)
    x = torch.randn(shape, generator=generator)
    for dim in (-1, -2):
        size = [1] * len(shape)
        size[dim] = shape[dim]
        x = torch.ldexp(x, torch.randint(-3, 4, size, generator=generator))
    return x


# float64 references


class Product(NamedTuple):
    """A matrix product in float64, what its magnitudes add up to, and how many terms it has."""

    value: Tensor
    magnitude: Tensor
    terms: int


def product(a, b):
    a, b = a.double(), b.double()
    return Product(a @ b, a.abs() @ b.abs(), a.shape[-1])


def assert_product(actual, expected):
    """Equal up to the worst rounding errors of a float32 sum and of the result's own dtype."""
    assert actual.shape == expected.value.shape
    allowed = (expected.terms + 4) * 2.0**-24 * expected.magnitude
    allowed += torch.finfo(actual.dtype).eps * expected.value.abs()
    error = (actual.double() - expected.value).abs()
    excess = (error - allowed).max().item() if error.numel() else 0.0
    assert excess <= 0, f"off by up to {error.max():.3g}, {excess:.3g} more than rounding explains"


def quantizer(box_dim):
    """fq(x, fmt, dim): ``x`` with boxes along ``dim``, or along its last dimension, in float64."""

    def fq(x, fmt, dim):
        return fake_quantize(x, fmt, dim if box_dim == "reduction" else -1).double()

    return fq


def linear_reference(x, weight, bias, grad_output, config):
    """One training step of a linear layer (x: M x K, weight: N x K, grad_output: M x N)."""
    q0, q1, q2, q3 = formats_of(config.precision)
    fq = quantizer(config.box_dim)
    output = product(fq(x, q0, 1), fq(weight, q0, 1).t())
    if bias is not None:
        bias = bias.double()
        output = Product(output.value + bias, output.magnitude + bias.abs(), output.terms)
    grad_output64 = grad_output.double()
    return {
        "output": output,
        "grad_input": product(fq(grad_output, q3, 1), fq(weight, q2, 0)),
        "grad_weight": product(fq(grad_output, q3, 0).t(), fq(x, q1, 0)),
        "grad_bias": Product(grad_output64.sum(0), grad_output64.abs().sum(0), len(grad_output)),
    }


def matmul_reference(a, b, grad_output, config, transpose_b=False):
    """One training step of a @ b (a: batch x M x K, b: batch x K x N, or batch x N x K of which the transpose)."""
    q0, q1, q2, q3 = formats_of(config.precision)
    fq = quantizer(config.box_dim)
    if transpose_b:
        return {
            "output": product(fq(a, q0, 2), fq(b, q0, 2).mT),
            "grad_input": product(fq(grad_output, q3, 2), fq(b, q2, 1)),
            "grad_weight": product(fq(grad_output, q3, 1).mT, fq(a, q1, 1)),
        }
    return {
        "output": product(fq(a, q0, 2), fq(b, q0, 1)),
        "grad_input": product(fq(grad_output, q3, 2), fq(b, q2, 2).mT),
        "grad_weight": product(fq(a, q1, 1).mT, fq(grad_output, q3, 1)),
    }


def difference(actual, expected):
    """|actual - expected| relative to |expected|, as vectors; of two zeros, zero."""
    norm = expected.double().norm()
    gap = (actual.double() - expected.double()).norm()
    return (gap / norm).item() if norm else (math.inf if gap else 0.0)


# What autograd keeps


@contextlib.contextmanager
def saved_tensors():
    """The tensors that autograd saves inside, in order."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def held_bytes(saved, parameters=()):
    """dtype -> bytes of the distinct memory behind ``saved``, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    held = {}
    for tensor in saved:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            held[tensor.dtype] = held.get(tensor.dtype, 0) + storage.nbytes()
    return held


def tensors_of(value, found, seen=None):
    """Every tensor that is reachable from an object: the address of its storage -> bytes."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return found
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        tensors_of(value.grad, found, seen)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_of(item, found, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            tensors_of(item, found, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, DSQContext)):
        tensors_of(vars(value), found, seen)
    return found


# Attention out of single GEMMs


class PlainLinear(torch.autograd.Function):
    """``linear`` in plain formulas on plain tensors: nothing packed, everything kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, config):
        ctx.save_for_backward(x.flatten(0, -2), weight)
        ctx.config, ctx.shape = config, x.shape
        q0 = formats_of(config.precision)[0]
        return nn.functional.linear(fake_quantize(x, q0), fake_quantize(weight, q0), bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        _, q1, q2, q3 = formats_of(ctx.config.precision)
        dim = 0 if ctx.config.box_dim == "reduction" else -1
        grad_output = grad_output.flatten(0, -2)
        grad_input = fake_quantize(grad_output, q3) @ fake_quantize(weight, q2, dim)
        grad_weight = fake_quantize(grad_output, q3, dim).t() @ fake_quantize(x, q1, dim)
        return grad_input.view(ctx.shape), grad_weight, grad_output.sum(0), None


class PlainMatmul(torch.autograd.Function):
    """``matmul`` likewise; ``transpose_b`` multiplies by the transpose of what is stored."""

    @staticmethod
    def forward(ctx, a, b, config, transpose_b=False):
        ctx.save_for_backward(a, b)
        ctx.config, ctx.transpose_b = config, transpose_b
        q0 = formats_of(config.precision)[0]
        dim = 1 if config.box_dim == "reduction" else -1
        if transpose_b:
            return torch.bmm(fake_quantize(a, q0), fake_quantize(b, q0, 2).mT)
        return torch.bmm(fake_quantize(a, q0), fake_quantize(b, q0, dim))

    @staticmethod
    def backward(ctx, grad_output):
        a, b = ctx.saved_tensors
        _, q1, q2, q3 = formats_of(ctx.config.precision)
        dim = 1 if ctx.config.box_dim == "reduction" else -1
        b = fake_quantize(b, q2, dim).mT if ctx.transpose_b else fake_quantize(b, q2)
        grad_a = torch.bmm(fake_quantize(grad_output, q3), b.mT)
        grad_b = torch.bmm(fake_quantize(a, q1, dim).mT, fake_quantize(grad_output, q3, dim))
        return grad_a, grad_b.mT if ctx.transpose_b else grad_b, None, None


class PlainWeightedSum(PlainMatmul):
    """``matmul`` of attention's weights and values, rows apart: each sentence by itself, without its padding.

    ``keys``: (batch, S), False where a key is padding.
    """

    @staticmethod
    def forward(ctx, a, b, config, keys):
        ctx.save_for_backward(a, b)
        ctx.config, ctx.transpose_b = config, False
        q0 = formats_of(config.precision)[0]
        if q0.group == "tensor" or q0 == Float32():
            return torch.bmm(fake_quantize(a, q0), fake_quantize(b, q0))
        return torch.stack(
            [plain_weighted_sum(a[i][:, k], b[i][k], q0, config.value_boxes) for i, k in enumerate(keys)]
        )


def plain_weighted_sum(weights, values, fmt, value_boxes="row"):
    """fq(weights) @ fq(values): T x S @ S x D, as :meth:`fairseq_dsq.nn.functional._Quantizer.rows_apart` says."""
    if value_boxes == "feature":
        return fake_quantize(weights, fmt) @ fake_quantize(values, fmt)
    scale = torch.exp2(torch.floor(torch.log2(values.abs().amax(1).clamp(min=2.0**-126).double()))).float()
    codes = fake_quantize(values, fmt.by_row())
    return fake_quantize(weights * scale, fmt) @ (codes / scale[:, None])


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Attend(nn.Module):
    """An attention's parameters in calls of PlainLinear and PlainMatmul.

    ``how`` gives the configuration of each GEMM: those of the projections, "scores" and "values".
    """

    def __init__(self, attention, how, mask=None, attn_mask=None):
        super().__init__()
        for name in PROJECTIONS:
            self.add_module(name, getattr(attention, name))
        self.head_dim, self.num_heads = attention.head_dim, attention.num_heads
        self.how, self.mask, self.attn_mask = how, mask, attn_mask

    def project(self, name, x):
        layer = self.get_submodule(name)
        return PlainLinear.apply(x, layer.weight, layer.bias, self.how[name])

    def split(self, x):
        """T x B x C to (B * heads) x T x head_dim."""
        return x.reshape(len(x), -1, self.head_dim).transpose(0, 1)

    def forward(self, query, key, value):
        """The output, and the weights averaged over heads."""
        q = self.split(self.project("q_proj", query) * self.head_dim**-0.5)
        k, v = (self.split(self.project(*pair)) for pair in (("k_proj", key), ("v_proj", value)))
        scores = PlainMatmul.apply(q, k, self.how["scores"], True)
        if self.attn_mask is not None:
            scores = scores + self.attn_mask
        if self.mask is not None:
            masked = self.mask.repeat_interleave(self.num_heads, 0)[:, None]
            scores = scores.masked_fill(masked, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        keys = torch.ones(len(v), v.shape[1], dtype=torch.bool) if self.mask is None else ~masked[:, 0].bool()
        heads = PlainWeightedSum.apply(weights, v, self.how["values"], keys)
        batch = query.shape[1]
        output = self.project("out_proj", heads.transpose(0, 1).reshape(len(query), batch, -1))
        return output, weights.view(batch, -1, *weights.shape[1:]).mean(1)


# A fairseq model of few parameters

SYMBOLS = "abcdefghijklmnopq"
SRC_LEN, TGT_LEN, BATCH = 7, 5, 3
EMBED_DIM, FFN_DIM, HEADS = 24, 40, 2


def dictionary():
    words = Dictionary()
    for symbol in SYMBOLS:
        words.add_symbol(symbol)
    return words


def tiny_transformer(seed=0, **options):
    """fairseq's ``transformer`` in training mode; no dimension but the heads' is a power of two."""
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_embed_dim": EMBED_DIM,
        "encoder_ffn_embed_dim": FFN_DIM,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "dropout": 0.0,
    }
    args = argparse.Namespace(**{**sizes, **options})
    words = dictionary()
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
    torch.manual_seed(seed)
    model = TransformerModel.build_model(args, task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # fairseq starts at zero, which would hide a lost bias
    return model.train()


def tiny_batch(seed=0):
    """src_tokens, src_lengths, prev_output_tokens and target, with padding in source and target."""
    words = dictionary()
    generator = seeded(seed)

    def tokens(length):
        return torch.randint(words.nspecial, len(words), (BATCH, length), generator=generator)

    source, target = tokens(SRC_LEN), tokens(TGT_LEN)
    source[:, -1] = target[:, -1] = words.eos()
    source[1, :2] = words.pad()
    target[2, -2], target[2, -1] = words.eos(), words.pad()
    previous = target.roll(1, dims=1)
    previous[:, 0] = words.eos()
    return source, source.ne(words.pad()).sum(1), previous, target


def loss_of(model, batch):
    """Cross entropy per target token; calls the model as fairseq's criteria do."""
    source, lengths, previous, target = batch
    logits, _ = model(source, lengths, previous)
    scores = logits.transpose(1, 2).float()
    return torch.nn.functional.cross_entropy(scores, target, ignore_index=dictionary().pad())


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}
