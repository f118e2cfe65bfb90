"""Multi-head attention whose four projections and two batched products are quantized."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_dsq.nn.attend import Masks, attend, repeats_for_less
from fairseq_dsq.nn.context import DSQContext
from fairseq_dsq.nn.functional import autocast_device, matmul
from fairseq_dsq.nn.linear import DSQLinear, forward_group
from fairseq_dsq.nn.saved import DSQDropout, needs_gradient, softmax


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


def rotary_angles(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """What :func:`rotate` turns pairs of features by: position times ``base ** (-2 i / head_dim)`` for pair i.

    Args:
        positions: T x B.
        head_dim: D, even.

    Returns:
        Cosines and sines, 2 x T x B x 1 x D/2, float32.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, :, None, None].float() * base ** (-pair / head_dim)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): turns each head's pairs of features (i, i + D/2), in float32.

    Args:
        x: T x B x (heads * D).
        rotary: of :func:`rotary_angles`.
    """
    cos, sin = rotary
    first, second = x.float().unflatten(-1, (-1, 2 * rotary.shape[-1])).chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.flatten(2).to(x.dtype)


class DSQAttention(nn.Module):
    """Multi-head attention; the projections of one input share one stash. Softmax and dropout compute in float32.

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
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of embed_dim {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.context = context
        self.dropout_module = dropout if isinstance(dropout, nn.Module) else nn.Dropout(dropout)
        self.k_proj = DSQLinear(kdim or embed_dim, embed_dim, context, bias)
        self.v_proj = DSQLinear(vdim or embed_dim, embed_dim, context, bias)
        self.q_proj = DSQLinear(embed_dim, embed_dim, context, bias)
        self.out_proj = DSQLinear(embed_dim, embed_dim, context, bias)

    def _project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, rotary: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scaled q, k and v, q and k rotated; layers of one configuration on one input go together."""
        wanted = [(self.q_proj, query)]
        if key is not None and value is not None:
            wanted += [(self.k_proj, key), (self.v_proj, value)]
        outputs: dict[DSQLinear, Tensor] = {}
        for layer, x in wanted:
            if layer in outputs:
                continue
            group = [other for other, y in wanted if y is x and other.alike(layer)]
            outputs.update(zip(group, forward_group(x, group), strict=True))
        q, k = outputs[self.q_proj] * self.scaling, outputs.get(self.k_proj)
        if rotary is not None:
            q, k = rotate(q, rotary), None if k is None else rotate(k, rotary)
        return q, k, outputs.get(self.v_proj)

    def _matmul(self, a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
        context = self.context if self.context.attention_matmul else self.context.float32()
        config = context.for_mode(self.training)
        return matmul(a, b, config, context.ledger, transpose_b, apart=not transpose_b)

    def _score_of_padding(self, dtype: torch.dtype) -> float:
        """What hides a padded key."""
        return -math.inf

    def _counts_keys(self, keys: int) -> bool:
        """Whether it matters which of so many keys is a sentence's first: the weights' boxes are shorter."""
        group = self.context.config.precision.operands("output")[0].group
        return self.context.attention_matmul and isinstance(group, int) and 1 < group < keys

    def _split(self, x: Tensor | None) -> Tensor | None:
        """T x B x C to B x heads x T x head_dim."""
        return None if x is None else x.unflatten(2, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

    def _ordered(
        self, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """k, v and their mask with each sentence's padding last, and the order (B x S) where it is not as it was."""
        if key_padding_mask is None or not self._counts_keys(k.shape[2]):
            return k, v, key_padding_mask, None
        key_padding_mask = key_padding_mask.bool()
        order = _order(key_padding_mask)
        if order is None:
            return k, v, key_padding_mask, None
        return _in_order(k, order), _in_order(v, order), key_padding_mask.gather(1, order), order

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        need_weights: bool = True,
        need_head_weights: bool = False,
        rotary: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: T x B x C.
            key, value: S x B x C.
            key_padding_mask: B x S, nonzero where a key is padding.
            attn_mask: T x S: floats that are added to the scores, or bools, true where a key is hidden.
            need_weights: return the attention weights, averaged over heads.
            need_head_weights: return the weights of each head.
            rotary: of :func:`rotary_angles`; queries and keys, at the same positions, are rotated.

        Returns:
            T x B x C, and the weights: B x T x S, heads x B x T x S with ``need_head_weights``, or None.
        """
        q, k, v = self._project(query, key, value, rotary)
        k, v = self._split(k), self._split(v)
        assert k is not None and v is not None
        k, v, key_padding_mask, order = self._ordered(k, v, key_padding_mask)
        masks = Masks.of(attn_mask, key_padding_mask, order, q, k)
        return self._attend(q, k, v, masks, need_weights, need_head_weights)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, need_weights: bool, need_head_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The output and the weights of q T x (B * beam) x C and k, v B x heads x S x head_dim."""
        rows, shape = self._rows(q, k)
        p = self._dropped()
        if need_weights or need_head_weights or p is None or not self._repeats(rows, k, v, masks):
            scores = self._scores(rows, k, masks, shape)
            return self._weigh(scores, v, masks.order, need_weights, need_head_weights)
        arguments = shape, self._score_of_padding(rows.dtype), p
        config = self.context.for_mode(self.training)
        heads = attend(config, self.context.ledger, *arguments, rows, k.flatten(0, 1), v.flatten(0, 1), *masks)
        return self._project_heads(heads, shape), None

    def _dropped(self) -> float | None:
        """The probability of a weight to be dropped now; None where another module than ours decides."""
        module = self.dropout_module
        return module.probability if isinstance(module, DSQDropout) else None

    def _repeats(self, rows: Tensor, k: Tensor, v: Tensor, masks: Masks) -> bool:
        """Whether scores are computed again in the backward pass: where that keeps less."""
        if not (self.context.packs_everything and self.context.attention_matmul) or rows.numel() * k.numel() == 0:
            return False
        learnt = all(needs_gradient(x) for x in (rows, k, v)) and not needs_gradient(masks.additive)
        autocast = torch.is_autocast_enabled(autocast_device(rows))
        return learnt and not autocast and repeats_for_less(self.context.for_mode(self.training), rows, k.flatten(0, 1))

    def _rows(self, q: Tensor, k: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Queries as (B * heads) x (beam * T) x head_dim, and the scores' shape: B x heads x beam x T x S.

        With shared sources a beam's queries are rows of one product.
        """
        tgt_len, batch, _ = q.shape
        beam = batch // max(1, len(k))
        q = q.view(tgt_len, len(k), beam, self.num_heads, self.head_dim).permute(1, 3, 2, 0, 4)
        rows = q.reshape(len(k) * self.num_heads, beam * tgt_len, self.head_dim)
        return rows, (len(k), self.num_heads, beam, tgt_len, k.shape[2])

    def _scores(self, rows: Tensor, k: Tensor, masks: Masks, shape: tuple[int, ...]) -> Tensor:
        """Masked scores of ``shape``."""
        scores = self._matmul(rows, k.flatten(0, 1), transpose_b=True)
        return masks.apply(scores.view(shape), self._score_of_padding(scores.dtype))

    def _project_heads(self, heads: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The output, T x B x C, of what each head found."""
        kv_batch, _, beam, tgt_len, _ = shape
        heads = heads.view(kv_batch, self.num_heads, beam, tgt_len, self.head_dim).permute(3, 0, 2, 1, 4)
        out: Tensor = self.out_proj(heads.reshape(tgt_len, kv_batch * beam, self.embed_dim))
        return out

    def _weigh(
        self, scores: Tensor, v: Tensor, order: Tensor | None, need_weights: bool, need_head_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The output and the weights of scores B x heads x beam x T x S and v B x heads x S x head_dim."""
        kv_batch, _, beam, tgt_len, src_len = scores.shape
        weights = softmax(scores, self.context)
        probs = self.dropout_module(weights.to(scores.dtype))
        heads = self._matmul(probs.view(kv_batch * self.num_heads, beam * tgt_len, src_len), v.flatten(0, 1))
        out = self._project_heads(heads, scores.shape)
        if not (need_weights or need_head_weights):
            return out, None
        if order is not None:
            places = order[:, None, None, None].expand_as(weights)
            weights = weights.new_zeros(weights.shape).scatter(-1, places, weights)
        per_head = weights.permute(1, 0, 2, 3, 4).reshape(self.num_heads, kv_batch * beam, tgt_len, src_len)
        return out, per_head if need_head_weights else per_head.mean(0)
