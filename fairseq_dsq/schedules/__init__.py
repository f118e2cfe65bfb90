"""Precision schedules: which of the levels training runs at, and when that changes.

A policy is a file here that :func:`register` names; its flags, and what of it checkpoints keep, follow from its fields.
"""

from fairseq_dsq.schedules import plateau, updates, cyclic, callback  # noqa: I001  (the order of their flags)
from fairseq_dsq.schedules.base import Policy, State, flags, make, names, own_flags, register

__all__ = [
    "Policy", "State", "callback", "cyclic", "flags", "make", "names", "own_flags", "plateau", "register", "updates",
]  # fmt: skip
