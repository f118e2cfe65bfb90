"""From the shape of a GEMM and its precision to the bytes that it reads and writes.

::

    output:       input(q0) @ weight(q0)              MxK @ KxN => MxN (q0)
    grad_input:   grad_output(q3) @ weight(q2)        MxN @ NxK => MxK (q3)
    grad_weight:  stash(q1) @ grad_output(q3)         KxM @ MxN => KxN (float32)

Every operand is boxed along the reduction dimension of the GEMM, the only layout that a dot-product unit reads; a
result along its last dimension.
"""

from __future__ import annotations

from fairseq_dsq.formats import Float32, Format
from fairseq_dsq.ledger import Gemm, Stash, Update
from fairseq_dsq.precision import PrecisionConfig


def result_format(gemm: Gemm, precision: PrecisionConfig) -> Format:
    """What a GEMM's result is written in."""
    if gemm.kind == "grad_weight":
        return Float32()
    return precision.operands("output")[0] if gemm.kind == "output" else precision.operands("grad_input")[0]


def gemm_bytes(gemm: Gemm, precision: PrecisionConfig) -> int:
    """Bytes of the two operands, read once, and of the result, written once, each in its packed format."""
    first, second = precision.operands(gemm.kind)
    return (
        first.nbytes((gemm.batch, gemm.m, gemm.k), 2)
        + second.nbytes((gemm.batch, gemm.k, gemm.n), 1)
        + result_format(gemm, precision).nbytes((gemm.batch, gemm.m, gemm.n), 2)
    )


def stash_bytes(stash: Stash, precision: PrecisionConfig) -> int:
    """Bytes of a packed stash, written once by the forward pass; none of an input that is made again instead."""
    return 0 if stash.role == "recomputed" else precision.stash(stash.role).nbytes(stash.shape, stash.dim)


def update_bytes(update: Update) -> int:
    """Bytes of an update: weights and states are read and written, gradients read, all as they are held."""
    return 2 * update.weight_bytes + update.gradient_bytes + 2 * update.state_bytes
