"""``roberta_dsq``: fairseq's RoBERTa with every GEMM quantized, and what BERT has beyond RoBERTa."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaModel
from fairseq.models.roberta.model import base_architecture, roberta_large_architecture
from fairseq.models.transformer import TransformerEncoder
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import Tensor, nn

from fairseq_dsq.errors import flag_error
from fairseq_dsq.plugin import attach, config
from fairseq_dsq.plugin.checkpoints import DSQModelMixin, Shape, shape_to_str
from fairseq_dsq.plugin.config import ENCODER_DEFAULTS

# The head of a checkpoint that holds BERT's pooler (dense, tanh). It has no classes; fairseq's own roberta drops it.
POOLER = "pooler"
HEADS = "classification_heads"


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


_OWN_FLAGS: dict[str, tuple[config.Check, Any]] = {
    name: (check, ENCODER_DEFAULTS[name])
    for name, check in {
        "token_types": config.integer("0, for none, or an integer >= 2", lambda value: value != 1),
        "layer_norm_eps": config.number("a finite number > 0", lambda value: value > 0),
        "head_from_pooler": config.boolean,
    }.items()
}


def set_defaults(args: Any) -> None:
    """As :func:`fairseq_dsq.plugin.config.set_defaults`, with this architecture's own flags."""
    config.set_defaults(args, _OWN_FLAGS)


@register_model("roberta_dsq")
class RobertaDSQModel(DSQModelMixin, RobertaModel):
    """fairseq's ``roberta`` under dynamic stashing quantization; parameter names and shapes are the same.

    ``--token-types`` and ``--layer-norm-eps`` make it BERT.
    """

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        super().add_args(parser)
        parser.add_argument(
            "--token-types",
            type=config.checked("--token-types", _OWN_FLAGS["token_types"][0]),
            metavar="N",
            help="token types (segments), BERT's 2: what stands after the first </s> is of type 1 (default: 0, none)",
        )
        parser.add_argument(
            "--layer-norm-eps",
            type=config.checked("--layer-norm-eps", _OWN_FLAGS["layer_norm_eps"][0]),
            metavar="E",
            help="epsilon of every LayerNorm; BERT has 1e-12 (default: 1e-5)",
        )
        parser.add_argument(
            "--head-from-pooler",
            action="store_true",
            help="start the classification head's dense layer from the pooler of a checkpoint that convert-hf made",
        )

    @classmethod
    def build_model(cls, args: Any, task: Any) -> RobertaDSQModel:
        set_defaults(args)
        model: RobertaDSQModel = super(DSQModelMixin, cls).build_model(args, task)  # converted further down
        if args.token_types:
            TokenTypeEncoder.extend(model.encoder.sentence_encoder, args.token_types)
        for module in model.modules():
            if hasattr(module, "normalized_shape"):  # nn.LayerNorm, or apex's
                module.eps = args.layer_norm_eps
        # The task registers its head once the model is built.
        head = getattr(task.cfg, "classification_head_name", None)
        later = [f"{HEADS}.{head}.{layer}" for layer in ("dense", "out_proj")] if head else []
        with torch.random.fork_rng(devices=[]):  # the head starts as it does in fairseq's roberta
            attach.attach(model, args, task, later)
        return model

    def register_classification_head(
        self, name: str, num_classes: int | None = None, inner_dim: int | None = None, **kwargs: Any
    ) -> None:
        """As fairseq's; the head is quantized at the model's level."""
        super().register_classification_head(name, num_classes, inner_dim, **kwargs)
        attach.convert_added(self, self.args, f"{HEADS}.{name}")

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
        super().upgrade_state_dict_named(state_dict, name)

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


@register_model_architecture("roberta_dsq", "roberta_dsq")
def roberta_dsq(args: Any) -> None:
    set_defaults(args)
    base_architecture(args)


@register_model_architecture("roberta_dsq", "roberta_dsq_large")
def roberta_dsq_large(args: Any) -> None:
    set_defaults(args)
    roberta_large_architecture(args)
