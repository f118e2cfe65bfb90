"""``llama``, a LLaMA-like language model (arXiv 2302.13971) for fairseq, and what makes its layers quantized.

RMSNorm before each block, rotary positions, SwiGLU and no biases. What it is made of is torch's and fairseq's; the twin
``llama_dsq`` comes of :func:`fairseq_dsq.plugin.twins.dsq_twin` as the others do.
"""

# fairseq and OmegaConf read the types of a configuration's fields: no annotation here may be a string.

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import (
    FairseqIncrementalDecoder,
    FairseqLanguageModel,
    register_model,
    register_model_architecture,
)
from fairseq.modules import FairseqDropout, MultiheadAttention
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from omegaconf import II
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_dsq.errors import flag_error
from fairseq_dsq.nn import DSQContext, DSQLinear, register_twin
from fairseq_dsq.nn.attention import rotary_angles, rotate
from fairseq_dsq.nn.linear import forward_group
from fairseq_dsq.nn.saved import gated
from fairseq_dsq.plugin.attention import DSQMultiheadAttention, IncrementalState, extend

INITIAL_DEVIATION = 0.02


@dataclass
class LlamaConfig(FairseqDataclass):
    """Flags of ``llama``; the names are those of fairseq's ``transformer_lm`` where that has them."""

    decoder_embed_dim: int = field(default=512, metadata={"help": "width C"})
    decoder_ffn_embed_dim: int = field(default=1376, metadata={"help": "width of SwiGLU"})
    decoder_layers: int = field(default=8, metadata={"help": "layers"})
    decoder_attention_heads: int = field(default=8, metadata={"help": "attention heads; each of an even width"})
    dropout: float = field(default=0.0, metadata={"help": "dropout of embeddings and of each block's output"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout of attention weights"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout between SwiGLU's projections"})
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "the output projection is the embedding"}
    )
    rotary_base: float = field(default=10000.0, metadata={"help": "base of the rotary positions' wavelengths"})
    rms_norm_eps: float = field(default=1e-6, metadata={"help": "epsilon of every RMSNorm"})
    checkpoint_activations: bool = field(default=False, metadata={"help": "compute layers again in backward"})
    offload_activations: bool = field(
        default=False, metadata={"help": "move what checkpointing keeps to the CPU (implies it)"}
    )
    tokens_per_sample: int = II("task.tokens_per_sample")
    max_target_positions: Optional[int] = II("task.max_target_positions")  # noqa: UP045 (OmegaConf knows no other)


def score_of_padding(dtype: torch.dtype) -> float:
    """What hides a padded key: finite, so that padding before a sentence, which sees padding alone, is no NaN."""
    return torch.finfo(dtype).min


class RotaryAttention(MultiheadAttention):
    """fairseq's causal self-attention with rotary positions; its parameters and its incremental state."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        *,
        rotary: Tensor,
    ) -> tuple[Tensor, None]:
        """As :meth:`DSQMultiheadAttention.forward` in float; ``query`` is the input, T x B x C; returns no weights."""
        heads = (self.num_heads, self.head_dim)
        q, k, v = (
            x.unflatten(2, heads).permute(1, 2, 0, 3)  # B x heads x T x D
            for x in (
                rotate(self.q_proj(query) * self.scaling, rotary),
                rotate(self.k_proj(query), rotary),
                self.v_proj(query),
            )
        )
        saved = self._get_input_buffer(incremental_state)
        k, v, key_padding_mask = extend(saved, k, v, key_padding_mask)
        assert k is not None and v is not None
        if incremental_state is not None:
            buffer = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": key_padding_mask}
            self._set_input_buffer(incremental_state, buffer)
        scores = q @ k.mT
        if attn_mask is not None:
            scores = scores + attn_mask
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask.bool()[:, None, None], score_of_padding(scores.dtype))
        probs = self.dropout_module(scores.softmax(-1, dtype=torch.float32).to(scores.dtype))
        return self.out_proj((probs @ v).permute(2, 0, 1, 3).flatten(2)), None


class DSQRotaryAttention(DSQMultiheadAttention):
    """:class:`RotaryAttention` on quantized GEMMs."""

    def _score_of_padding(self, dtype: torch.dtype) -> float:
        return score_of_padding(dtype)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202); the product computes in the input's precision.

    Args:
        dim: C of input and output.
        inner: width between the projections.
        dropout: probability on the product, or a module that applies it.
    """

    def __init__(self, dim: int, inner: int, dropout: float | nn.Module = 0.0) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.up_proj = nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)
        self.dropout_module = dropout if isinstance(dropout, nn.Module) else FairseqDropout(dropout, "SwiGLU")

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return self.down_proj(self.dropout_module(F.silu(self.gate_proj(x)) * self.up_proj(x)))  # type: ignore[no-any-return]


class DSQSwiGLU(nn.Module):
    """:class:`SwiGLU` on quantized GEMMs; gate and up share one stash, and what the product keeps is the context's."""

    products_are_quantized = True

    def __init__(self, module: SwiGLU, context: DSQContext) -> None:
        super().__init__()
        self.gate_proj = DSQLinear.from_float(module.gate_proj, context)
        self.up_proj = DSQLinear.from_float(module.up_proj, context)
        self.down_proj = DSQLinear.from_float(module.down_proj, context)
        self.dropout_module = module.dropout_module
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if self.gate_proj.context is self.up_proj.context:
            gate, up = forward_group(x, [self.gate_proj, self.up_proj])
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.dropout_module(gated(F.silu, gate, up, self.down_proj.context)))  # type: ignore[no-any-return]


register_twin(RotaryAttention, DSQRotaryAttention.from_float)
register_twin(SwiGLU, DSQSwiGLU)


