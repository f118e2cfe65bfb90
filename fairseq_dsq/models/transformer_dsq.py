"""``transformer_dsq``: fairseq's Transformer with every GEMM quantized."""

from __future__ import annotations

from typing import Any

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import (
    base_architecture,
    transformer_iwslt_de_en,
    transformer_wmt_en_de,
)

from fairseq_dsq.plugin.checkpoints import DSQModelMixin
from fairseq_dsq.plugin.config import set_defaults


@register_model("transformer_dsq")
class TransformerDSQModel(DSQModelMixin, TransformerModel):
    """fairseq's ``transformer`` under dynamic stashing quantization; parameter names and shapes are the same."""


@register_model_architecture("transformer_dsq", "transformer_dsq")
def transformer_dsq(args: Any) -> None:
    set_defaults(args)
    base_architecture(args)


@register_model_architecture("transformer_dsq", "transformer_dsq_iwslt_de_en")
def transformer_dsq_iwslt_de_en(args: Any) -> None:
    set_defaults(args)
    transformer_iwslt_de_en(args)


@register_model_architecture("transformer_dsq", "transformer_dsq_wmt_en_de")
def transformer_dsq_wmt_en_de(args: Any) -> None:
    set_defaults(args)
    transformer_wmt_en_de(args)
