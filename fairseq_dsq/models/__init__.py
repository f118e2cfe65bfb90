"""Architectures that fairseq registers."""

from fairseq_dsq.models import loading, roberta_dsq, transformer_dsq

__all__ = ["loading", "roberta_dsq", "transformer_dsq"]
