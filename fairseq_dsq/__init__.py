"""Dynamic Stashing Quantization (arXiv 2303.05295) for fairseq: ``--user-dir fairseq_dsq``.

Importing the package makes fairseq know every name it registers.
"""

from fairseq_dsq import compat

compat.quiet_fairseq()
compat.allow_checkpoint_classes()
compat.copy_checkpoints_whole()

from fairseq_dsq import criterions, models  # noqa: E402

__all__ = ["criterions", "models"]
