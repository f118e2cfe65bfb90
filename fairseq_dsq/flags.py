"""The flags' defaults, and how a flag is refused."""

from __future__ import annotations

from typing import Any, NoReturn

from fairseq_dsq.errors import DSQError

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
    """Refuse the value of a flag.

    Raises:
        DSQError: always; one line that names the flag.
    """
    raise DSQError(f"argument {flag}: {message}")
