"""Multi-head attention whose four projections and two batched products are quantized."""

from __future__ import annotations

import uuid
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.functional import matmul
from fairseq_dsq.nn.linear import DSQLinear, forward_group
from fairseq_dsq.nn.saved import softmax

IncrementalState = dict[str, dict[str, Tensor | None]]


class _TakeRows(torch.autograd.Function):
    """``x[index]`` of a permutation, along the first of two dimensions; a gradient is taken by its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        inverse = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
        return grad.index_select(0, inverse), None


def _order(mask: Tensor) -> Tensor | None:
    """Each sentence's keys before its padding (B x S), of a mask B x S; None where they are so already.

    Only the CPU looks: to read another device's memory is to wait for it.
    """
    if mask.device.type == "cpu" and not (mask[:, :-1] & ~mask[:, 1:]).any():
        return None
    return mask.to(torch.uint8).argsort(dim=1, stable=True)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Keys or values B x heads x S x D with the positions of each sentence in its ``order`` (B x S), contiguous.

    Takes the place of the copy that makes a projection's output, S x B x C in memory, contiguous.
    """
    batch, heads, length, size = x.shape
    if x.is_contiguous():
        rows, strides = x.reshape(-1, size), (heads * length, length, 1)
    else:
        rows, strides = x.permute(2, 0, 1, 3).reshape(-1, size), (heads, 1, batch * heads)
    start = torch.arange(batch, device=x.device)[:, None] * strides[0]
    start = start + torch.arange(heads, device=x.device) * strides[1]
    index = start[:, :, None] + order[:, None] * strides[2]
    return _TakeRows.apply(rows, index.flatten()).view(x.shape)  # type: ignore[no-any-return]


