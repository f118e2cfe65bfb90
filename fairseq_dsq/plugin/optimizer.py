"""``--optimizer dsq_adam``: fairseq's Adam with moments in low-bit formats."""

# fairseq and OmegaConf read the types of a configuration's fields: no annotation here may be a string.

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.logging import metrics
from fairseq.optim import FairseqOptimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from omegaconf import II

from fairseq_dsq.adam import HELD, LowBitAdam
from fairseq_dsq.cost.metrics import STATE_BYTES
from fairseq_dsq.errors import DSQError, flag_error
from fairseq_dsq.plugin.config import DSQOptimizerConfig, option
from fairseq_dsq.plugin.held import inner_optimizers
from fairseq_dsq.plugin.state import refuse_field

logger = logging.getLogger(__name__)


@dataclass
class DSQAdamConfig(DSQOptimizerConfig, FairseqAdamConfig):
    """Adam's flags and those of its moments."""

    seed: int = II("common.seed")


class DSQAdam(FairseqAdam):
    """fairseq's Adam over :class:`fairseq_dsq.adam.LowBitAdam`.

    Its checkpoints hold the moments' bytes. States in other formats, and those of fairseq's Adam, are encoded in the
    flags' when they are loaded. Each step logs ``dsq_state_bytes``, what the moments take.
    """

    # See fairseq_dsq.plugin.modes.
    updates_codes = True

    def __init__(self, cfg: Any, params: Any) -> None:
        FairseqOptimizer.__init__(self, cfg)
        for name in ("use_old_adam", "fp16_adam_stats"):
            if getattr(cfg, name, False):
                flag_error(option(name), "got it beside --optimizer dsq_adam, expected it without")
        try:
            self._optimizer = LowBitAdam(params, **self.optimizer_config)
        except ValueError as error:
            refuse_field(error)
        coded = any(hasattr(p, "dsq_codes") for group in self._optimizer.param_groups for p in group["params"])
        if cfg.dsq_residual != "none" and not coded:
            logger.warning(f"--dsq-residual {cfg.dsq_residual}: has no effect without --dsq-weights direct")
        rounding = cfg.dsq_moment_rounding
        if rounding != DSQOptimizerConfig.dsq_moment_rounding and cfg.dsq_moment1 == cfg.dsq_moment2 == "float32":
            logger.warning(f"--dsq-moment-rounding {rounding}: has no effect with moments in float32")

    @property
    def optimizer_config(self) -> dict[str, Any]:
        cfg = self.cfg
        held = (cfg.dsq_moment1, cfg.dsq_moment2, cfg.dsq_moment_rounding, cfg.seed, cfg.dsq_residual)
        return {**super().optimizer_config, **dict(zip(HELD, held, strict=True))}

    def step(self, *args: Any, **kwargs: Any) -> None:
        super().step(*args, **kwargs)
        metrics.log_scalar(STATE_BYTES, self._optimizer.state_nbytes, weight=1, priority=200, round=0)

    def load_state_dict(self, state_dict: Mapping[str, Any], optimizer_overrides: Any = None) -> None:
        try:
            super().load_state_dict(state_dict, optimizer_overrides)
        except ValueError as error:
            raise DSQError(f"the checkpoint's optimizer: {error}") from None

    def average_params(self) -> None:
        flag_error("--use-bmuf", "got it beside --optimizer dsq_adam, expected none: it averages float states")


def refuse_foreign_states(optimizer: Any) -> None:
    """Refuse another Adam that took up the bytes of low-bit moments: they go by the same class name.

    And parts of a composite optimizer that hold low bits, each of which would log its own as all.

    Raises:
        DSQError: names the flag.
    """
    every = inner_optimizers(optimizer)
    if len(every) > 1 and any(isinstance(inner, LowBitAdam) for inner in every):
        flag_error("--optimizer", "got composite with dsq_adam in it, expected dsq_adam alone")
    foreign = (inner for inner in every if not isinstance(inner, LowBitAdam))
    if any(HELD[0] in group for inner in foreign for group in inner.param_groups):
        flag_error(
            "--optimizer",
            "got another than the checkpoint's dsq_adam, expected dsq_adam (with --dsq-moment1 float32 --dsq-moment2 "
            "float32 for float states) or --reset-optimizer",
        )