class LlamaLayer(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and beside a residual connection."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        dim, eps = args.decoder_embed_dim, args.rms_norm_eps
        self.self_attn_layer_norm = nn.RMSNorm(dim, eps)
        self.self_attn = RotaryAttention(
            dim, args.decoder_attention_heads, dropout=args.attention_dropout, bias=False, self_attention=True
        )
        self.final_layer_norm = nn.RMSNorm(dim, eps)
        self.ffn = SwiGLU(dim, args.decoder_ffn_embed_dim, args.activation_dropout)
        self.dropout_module = FairseqDropout(args.dropout, "LlamaLayer")

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
    ) -> Tensor:
        """T x B x C to T x B x C; arguments as :meth:`DSQMultiheadAttention.forward`'s."""
        attended, _ = self.self_attn(
            *[self.self_attn_layer_norm(x)] * 3, key_padding_mask, incremental_state, need_weights=False,
            attn_mask=attn_mask, rotary=rotary,
        )  # fmt: skip
        x = x + self.dropout_module(attended)
        return x + self.dropout_module(self.ffn(self.final_layer_norm(x)))  # type: ignore[no-any-return]


class LlamaDecoder(FairseqIncrementalDecoder):
    """Embedding, :class:`LlamaLayer` s, RMSNorm and the projection to the vocabulary."""

    def __init__(self, args: Any, dictionary: Any) -> None:
        super().__init__(dictionary)
        self.padding_idx = dictionary.pad()
        self.max_target_positions = args.max_target_positions
        self.head_dim = args.decoder_embed_dim // args.decoder_attention_heads
        self.rotary_base = args.rotary_base
        self.embed_tokens = nn.Embedding(len(dictionary), args.decoder_embed_dim, self.padding_idx)
        self.dropout_module = FairseqDropout(args.dropout, "LlamaDecoder")
        layers = [LlamaLayer(args) for _ in range(args.decoder_layers)]
        if args.checkpoint_activations or args.offload_activations:
            layers = [checkpoint_wrapper(layer, offload_to_cpu=args.offload_activations) for layer in layers]
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.RMSNorm(args.decoder_embed_dim, args.rms_norm_eps)
        self.output_projection = nn.Linear(args.decoder_embed_dim, len(dictionary), bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.embed_tokens.weight[self.padding_idx])
        if args.share_decoder_input_output_embed:
            self.output_projection.weight = self.embed_tokens.weight

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: IncrementalState | None = None,
        features_only: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits.

        Args:
            prev_output_tokens: B x T, all so far, padded on either side.
            incremental_state: fairseq's decoding state: the last token alone is computed.
            features_only: return what the output projection would get.
            unused: what fairseq hands to decoders of other kinds.

        Returns:
            B x T x vocabulary, or x C; and ``inner_states``, T x B x C of the embedding and each layer.
        """
        padding = prev_output_tokens.eq(self.padding_idx)
        # Counted from a sentence's own first token, so that it does not matter which side its padding is on.
        positions = ((~padding).cumsum(1) - 1).clamp_(min=0)
        attn_mask = None
        if incremental_state is not None:
            prev_output_tokens, positions, padding = (x[:, -1:] for x in (prev_output_tokens, positions, padding))
        x = self.dropout_module(self.embed_tokens(prev_output_tokens)).transpose(0, 1)
        if incremental_state is None:
            length = len(x)
            attn_mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        rotary = rotary_angles(positions.t(), self.head_dim, self.rotary_base)
        key_padding_mask = padding if padding.any() else None
        inner_states = [x]
        for layer in self.layers:
            x = layer(x, rotary, attn_mask, key_padding_mask, incremental_state)
            inner_states.append(x)
        x = self.layer_norm(x).transpose(0, 1)
        return x if features_only else self.output_layer(x), {"attn": [None], "inner_states": inner_states}

    def extract_features(self, prev_output_tokens: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """As :meth:`forward` with ``features_only``."""
        return self.forward(prev_output_tokens, *args, **{**kwargs, "features_only": True})

    def output_layer(self, features: Tensor, **unused: Any) -> Tensor:
        """(..., C) to (..., vocabulary)."""
        return self.output_projection(features)  # type: ignore[no-any-return]

    def max_positions(self) -> int:
        """Tokens of the longest sample."""
        return int(self.max_target_positions)


@register_model("llama", dataclass=LlamaConfig)
class LlamaModel(FairseqLanguageModel):
    """A LLaMA-like language model."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        """The model that the flags ask for.

        Raises:
            DSQError: widths that do not fit; names the flag.
        """
        dim, heads = args.decoder_embed_dim, args.decoder_attention_heads
        if heads < 1 or dim % heads or dim // heads % 2:
            flag_error(
                "--decoder-attention-heads",
                f"got {heads}, expected a divisor of --decoder-embed-dim {dim} that leaves each head an even width",
            )
        if args.max_target_positions is None:
            args.max_target_positions = args.tokens_per_sample
        return cls(LlamaDecoder(args, task.target_dictionary))


def _shape(name: str, dim: int, ffn: int, layers: int, heads: int) -> None:
    shape = {
        "decoder_embed_dim": dim,
        "decoder_ffn_embed_dim": ffn,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
    }

    @register_model_architecture("llama", name)
    def set_shape(args: Any) -> None:
        for flag, value in shape.items():
            setattr(args, flag, getattr(args, flag, value))


# Shapes of arXiv 2307.05695 and 2403.03507 below a billion parameters (with 32,000 words), and LLaMA's smallest.
_shape("llama_60m", 512, 1376, 8, 8)
_shape("llama_130m", 768, 2048, 12, 12)
_shape("llama_350m", 1024, 2736, 24, 16)
_shape("llama_1b", 2048, 5461, 24, 32)
_shape("llama_7b", 4096, 11008, 32, 32)
