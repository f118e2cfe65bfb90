"""The names under which criteria and optimizers log levels and costs, and reports find them."""

from __future__ import annotations

LEVEL, STASH_BYTES = "dsq_level", "dsq_stash_bytes"
WEIGHT_BYTES, GRADIENT_BYTES, STATE_BYTES = "dsq_weight_bytes", "dsq_gradient_bytes", "dsq_state_bytes"
# The share of a model's codes that an update changed, and its parts.
FLIPS, CHANGED_CODES, UPDATED_CODES = "dsq_flips", "dsq_changed_codes", "dsq_updated_codes"
# relative metric: (absolute, its baseline: the same GEMMs in 32-bit fixed point), both summed over an epoch
RELATIVE = {
    "dsq_arithmetic_relative": ("dsq_arithmetic", "dsq_arithmetic_baseline"),
    "dsq_dram_relative": ("dsq_dram_bytes", "dsq_dram_baseline_bytes"),
}
