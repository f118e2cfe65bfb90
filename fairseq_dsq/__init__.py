"""Dynamic Stashing Quantization (arXiv 2303.05295) for fairseq: ``--user-dir fairseq_dsq``.

Importing the package makes fairseq know every name it registers.
"""

from fairseq_dsq import errors
from fairseq_dsq.plugin import compat

errors.end_commands_in_one_line()
compat.quiet_fairseq()
compat.allow_checkpoint_classes()
compat.copy_checkpoints_whole()
compat.mend_numpy()
compat.keep_archives_inside()
__path__ = compat.Folders(__path__)

from fairseq_dsq import criterions, models, optim  # noqa: E402
from fairseq_dsq.plugin import loading  # noqa: E402

loading.guard_checkpoints()

__all__ = ["criterions", "models", "optim"]
