"""Quantized layers for any torch model, and :func:`convert`, which puts them in."""

from fairseq_dsq.nn.attention import DSQMultiheadAttention
from fairseq_dsq.nn.context import (
    BOX_DIMS,
    FLOAT32,
    GEMM_MODES,
    BoxDim,
    DSQContext,
    GemmConfig,
    Ledger,
    LedgerKey,
    StashKey,
    Work,
)
from fairseq_dsq.nn.convert import convert
from fairseq_dsq.nn.functional import linear, linear_group, matmul
from fairseq_dsq.nn.linear import DSQLinear

__all__ = [
    "BOX_DIMS",
    "FLOAT32",
    "GEMM_MODES",
    "BoxDim",
    "DSQContext",
    "DSQLinear",
    "DSQMultiheadAttention",
    "GemmConfig",
    "Ledger",
    "LedgerKey",
    "StashKey",
    "Work",
    "convert",
    "linear",
    "linear_group",
    "matmul",
]
