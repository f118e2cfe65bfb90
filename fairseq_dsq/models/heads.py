"""Quantized twins of fairseq heads that multiply by a raw weight."""

from __future__ import annotations

from typing import Any

from fairseq.models.roberta.model import RobertaLMHead
from torch import Tensor, nn

from fairseq_dsq.nn import DSQLinear, linear


class DSQRobertaLMHead(RobertaLMHead):
    """RoBERTa's language-model head: its projection to the vocabulary shares the embedding's weight."""

    def forward(self, features: Tensor, masked_tokens: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(..., C) to (..., vocabulary); with ``masked_tokens``, a boolean mask, of those positions alone."""
        if masked_tokens is not None:
            features = features[masked_tokens, :]
        x = self.layer_norm(self.activation_fn(self.dense(features)))
        context = self.dense.context
        return linear(x, self.weight, self.bias, context.for_mode(self.training), context.ledger)


def convert_heads(model: nn.Module) -> None:
    """Give heads whose ``nn.Linear`` layers are converted already their quantized forward; parameters stay theirs."""
    for module in model.modules():
        if type(module) is RobertaLMHead and isinstance(module.dense, DSQLinear):
            module.__class__ = DSQRobertaLMHead
