"""Turn a checkpoint of a *_dsq architecture into one of the float architecture it was made from."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

from fairseq_dsq import artefact
from fairseq_dsq.nn import decoded
from fairseq_dsq.plugin.checkpoints import without_schedule
from fairseq_dsq.plugin.config import CRITERION_PREFIX, DSQConfig, DSQCriterionConfig, option
from fairseq_dsq.plugin.twins import SUFFIX, base_dataclass
from fairseq_dsq.text import quoted


def plain(value: Any) -> Any:
    """``value`` in types that torch.load takes without an allow-list: fairseq's configurations become dictionaries."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    return value


def as_registered(model: dict[str, Any]) -> Any:
    """The configuration of a float model as fairseq has it: the fields of the model's dataclass, if it has one."""
    from fairseq.dataclass.utils import interpret_dc_type
    from fairseq.models.bart import BARTModel

    family = ARCH_MODEL_REGISTRY.get(model["_name"], object)
    if issubclass(family, BARTModel):  # reads a flag of the task, which fairseq hands it of a namespace alone
        return argparse.Namespace(**model)
    dataclass = base_dataclass(family)
    if dataclass is None:
        return model
    found = {"_name": model["_name"]}
    for field in dataclasses.fields(dataclass):
        if not field.name.startswith("_") and field.name in model:
            value, kind = model[field.name], interpret_dc_type(field.type)
            # Architectures set numbers of another type than the field's, such as False for 0.
            found[field.name] = kind(value) if kind in (bool, int, float) and value is not None else value
    return found


def export_float(checkpoint: Path, output: Path) -> str:
    """Write the float checkpoint to ``output``; returns its architecture.

    Raises:
        ValueError: not a checkpoint of a *_dsq architecture, codes without their parts, or no such float model.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
    state = plain(state)
    if missing := [name for name in ("model", "criterion", "common") if not isinstance(state["cfg"].get(name), dict)]:
        raise ValueError(f"{checkpoint}: its configuration lacks {', '.join(missing)}, expected fairseq-train's")
    model = state["cfg"]["model"]
    arch = str(model.get("arch") or model.get("_name"))
    if SUFFIX not in arch:
        raise ValueError(f"{checkpoint}: got architecture {quoted(arch)}, expected a *{SUFFIX} one")
    config = getattr(ARCH_MODEL_REGISTRY.get(arch), "config", DSQConfig)
    flags = [*dataclasses.fields(config), *dataclasses.fields(DSQCriterionConfig)]
    for field in flags:
        value = model.get(field.name, field.default)
        if not field.metadata.get("plain", True) and value != field.default:
            raise ValueError(
                f"{checkpoint}: {option(field.name)}: got {value}, expected {field.default}: fairseq has no such "
                "float model"
            )
    model |= dict.fromkeys(("arch", "_name"), arch.replace(SUFFIX, ""))
    for section in state["cfg"].values():
        for field in flags if isinstance(section, dict) else ():
            section.pop(field.name, None)
    state["cfg"]["model"] = as_registered(model)
    state["cfg"]["common"]["user_dir"] = None
    criterion = state["cfg"]["criterion"]
    criterion["_name"] = str(criterion["_name"]).removeprefix(CRITERION_PREFIX)
    state["args"] = None  # of a checkpoint that had no cfg yet; fairseq has made that of it
    state["model"] = decoded(without_schedule(state["model"]))
    with artefact.atomic(output) as partial:
        torch.save(state, partial)
    return str(model["arch"])
