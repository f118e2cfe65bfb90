"""Architectures that fairseq registers."""

from fairseq_dsq.models import transformer_dsq

__all__ = ["transformer_dsq"]
