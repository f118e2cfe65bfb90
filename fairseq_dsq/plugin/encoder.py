"""What ``roberta_dsq`` has beyond fairseq's RoBERTa: BERT's token types and epsilon, and heads from its pooler."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models.transformer import TransformerEncoder
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import Tensor, nn

from fairseq_dsq.errors import flag_error
from fairseq_dsq.plugin.checkpoints import Shape, shape_to_str
from fairseq_dsq.plugin.config import DSQEncoderConfig
from fairseq_dsq.plugin.twins import HEADS, HeadsMixin

# The head of a checkpoint that holds BERT's pooler (dense, tanh). It has no classes; fairseq's own roberta drops it.
POOLER = "pooler"


def token_types(tokens: Tensor, separator: int) -> Tensor:
    """BERT's token types (arXiv 1810.04805): 0 up to and with the first ``separator``, 1 for what stands after it.

    Args:
        tokens: B x T.
        separator: ``</s>`` in the dictionary.

    Returns:
        B x T, int64.
    """
    separators = tokens.eq(separator)
    return (separators.cumsum(1) - separators.long()).clamp(max=1)


class TokenTypeEncoder(TransformerEncoder):
    """fairseq's encoder with token type (segment) embeddings, which follow from the tokens; made by :meth:`extend`."""

    embed_token_types: nn.Embedding

    @classmethod
    def extend(cls, encoder: TransformerEncoder, types: int) -> None:
        """Give a built encoder ``types`` token types, in place."""
        encoder.__class__ = cls
        encoder.embed_token_types = nn.Embedding(types, encoder.embed_tokens.embedding_dim)
        encoder.embed_token_types.apply(init_bert_params)

    def forward_embedding(self, src_tokens: Tensor, token_embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """B x T tokens to B x T x C, normalized, and the sum of token and type embeddings, B x T x C."""
        if token_embedding is None:
            token_embedding = self.embed_tokens(src_tokens)
        types = self.embed_token_types(token_types(src_tokens, self.dictionary.eos()))
        return super().forward_embedding(src_tokens, token_embedding + types)  # type: ignore[no-any-return]


class EncoderMixin(HeadsMixin):
    """fairseq's ``roberta`` with what BERT has beyond it: ``--token-types`` and ``--layer-norm-eps``."""

    args: Any
    encoder: Any
    classification_heads: Any
    config = DSQEncoderConfig

    def extend(self) -> None:
        if self.args.token_types:
            TokenTypeEncoder.extend(self.encoder.sentence_encoder, self.args.token_types)
        for module in self.modules():  # type: ignore[attr-defined]
            if hasattr(module, "normalized_shape"):  # nn.LayerNorm, or apex's
                module.eps = self.args.layer_norm_eps

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """As fairseq's; a checkpoint's pooler goes into new heads under ``--head-from-pooler``, else it is dropped.

        Raises:
            DSQError: ``--head-from-pooler`` and a head that the checkpoint has neither of.
        """
        prefix = f"{name}." if name else ""
        start = f"{prefix}{HEADS}.{POOLER}."
        pooler = {}
        if (classes := state_dict.get(f"{start}out_proj.weight")) is not None and len(classes) == 0:
            pooler = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        if self.args.head_from_pooler:
            for head in self.classification_heads:
                if f"{prefix}{HEADS}.{head}.dense.weight" not in state_dict:
                    self._start_from_pooler(head, {key.removeprefix(start): value for key, value in pooler.items()})
        super().upgrade_state_dict_named(state_dict, name)  # type: ignore[misc]

    def _start_from_pooler(self, head: str, pooler: dict[str, Tensor]) -> None:
        dense = self.classification_heads[head].dense
        expected = tuple(dense.weight.shape)
        has = tuple(pooler["dense.weight"].shape) if pooler else None
        if has != expected:
            flag_error(
                "--head-from-pooler",
                f"the checkpoint's pooler is {shape_to_str(has)}, expected {shape_to_str(expected)}",
            )
        with torch.no_grad():
            dense.weight.copy_(pooler["dense.weight"])
            dense.bias.copy_(pooler["dense.bias"])

    def blame(self, name: str, has: Shape, expected: Shape) -> str:
        """What gives a model's tensor its shape."""
        args = self.args
        part = name.removeprefix("encoder.sentence_encoder.")
        if part == "embed_tokens.weight" and has and expected:
            if has[0] != expected[0]:
                return f" (entries of the dictionary in {args.data} and its <mask>): take the checkpoint's dict.txt"
            return f" (--encoder-embed-dim {args.encoder_embed_dim})"
        if part == "embed_positions.weight":
            return f" (--max-positions {args.max_positions} and 2)"
        if part == "embed_token_types.weight":
            return f" (--token-types {args.token_types})"
        if part.startswith("layers.") and None in (has, expected):
            return f" (--encoder-layers {args.encoder_layers})"
        if ".fc" in part:
            return f" (--encoder-ffn-embed-dim {args.encoder_ffn_embed_dim})"
        return super().blame(name, has, expected)
