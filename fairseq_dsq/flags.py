"""The flags' defaults, and how fairseq's commands refuse a flag."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

# The paper's two levels and patience (arXiv 2303.05295, section 4).
DEFAULTS: dict[str, Any] = {
    "dsq_format": "bfp",
    "dsq_levels": "[2,2,2,16] [16,4,4,16]",
    "dsq_patience": 5,
    "dsq_min_delta": 0.0,
    "dsq_rounding": "nearest",
    "dsq_sign_bit": "counted",
    "dsq_box_dim": "reduction",
    "dsq_value_boxes": "row",
    "dsq_attention_matmul": "on",
    "dsq_fixed_scale": "dynamic",
    "dsq_scale": "floor",
    "dsq_stash_scope": "gemm",
    "dsq_skip": "",
    "dsq_gemm": "auto",
}
# What roberta_dsq has beyond fairseq's roberta; these values are roberta's own.
ENCODER_DEFAULTS: dict[str, Any] = {"token_types": 0, "layer_norm_eps": 1e-5, "head_from_pooler": False}
# The criterion's own flag.
PROFILE_FIELD, DEFAULT_PROFILE = "dsq_cost_profile", "paper"


def flag_error(flag: str, message: str) -> NoReturn:
    """Stop with one line that names the flag.

    Raises:
        SystemExit: always; its text goes to standard error and the exit code is 1.
    """
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: argument {flag}: {message}")
