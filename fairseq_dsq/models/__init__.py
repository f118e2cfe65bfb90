"""Architectures that fairseq registers: quantized twins of its models, each with all of the model's architectures."""

from fairseq_dsq.plugin import llama
from fairseq_dsq.plugin.encoder import EncoderMixin
from fairseq_dsq.plugin.twins import dsq_twin

# Add a name, and fairseq-train --arch knows <name>_dsq. ``bart`` has bart_dsq_large and bart_dsq_base.
MODELS = ("transformer", "transformer_lm", "bart", "llama")
TWINS = {name: dsq_twin(name) for name in MODELS} | {"roberta": dsq_twin("roberta", EncoderMixin)}

__all__ = ["MODELS", "TWINS", "llama"]
