"""A criterion that also logs the precision level and what its GEMMs cost."""

from __future__ import annotations

import dataclasses
from typing import Any

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY, register_criterion
from fairseq.logging import metrics
from torch import Tensor
from torch.autograd import Variable

from fairseq_dsq.cost import Cost, load_profile, total_cost
from fairseq_dsq.cost.metrics import (
    CHANGED_CODES,
    FLIPS,
    LEVEL,
    RELATIVE,
    STASH_BYTES,
    UPDATED_CODES,
    WEIGHT_BYTES,
)
from fairseq_dsq.errors import flag_error
from fairseq_dsq.plugin.config import CRITERION_PREFIX, DSQCriterionConfig


class DSQCriterionMixin:
    """Adds ``dsq_*`` metrics to the criterion it is mixed into.

    Summed over an epoch's batches and all workers: ``dsq_arithmetic`` (MACs of 32-bit fixed point), ``dsq_dram_bytes``;
    ``dsq_arithmetic_relative`` and ``dsq_dram_relative`` are these over the same GEMMs in 32-bit fixed point. What an
    update costs is added by :func:`fairseq_dsq.plugin.held.log_update`.
    Averaged over batches: ``dsq_level`` (index from 0), ``dsq_stash_bytes`` (bytes packed for one backward pass),
    ``dsq_weight_bytes`` (of all weights as they are held). With ``--dsq-weights direct``, ``dsq_flips`` is the share of
    codes that an update changed; an epoch's last update is counted with the next epoch's.

    What ran is read from the model's ledger after the forward pass, and again when the backward pass of the loss has
    ended: the trainer reads the logging output later still.
    """

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> Any:
        criterion = super().build_criterion(cfg, task)  # type: ignore[misc]
        profile = getattr(cfg, "dsq_cost_profile", DSQCriterionConfig.dsq_cost_profile)
        try:
            if not isinstance(profile, str):
                raise ValueError(f"got {profile!r}, expected the name of a cost profile or the path of a .yaml file")
            criterion.cost_profile = load_profile(profile)
        except ValueError as error:
            flag_error("--dsq-cost-profile", str(error))
        return criterion

    def forward(self, model: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(model, "dsq", None)
        if state is None:
            flag_error(
                "--criterion",
                f"got {CRITERION_PREFIX}* with {type(model).__name__}, which has no DSQ layers, expected an --arch "
                "that ends in _dsq or contains _dsq_",
            )
        state.cost_profile = self.cost_profile  # type: ignore[attr-defined]
        ledger = state.context.ledger
        ledger.drain()  # what ran outside of any criterion, such as generation for BLEU
        loss, sample_size, logging_output = super().forward(model, sample, *args, **kwargs)  # type: ignore[misc]
        logging_output |= {"dsq_batches": 1, LEVEL: state.level_in_force, STASH_BYTES: 0}
        logging_output[WEIGHT_BYTES] = state.weight_bytes(model)
        changed, updated = ledger.drain_updates() if model.training else (0, 0)
        logging_output |= {CHANGED_CODES: changed, UPDATED_CODES: updated}
        logging_output |= dataclasses.asdict(Cost(), dict_factory=_metrics)

        def charge() -> None:
            work = ledger.drain()
            logging_output[STASH_BYTES] += work.stash_bytes
            cost = total_cost(self.cost_profile, work.gemms.items(), work.stashes.items())  # type: ignore[attr-defined]
            for key, value in dataclasses.asdict(cost, dict_factory=_metrics).items():
                logging_output[key] += value

        charge()
        if loss.requires_grad:
            # The gradient of the loss comes first; by the end of its backward pass all GEMMs have run, those that
            # activation checkpointing repeats among them.
            def charge_at_the_end(grad: Tensor) -> None:
                Variable._execution_engine.queue_callback(charge)

            loss.register_hook(charge_at_the_end)
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        super().reduce_metrics(logging_outputs)  # type: ignore[misc]

        def total(key: str) -> float:
            return float(sum(log.get(key, 0) for log in logging_outputs))

        batches = total("dsq_batches")
        if not batches:
            return
        if updated := total(UPDATED_CODES):
            flips = total(CHANGED_CODES) / updated
            metrics.log_scalar(FLIPS, flips, weight=updated, priority=200, round=6)
        for key in (LEVEL, STASH_BYTES, WEIGHT_BYTES):
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


def _metrics(fields: list[tuple[str, float]]) -> dict[str, float]:
    """A Cost's fields under their metrics' names."""
    return {CRITERION_PREFIX + name: value for name, value in fields}


def dsq_criterion(name: str) -> type:
    """Register ``dsq_<name>``, a registered criterion with a dataclass that also logs ``dsq_*`` metrics."""
    base, dataclass = CRITERION_REGISTRY[name], CRITERION_DATACLASS_REGISTRY[name]
    config = dataclasses.make_dataclass(f"DSQ{dataclass.__name__}", [], bases=(DSQCriterionConfig, dataclass))
    twin: type = type(f"DSQ{base.__name__}", (DSQCriterionMixin, base), {"__doc__": base.__doc__})
    register_criterion(CRITERION_PREFIX + name, dataclass=config)(twin)
    # fairseq takes up a checkpoint's optimizer state only under a criterion of the same class name: this one computes
    # the same loss, so either goes on from the other. (Set last: fairseq registers no name twice.)
    twin.__name__ = base.__name__
    return twin
