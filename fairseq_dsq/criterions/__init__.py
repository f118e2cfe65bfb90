"""Criteria that fairseq registers: ``dsq_<criterion>`` for each of its own that has a dataclass."""

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY

from fairseq_dsq.plugin.config import CRITERION_PREFIX
from fairseq_dsq.plugin.criterion import dsq_criterion

TWINS = {
    name: dsq_criterion(name) for name in list(CRITERION_DATACLASS_REGISTRY) if not name.startswith(CRITERION_PREFIX)
}

__all__ = ["TWINS"]
