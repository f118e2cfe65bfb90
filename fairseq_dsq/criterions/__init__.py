"""``dsq_<name>`` for every criterion that fairseq registers with a dataclass."""

from fairseq_dsq.criterions import dsq_criterion

__all__ = ["dsq_criterion"]
