"""A criterion that also logs the precision level and what its GEMMs cost."""

from __future__ import annotations

import sys
from typing import Any

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY, register_criterion
from fairseq.logging import metrics

from fairseq_dsq.cost import PaperProfile, total_cost

PREFIX = "dsq_"
PROFILE = PaperProfile()
# relative metric: (absolute, the same GEMMs in 32-bit fixed point), both summed over an epoch
RELATIVE = {
    "dsq_arithmetic_relative": ("dsq_arithmetic", "dsq_arithmetic_baseline"),
    "dsq_dram_relative": ("dsq_dram_bytes", "dsq_dram_baseline_bytes"),
}


class DSQCriterionMixin:
    """Adds ``dsq_*`` metrics to the criterion it is mixed into.

    Summed over an epoch's batches and all workers: ``dsq_arithmetic`` (MACs of 32-bit fixed point), ``dsq_dram_bytes``;
    ``dsq_arithmetic_relative`` and ``dsq_dram_relative`` are these over the same GEMMs in 32-bit fixed point.
    Averaged over batches: ``dsq_level`` (index from 0), ``dsq_stash_bytes`` (bytes packed for one backward pass).
    """

    def forward(self, model: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(model, "dsq", None)
        if state is None:
            sys.exit(
                f"error: argument --criterion: got {PREFIX}* with {type(model).__name__}, which has no DSQ layers, "
                "expected an --arch that ends in _dsq or contains _dsq_"
            )
        ledger = state.context.ledger
        ledger.drain()
        loss, sample_size, logging_output = super().forward(model, sample, *args, **kwargs)  # type: ignore[misc]
        gemms, stash_bytes = ledger.drain()
        cost = total_cost(PROFILE, gemms.items())
        logging_output |= {
            "dsq_batches": 1,
            "dsq_level": state.level_in_force,
            "dsq_stash_bytes": stash_bytes,
            "dsq_arithmetic": cost.arithmetic,
            "dsq_arithmetic_baseline": cost.arithmetic_baseline,
            "dsq_dram_bytes": cost.dram_bytes,
            "dsq_dram_baseline_bytes": cost.dram_baseline_bytes,
        }
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        super().reduce_metrics(logging_outputs)  # type: ignore[misc]

        def total(key: str) -> float:
            return float(sum(log.get(key, 0) for log in logging_outputs))

        batches = total("dsq_batches")
        if not batches:
            return
        for key in ("dsq_level", "dsq_stash_bytes"):
            metrics.log_scalar(key, total(key) / batches, weight=batches, priority=200, round=2)
        for relative, (absolute, baseline) in RELATIVE.items():
            metrics.log_scalar_sum(absolute, total(absolute), priority=201)
            metrics.log_scalar_sum(baseline, total(baseline), priority=202)
            metrics.log_derived(
                relative,
                lambda meters, absolute=absolute, baseline=baseline: round(
                    meters[absolute].sum / meters[baseline].sum, 6
                ),
                priority=203,
            )


def _wrap_all() -> None:
    for name, dataclass in list(CRITERION_DATACLASS_REGISTRY.items()):
        if name.startswith(PREFIX):
            continue
        base = CRITERION_REGISTRY[name]
        wrapped = type(f"DSQ{base.__name__}", (DSQCriterionMixin, base), {"__doc__": base.__doc__})
        register_criterion(PREFIX + name, dataclass=dataclass)(wrapped)


_wrap_all()
