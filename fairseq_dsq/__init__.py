"""Dynamic Stashing Quantization (arXiv 2303.05295) for fairseq: ``--user-dir fairseq_dsq``.

Importing the package makes fairseq know every name it registers.

Read in this order: formats/base.py, precision.py, nn/functional.py, gemm/base.py, plugin/attach.py, plugin/hooks.py.

format       element x scale x group: what a value is rounded to, and the bytes it takes
group        the values that share a scale; a box, in block floating point
level        one [q0,q1,q2,q3]: the format of each operand of the three GEMMs output, grad_input and grad_weight
operand      what a GEMM multiplies; its groups lie along the GEMM's reduction dimension
stash        a GEMM's operand, packed, that is kept for the backward pass
saved        what operations other than GEMMs keep for it
engine       what multiplies quantized operands exactly; may round them itself (fused rounding)
policy       when the level in force changes: a schedule
twin         the quantized counterpart of a float layer, model, architecture or criterion
record       SAVE_DIR/dsq.jsonl: what a training did, a line a validation
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
