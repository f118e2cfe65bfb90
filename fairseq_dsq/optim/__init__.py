"""Optimizers that fairseq registers."""

from fairseq.optim import register_optimizer

from fairseq_dsq.plugin.optimizer import DSQAdam, DSQAdamConfig

register_optimizer("dsq_adam", dataclass=DSQAdamConfig)(DSQAdam)
# fairseq takes up a checkpoint's states only under an optimizer of the same class name: those of its Adam are encoded.
# (Set last: fairseq registers no name twice.)
DSQAdam.__name__ = "FairseqAdam"

__all__ = ["DSQAdam"]
