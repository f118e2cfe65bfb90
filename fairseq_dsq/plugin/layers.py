"""fairseq's layers that :func:`fairseq_dsq.nn.convert` puts twins of, and heads that multiply by a raw weight."""

from __future__ import annotations

from typing import Any

from fairseq.models.bart.model import BARTClassificationHead
from fairseq.models.roberta.model import RobertaClassificationHead, RobertaLMHead
from fairseq.modules import FairseqDropout, MultiheadAttention, gelu, gelu_accurate
from fairseq.utils import relu_squared
from torch import Tensor, nn

from fairseq_dsq.nn import (
    DSQLinear,
    linear,
    register_dropout,
    register_elementwise,
    register_twin,
)
from fairseq_dsq.nn.saved import Activation, is_known_activation
from fairseq_dsq.plugin.attention import DSQMultiheadAttention

register_twin(MultiheadAttention, DSQMultiheadAttention.from_float)
register_dropout(FairseqDropout)
register_elementwise(gelu, gelu_accurate, relu_squared)
_HEADS = (RobertaLMHead, RobertaClassificationHead, BARTClassificationHead)


class DSQRobertaLMHead(RobertaLMHead):
    """RoBERTa's language-model head: its projection to the vocabulary shares the embedding's weight."""

    products_are_quantized = True

    def forward(self, features: Tensor, masked_tokens: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(..., C) to (..., vocabulary); with ``masked_tokens``, a boolean mask, of those positions alone."""
        if masked_tokens is not None:
            features = features[masked_tokens, :]
        x = self.layer_norm(self.activation_fn(self.dense(features)))
        context = self.dense.context
        config = context.for_mode(self.training)
        return linear(x, self.weight, self.bias, config, context.ledger, self.number, context.together)


def convert_heads(model: nn.Module) -> None:
    """Give heads whose ``nn.Linear`` layers are converted already the rest; parameters stay theirs.

    The language-model head gets its quantized forward, and the activation function of either head keeps what the
    stash scope says.
    """
    for module in model.modules():
        if not isinstance(module, _HEADS) or not isinstance(module.dense, DSQLinear):
            continue
        if type(module) is RobertaLMHead:
            module.__class__ = DSQRobertaLMHead
            module.number = module.dense.context.number_layer()
        if is_known_activation(module.activation_fn):
            module.activation_fn = Activation(module.activation_fn, module.dense.context)
