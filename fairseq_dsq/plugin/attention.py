"""fairseq's attention on quantized GEMMs: its interface, its decoding state, its old checkpoints."""

from __future__ import annotations

import uuid
from typing import Any

import torch
from torch import Tensor

from fairseq_dsq.nn import DSQAttention, DSQContext, DSQLinear
from fairseq_dsq.nn.attend import Masks

IncrementalState = dict[str, dict[str, Tensor | None]]


def extend(
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


class DSQMultiheadAttention(DSQAttention):
    """Attention with fairseq's ``MultiheadAttention`` interface, parameter names and incremental state.

    fairseq's own training path hands raw weights to ``F.multi_head_attention_forward``, so swapped projections would
    never be called; this module runs its own path.

    Args:
        embed_dim, num_heads, context, options: as :class:`DSQAttention`.
        self_attention: keys and values are the queries.
        encoder_decoder_attention: values are the keys.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        context: DSQContext,
        *options: Any,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, context, *options, **more)
        self.self_attention = self_attention
        self.encoder_decoder_attention = encoder_decoder_attention
        self.beam_size = 1
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
        rotary: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: T x B x C.
            key, value: S x B x C; None where the incremental state holds them.
            key_padding_mask: B x S, nonzero where a key is padding.
            incremental_state: fairseq's decoding state; holds the keys and values of earlier steps.
            need_weights: return the attention weights, averaged over heads.
            static_kv: keys and values do not change between steps (encoder-decoder attention).
            attn_mask: T x S: floats that are added to the scores, or bools, true where a key is hidden.
            before_softmax: return the scores and v instead.
            need_head_weights: return the weights of each head.
            rotary: of :func:`fairseq_dsq.nn.attention.rotary_angles`, for the queries' positions; with self-attention.

        Returns:
            T x B x C, and the weights: B x T x S, heads x B x T x S with ``need_head_weights``, or None.
        """
        saved = self._get_input_buffer(incremental_state)
        if static_kv and "prev_key" in saved:
            key = value = None
        elif self.self_attention:
            key = value = query
        elif self.encoder_decoder_attention and key is not None:
            # Not where a model is trained between generations, as for --eval-bleu.
            if incremental_state is not None and self.beam_size > 1 and query.shape[1] == key.shape[1]:
                # The hypotheses of a beam share their source: T x (B * beam) x C to T x B x C.
                key = key.unflatten(1, (-1, self.beam_size))[:, :, 0]
                if key_padding_mask is not None:
                    key_padding_mask = key_padding_mask.unflatten(0, (-1, self.beam_size))[:, 0]
            value = key
        q, k, v = self._project(query, key, value, rotary)
        k, v = self._split(k), self._split(v)
        if static_kv and "prev_key" in saved:
            k, v = saved["prev_key"], saved["prev_value"]
            key_padding_mask, order = saved["prev_key_padding_mask"], saved["key_order"]
        else:
            if not static_kv:
                k, v, key_padding_mask = extend(saved, k, v, key_padding_mask)
            assert k is not None and v is not None
            # What further keys will be appended to stays as it came.
            buffer = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": key_padding_mask}
            order = None
            if not before_softmax:
                k, v, key_padding_mask, order = self._ordered(k, v, key_padding_mask)
            if static_kv:
                buffer = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": key_padding_mask, "key_order": order}
            if incremental_state is not None:
                self._set_input_buffer(incremental_state, buffer)
        assert k is not None and v is not None
        masks = Masks.of(attn_mask, key_padding_mask, order, q, k)
        if before_softmax:
            rows, shape = self._rows(q, k)
            scores = self._scores(rows, k, masks, shape)
            return scores.transpose(1, 2).reshape(-1, *scores.shape[3:]), v.flatten(0, 1)
        return self._attend(q, k, v, masks, need_weights, need_head_weights)

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