def _extend(
    saved: dict[str, Tensor | None], k: Tensor | None, v: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """This step's k, v (B x heads x S x head_dim) and mask (B x S) after the saved ones."""
    prev_key, prev_value, prev_mask = (saved.get(name) for name in ("prev_key", "prev_value", "prev_key_padding_mask"))
    if prev_key is None or prev_value is None:
        return k, v, mask
    assert k is not None and v is not None
    new = k.shape[2]
    k, v = torch.cat([prev_key, k], dim=2), torch.cat([prev_value, v], dim=2)
    if prev_mask is not None or mask is not None:
        # A step without a mask has no padding.
        before = prev_mask if prev_mask is not None else k.new_zeros(len(k), k.shape[2] - new)
        now = mask if mask is not None else k.new_zeros(len(k), new)
        mask = torch.cat([before.bool(), now.bool()], dim=1)
    return k, v, mask


class DSQMultiheadAttention(nn.Module):
    """Attention with fairseq's ``MultiheadAttention`` interface, parameter names and incremental state.

    fairseq's own training path hands raw weights to ``F.multi_head_attention_forward``, so swapped projections would
    never be called; this module runs its own path. q, k and v projections of one input share one stash. Softmax and
    dropout compute in float32.

    The weighted sum runs over keys: no two keys' values share an exponent (:func:`matmul`'s ``apart``), so that no
    position sees a later one; and the weights' boxes, which lie along the keys, are counted from a sentence's own first
    key, padding coming last, so that no sentence sees what it is batched with.

    Args:
        embed_dim: C of queries and of the output.
        num_heads: heads; divides ``embed_dim``.
        context: the model's precision and ledger.
        kdim, vdim: C of keys and values; None takes ``embed_dim``.
        dropout: probability on attention weights, or a module that applies it.
        bias: give the projections a bias.
        self_attention: keys and values are the queries.
        encoder_decoder_attention: values are the keys.
    """

    products_are_quantized = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        context: DSQContext,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float | nn.Module = 0.0,
        bias: bool = True,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of embed_dim {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.self_attention = self_attention
        self.encoder_decoder_attention = encoder_decoder_attention
        self.context = context
        self.beam_size = 1
        self.dropout_module = dropout if isinstance(dropout, nn.Module) else nn.Dropout(dropout)
        self.k_proj = DSQLinear(kdim or embed_dim, embed_dim, context, bias)
        self.v_proj = DSQLinear(vdim or embed_dim, embed_dim, context, bias)
        self.q_proj = DSQLinear(embed_dim, embed_dim, context, bias)
        self.out_proj = DSQLinear(embed_dim, embed_dim, context, bias)
        self._state_key = f"{uuid.uuid4()}.attn_state"

    @classmethod
    def from_float(cls, module: Any, context: DSQContext) -> DSQMultiheadAttention:
        """The twin of a fairseq ``MultiheadAttention``, holding its very parameters.

        Raises:
            ValueError: an option that has no quantized path (bias_kv, zero_attn, xformers).
        """
        for option, unsupported in (
            ("add_bias_kv", module.bias_k is not None),
            ("add_zero_attn", module.add_zero_attn),
            ("xformers", module.use_xformers),
        ):
            if unsupported:
                raise ValueError(f"attention with {option} cannot be converted, expected it off")
        twin = cls(
            module.embed_dim,
            module.num_heads,
            context,
            module.kdim,
            module.vdim,
            module.dropout_module,
            self_attention=module.self_attention,
            encoder_decoder_attention=module.encoder_decoder_attention,
        )
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(twin, name, DSQLinear.from_float(getattr(module, name), context))
        return twin.train(module.training)

    def _project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scaled q, k and v; layers of one context on one input go together."""
        wanted = [(self.q_proj, query)]
        if key is not None and value is not None:
            wanted += [(self.k_proj, key), (self.v_proj, value)]
        outputs: dict[DSQLinear, Tensor] = {}
        for layer, x in wanted:
            if layer in outputs:
                continue
            group = [other for other, y in wanted if y is x and other.context is layer.context]
            outputs.update(zip(group, forward_group(x, group), strict=True))
        q = outputs[self.q_proj] * self.scaling
        return q, outputs.get(self.k_proj), outputs.get(self.v_proj)

    def _matmul(self, a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
        context = self.context if self.context.attention_matmul else self.context.float32()
        config = context.for_mode(self.training)
        return matmul(a, b, config, context.ledger, transpose_b, apart=not transpose_b)

    def _counts_keys(self, keys: int) -> bool:
        """Whether it matters which of so many keys is a sentence's first: the weights' boxes are shorter."""
        group = self.context.config.precision.operands("output")[0].group
        return self.context.attention_matmul and isinstance(group, int) and 1 < group < keys

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: T x B x C.
            key, value: S x B x C; None where the incremental state holds them.
            key_padding_mask: B x S, nonzero where a key is padding.
            incremental_state: fairseq's decoding state; holds the keys and values of earlier steps.
            need_weights: return the attention weights, averaged over heads.
            static_kv: keys and values do not change between steps (encoder-decoder attention).
            attn_mask: T x S, added to the scores.
            before_softmax: return the scores and v instead.
            need_head_weights: return the weights of each head.

        Returns:
            T x B x C, and the weights: B x T x S, heads x B x T x S with ``need_head_weights``, or None.
        """
        tgt_len, batch, _ = query.shape
        saved = self._get_input_buffer(incremental_state)
        if static_kv and "prev_key" in saved:
            key = value = None
        elif self.self_attention:
            key = value = query
        elif self.encoder_decoder_attention and key is not None:
            if self.beam_size > 1 and batch == key.shape[1]:
                # The hypotheses of a beam share their source: T x (B * beam) x C to T x B x C.
                key = key.unflatten(1, (-1, self.beam_size))[:, :, 0]
                if key_padding_mask is not None:
                    key_padding_mask = key_padding_mask.unflatten(0, (-1, self.beam_size))[:, 0]
            value = key
        q, k, v = self._project(query, key, value)
        # B x heads x S x head_dim
        k = None if k is None else k.unflatten(2, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)
        v = None if v is None else v.unflatten(2, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)
        if static_kv and "prev_key" in saved:
            k, v = saved["prev_key"], saved["prev_value"]
            key_padding_mask, order = saved["prev_key_padding_mask"], saved["key_order"]
        else:
            if not static_kv:
                k, v, key_padding_mask = _extend(saved, k, v, key_padding_mask)
            assert k is not None and v is not None
            # What further keys will be appended to stays as it came.
            buffer = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": key_padding_mask}
            order = None
            if key_padding_mask is not None and self._counts_keys(k.shape[2]) and not before_softmax:
                key_padding_mask = key_padding_mask.bool()
                order = _order(key_padding_mask)
            if order is not None and key_padding_mask is not None:
                k, v, key_padding_mask = _in_order(k, order), _in_order(v, order), key_padding_mask.gather(1, order)
            if static_kv:
                buffer = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": key_padding_mask, "key_order": order}
            if incremental_state is not None:
                self._set_input_buffer(incremental_state, buffer)
        assert k is not None and v is not None
        kv_batch, _, src_len, _ = k.shape

        # With shared sources the beam's queries are rows of one product: (B * heads) x (beam * T) x head_dim.
        beam = batch // max(1, kv_batch)
        q = q.view(tgt_len, kv_batch, beam, self.num_heads, self.head_dim).permute(1, 3, 2, 0, 4)
        rows = q.reshape(kv_batch * self.num_heads, beam * tgt_len, self.head_dim)
        scores = self._matmul(rows, k.flatten(0, 1), transpose_b=True)
        scores = scores.view(kv_batch, self.num_heads, beam, tgt_len, src_len)
        if attn_mask is not None:
            # T x S, or B x 1 x 1 x T x S with the keys in each sentence's order.
            scores = scores + (attn_mask if order is None else attn_mask[:, order].transpose(0, 1)[:, None, None])
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask.bool()[:, None, None, None], float("-inf"))
        if before_softmax:
            return scores.transpose(1, 2).reshape(-1, tgt_len, src_len), v.flatten(0, 1)
        weights = softmax(scores, self.context)
        probs = self.dropout_module(weights.to(scores.dtype))
        heads = self._matmul(probs.view(kv_batch * self.num_heads, beam * tgt_len, src_len), v.flatten(0, 1))
        heads = heads.view(kv_batch, self.num_heads, beam, tgt_len, self.head_dim)
        out: Tensor = self.out_proj(heads.permute(3, 0, 2, 1, 4).reshape(tgt_len, batch, self.embed_dim))
        if not (need_weights or need_head_weights):
            return out, None
        if order is not None:
            places = order[:, None, None, None].expand_as(weights)
            weights = weights.new_zeros(weights.shape).scatter(-1, places, weights)
        per_head = weights.permute(1, 0, 2, 3, 4).reshape(self.num_heads, batch, tgt_len, src_len)
        return out, per_head if need_head_weights else per_head.mean(0)

    def _get_input_buffer(self, incremental_state: IncrementalState | None) -> dict[str, Tensor | None]:
        return {} if incremental_state is None else incremental_state.get(self._state_key, {})

    def _set_input_buffer(self, incremental_state: IncrementalState, buffer: dict[str, Tensor | None]) -> None:
        incremental_state[self._state_key] = buffer

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Split the joint in_proj_weight and in_proj_bias of old fairseq checkpoints."""
        for kind in ("weight", "bias"):
            joint = state_dict.pop(f"{name}.in_proj_{kind}", None)
            if joint is not None:
                for projection, part in zip(("q_proj", "k_proj", "v_proj"), joint.chunk(3), strict=True):
                    state_dict[f"{name}.{projection}.{kind}"] = part

    def set_beam_size(self, beam_size: int) -> None:
        """Called by fairseq's generator: hypotheses that share one source sentence."""
        self.beam_size = beam_size

    def reorder_incremental_state(
        self, incremental_state: IncrementalState | None, new_order: Tensor
    ) -> IncrementalState | None:
        """Follow a beam search that reordered or dropped its hypotheses; ``new_order`` holds their old indices."""
        if incremental_state is None:
            return None
        buffer = self._get_input_buffer(incremental_state)
        for name, tensor in buffer.items():
            if tensor is None:
                continue
            order = new_order
            if self.encoder_decoder_attention and self.beam_size > 1:
                if len(tensor) * self.beam_size == len(new_order):
                    return incremental_state
                order = new_order.view(-1, self.beam_size)[:, 0] // self.beam_size
            buffer[name] = tensor.index_select(0, order)
        return incremental_state
