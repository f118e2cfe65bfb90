"""Quantized layers for any torch model, and :func:`convert`, which puts them in."""

from fairseq_dsq.ledger import Ledger, LedgerKey, StashKey, Work
from fairseq_dsq.nn.attention import DSQAttention
from fairseq_dsq.nn.coded import WEIGHT_SCALES, CodedWeight, update_codes, weight_format
from fairseq_dsq.nn.coded_linear import (
    CodedLinear,
    decoded,
    formats_of_codes,
    hold_codes,
    holds_codes,
    parameter_bytes,
    weight_bytes,
)
from fairseq_dsq.nn.context import (
    BOX_DIMS,
    STASH_SCOPES,
    VALUE_BOXES,
    DSQContext,
    GemmConfig,
    StashScope,
)
from fairseq_dsq.nn.convert import (
    convert,
    left_float,
    matching_patterns,
    register_dropout,
    register_twin,
    warn_of_float,
)
from fairseq_dsq.nn.functional import linear, linear_group, matmul
from fairseq_dsq.nn.linear import DSQConv1D, DSQLinear
from fairseq_dsq.nn.log_softmax import log_softmax
from fairseq_dsq.nn.rotation import ROTATIONS, Rotation
from fairseq_dsq.nn.saved import DSQDropout, DSQLayerNorm, DSQRMSNorm, register_elementwise
from fairseq_dsq.precision import FLOAT32

__all__ = [
    "BOX_DIMS", "FLOAT32", "ROTATIONS", "STASH_SCOPES", "VALUE_BOXES", "WEIGHT_SCALES", "CodedLinear", "CodedWeight",
    "DSQAttention", "DSQContext", "DSQConv1D", "DSQDropout", "DSQLayerNorm", "DSQLinear", "DSQRMSNorm", "GemmConfig",
    "Ledger", "LedgerKey", "Rotation", "StashKey", "StashScope", "Work", "convert", "decoded", "formats_of_codes",
    "hold_codes", "holds_codes", "left_float", "linear", "linear_group", "log_softmax", "matching_patterns", "matmul",
    "parameter_bytes", "register_dropout", "register_elementwise", "register_twin", "update_codes", "warn_of_float",
    "weight_bytes", "weight_format",
]  # fmt: skip
