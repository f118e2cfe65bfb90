"""Architectures that fairseq registers."""

from fairseq_dsq.models import roberta_dsq, transformer_dsq

__all__ = ["roberta_dsq", "transformer_dsq"]
