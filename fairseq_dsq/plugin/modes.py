"""fairseq's training modes that a DSQ model cannot have are refused at the start; this room's README has the others."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from fairseq.optim import OPTIMIZER_REGISTRY
from omegaconf import DictConfig, OmegaConf

from fairseq_dsq.errors import flag_error
from fairseq_dsq.plugin.workers import check_workers

TRAINING_COMMANDS = ("fairseq-train", "fairseq-hydra-train", "train.py", "hydra_train.py")


def trains() -> bool:
    """Whether this process is a command that trains: others get their flags of a checkpoint."""
    return Path(sys.argv[0] if sys.argv else "").name in TRAINING_COMMANDS


def flag_of(args: Any, name: str) -> Any:
    """A flag's value. argparse's configuration has those of all of fairseq; OmegaConf's hangs in a tree of sections."""
    sections = [args]
    if isinstance(args, DictConfig):
        sections += [
            section for section in cast(DictConfig, args._get_root()).values() if isinstance(section, DictConfig)
        ]
    return next((value for section in sections if (value := getattr(section, name, None)) is not None), None)


def check_modes(args: Any) -> None:
    """Refuse what cannot be trained, or would be silently wrong.

    fairseq takes ``--bf16`` for ``--tpu``: that is undone here.

    Args:
        args: flags of fairseq-train; nothing is looked at in a command that does not train.

    Raises:
        the errors of :func:`fairseq_dsq.errors.flag_error`; one line names the flag.
    """
    if not trains():
        return
    if flag_of(args, "bf16") and flag_of(args, "tpu") and "--tpu" not in sys.argv:
        args.tpu = False
    for name, reason in _refused(args):
        got = _optimizer(args) if name == "optimizer" else flag_of(args, name)
        flag_error("--" + name.replace("_", "-"), f"got {got}, {reason}")
    check_workers(partial(flag_of, args))


def _refused(args: Any) -> Iterator[tuple[str, str]]:
    """(flag, why it is refused)."""
    given = partial(flag_of, args)
    if given("tpu"):
        yield "tpu", "expected none: there is no quantized path for TPUs"
    if given("fp16") and not torch.cuda.is_available():
        yield "fp16", "expected --bf16 or neither: once a loss scale is too large fairseq waits for a GPU"
    flattens = given("fp16") and not given("fp16_no_flatten_grads") and not given("memory_efficient_fp16")
    if flattens and _optimizer(args) == "dsq_adam":
        yield "fp16", "expected --fp16-no-flatten-grads beside --optimizer dsq_adam, which cuts each tensor into rows"
    scaled = next((name for name in ("fp16", "amp") if given(name)), None)
    if scaled and (flag := _static_gradient(given)):
        yield (
            scaled,
            f"expected none beside {flag}: the loss scale that it changes moves gradients on a scale that stays",
        )
    if (given("quant_noise_pq") or 0) > 0:
        yield "quant_noise_pq", "expected 0: quant noise changes weights behind the layers that DSQ quantizes"
    if (given("quant_noise_scalar") or 0) > 0:
        yield "quant_noise_scalar", "expected 0: quant noise replaces the layers that DSQ quantizes"
    if given("quantization_config_path"):
        yield "quantization_config_path", "expected none: product quantization leaves out the layers of DSQ"
    for name in ("ffn_blocks_to_remove", "mha_heads_to_keep"):
        if given(name) not in (None, -1):  # fairseq's word for none
            yield name, "expected none: fairseq prunes by putting float layers in place of those that DSQ quantizes"
    if given("dsq_weights") == "direct":
        yield from _refused_with_codes(args, given)
    if given("pipeline_model_parallel"):
        yield "pipeline_model_parallel", "expected none: no DSQ architecture is made of a pipeline's stages"
    if (given("model_parallel_size") or 1) > 1:
        yield "model_parallel_size", "expected 1: Megatron's layers, which hold a part of a weight each, have no DSQ"
    # Each wants fairscale, with which nothing here has been tested.
    if given("ddp_backend") == "fully_sharded" or (given("ddp_backend") == "slowmo" and _workers(given) > 1):
        yield "ddp_backend", "expected legacy_ddp, no_c10d, c10d or pytorch_ddp: DSQ is not tested on fairscale's"
    if given("zero_sharding") not in (None, "none"):
        yield "zero_sharding", "expected none: DSQ is not tested on fairscale's sharded optimizers"
    if given("cpu_offload"):
        yield "cpu_offload", "expected none: it belongs to --ddp-backend fully_sharded, which is refused"
    if given("use_bmuf") and _workers(given) > 1:
        yield "use_bmuf", "expected none on several workers: their models differ between two synchronizations"
    if given("write_checkpoints_asynchronously") and importlib.util.find_spec("iopath") is None:
        yield (
            "write_checkpoints_asynchronously",
            "expected none: iopath is not installed, and fairseq would end without training, with exit code 0",
        )


def _refused_with_codes(args: Any, given: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """The same, of weights that are held as codes."""
    because = "--dsq-weights direct holds codes alone"
    if not updates_codes(_optimizer(args)):
        known = ", ".join(name for name in OPTIMIZER_REGISTRY if updates_codes(name)) or "none here"
        yield "optimizer", f"expected one that updates codes ({known}): {because}"
    for name in ("fp16", "bf16"):
        if given(name) and not given(f"memory_efficient_{name}"):
            yield name, f"expected --memory-efficient-{name} or none: {because}, and this mode float copies of weights"
    for name in ("mha_reg_scale_factor", "ffn_reg_scale_factor"):
        if given(name):
            yield name, f"expected 0: {because}, and this reads float weights"
    if given("store_ema"):
        yield "store_ema", f"expected none: {because}, which have no average"
    if _workers(given) > 1 and given("ddp_backend") in ("c10d", "pytorch_ddp"):
        yield "ddp_backend", f"expected legacy_ddp on several workers: {because}, and this one writes to float weights"


def _static_gradient(given: Callable[[str], Any]) -> str | None:
    """The flag by which gradients have a scale that does not follow from them; None where none does."""
    if given("dsq_format") == "fixed" and given("dsq_fixed_scale") == "static":
        return "--dsq-fixed-scale static"
    for name in ("dsq_levels", "dsq_rules"):
        for level in re.findall(r"\[[^\[\]]*\]", str(given(name) or "")):
            if found := re.search(r"fixed[0-9]+\.[0-9]+", level.rpartition(",")[2]):
                return f"{found[0]} in --{name.replace('_', '-')}"
    return None


def _optimizer(args: Any) -> str:
    if isinstance(args, DictConfig):
        return str(OmegaConf.select(args._get_root(), "optimizer._name"))
    return str(getattr(args, "optimizer", None))


def updates_codes(optimizer: str) -> bool:
    """Whether an optimizer of fairseq's hands a weight's update to its ``dsq_codes``: its class says so."""
    return bool(getattr(OPTIMIZER_REGISTRY.get(optimizer), "updates_codes", False))


def _workers(given: Any) -> int:
    return int(given("distributed_world_size") or 1)
