"""What every checkpoint passes on its way into fairseq: it is whole, it is fairseq's, and nothing in it runs.

torch.load refuses pickled code (``weights_only``), but fairseq evaluates some strings of a checkpoint's configuration
as Python, and hands some to a shell. fairseq has no hook where a checkpoint is read; all its commands,
``from_pretrained`` and this package read it by ``checkpoint_utils.load_checkpoint_to_cpu``, which
:func:`guard_checkpoints` wraps.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.file_io import PathManager
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_dsq.errors import DSQError
from fairseq_dsq.plugin.checkpoints import LAST, with_suffix
from fairseq_dsq.plugin.config import refuse_unknown
from fairseq_dsq.plugin.optimizer import refuse_foreign_states

# Paths and free text, which fairseq never evaluates and which may look like anything.
FREE_TEXT = frozenset(
    {
        "aim_repo", "aim_run_hash", "bpe_codes", "bpe_merges", "bpe_vocab", "continue_once", "data",
        "decoder_embed_path", "encoder_embed_path", "finetune_from_model", "gpt2_encoder_json", "gpt2_vocab_bpe",
        "lm_path", "log_file", "path", "plasma_path", "restore_file", "results_path", "save_dir",
        "sentencepiece_model", "tensorboard_logdir", "user_dir", "wandb_project",
    }
)  # fmt: skip
# What a plain value consists of: literals, names such as "adam", "checkpoint_last.pt", and arithmetic such as
# "[(512, 3)] * 4". There is no call, index, comprehension or power among them: those can run, or never end.
_PLAIN = (
    ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Name, ast.Attribute, ast.expr_context,
    ast.UnaryOp, ast.unaryop, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitOr,
    ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop,
)  # fmt: skip
# What a checkpoint must hold beside "model" for fairseq to read it.
_PARTS = ("cfg", "args")
# Where training goes on; fairseq's crash.pt, of a training that failed, lacks it.
_POSITION = "train_iterator"


def is_plain(text: str) -> bool:
    """Whether evaluating ``text`` as Python does nothing but arithmetic on literals, or fails."""
    if "${" in text:  # OmegaConf's: it reads the environment, and puts other strings together
        return False
    try:
        tree = ast.parse(text.lstrip(" \t"), mode="eval")  # eval skips these too
    except (SyntaxError, ValueError):
        return True
    except (RecursionError, MemoryError):
        return False
    return all(isinstance(node, _PLAIN) for node in ast.walk(tree))


def _values(value: Any, name: str) -> Iterator[tuple[str, str | bytes]]:
    """(dotted name, text) of every string in a configuration, however nested."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, (str, bytes)):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _values(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _values(item, name)


def check_configuration(path: str, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with a string that fairseq could run.

    Raises:
        DSQError: names the file, the field and its value.
    """
    for part in _PARTS:
        for name, value in _values(state.get(part), part):
            field = name.rpartition(".")[2]
            if (field == "dataset_impl" and value == "fasta") or field == "post_save_script":
                raise DSQError(f"{path}: {name}: got {value!r}, refused: fairseq would hand it to a shell")
            if isinstance(value, str) and (field in FREE_TEXT or field.startswith("dsq_") or is_plain(value)):
                continue
            raise DSQError(
                f"{path}: {name}: got {_short(value)}, expected a plain value: fairseq runs such text as code"
            )


def _short(value: str | bytes) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def peek(path: str) -> Mapping[str, Any]:
    """What a checkpoint holds, its tensors not read where the format allows that.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is cut, corrupt, unsafe or not fairseq's; says which, without naming the file.
    """
    if os.path.isdir(path):
        raise ValueError("is a folder, expected a checkpoint")
    if os.path.getsize(path) == 0:
        raise ValueError("is empty, expected a checkpoint")
    with open(path, "rb") as file:
        start = file.read(4)
    is_zip = start == b"PK\x03\x04"  # else of the format before torch 1.6
    if is_zip:
        _check_sums(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a damaged pickle torch raises anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found or is_zip:
            what = found[1] if found else "what torch.load refuses"
            raise ValueError(f"holds {what}, refused: a checkpoint must run no code") from None
        raise ValueError("is cut or no checkpoint: torch cannot read it") from None
    if not isinstance(state, Mapping) or "model" not in state:
        raise ValueError("is no checkpoint of fairseq: it has no 'model'")
    if all(state.get(part) is None for part in _PARTS):
        raise ValueError("is no checkpoint of fairseq: it has neither 'cfg' nor 'args'")
    if "optimizer_history" not in state and not {"best_loss", "optimizer"} <= set(state):
        raise ValueError("is no checkpoint of fairseq: it has no 'optimizer_history'")
    return state


def _check_sums(path: str) -> None:
    """Refuse an archive that is not as it was written; torch.load checks no sums, and a flipped bit would pass.

    Raises:
        ValueError: says what is wrong, without naming the file.
    """
    try:
        content = zipfile.ZipFile(path)
    except Exception:  # of a damaged archive zipfile raises many
        raise ValueError("is cut: the end of the file is missing or damaged") from None
    with content:
        try:
            broken = content.testzip()
        except Exception:
            broken = "a part"
    if broken is not None:
        raise ValueError(f"is corrupt: {broken} is not what was written")


def _newest_sound_beside(path: str) -> str:
    """A clause that names the checkpoint to go on from instead of ``path``; empty if there is none."""
    folder = os.path.dirname(path) or "."
    others = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".pt")]
    others = [other for other in others if os.path.isfile(other) and not os.path.samefile(other, path)]
    for other in sorted(others, key=os.path.getmtime, reverse=True):
        try:
            state = peek(other)
            check_configuration(other, state)
        except (OSError, ValueError):
            continue
        if _POSITION not in (state.get("extra_state") or {}):
            continue
        return f"; the newest sound checkpoint beside it is {other}"
    return ""


def check_checkpoint(path: str) -> None:
    """Refuse a file that fairseq could not read, or that would run.

    Raises:
        DSQError: one line that names the file, and the newest sound checkpoint beside one that is none.
    """
    try:
        state = peek(path)
    except OSError as error:
        raise DSQError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        sound = "" if os.path.isdir(path) else _newest_sound_beside(path)
        raise DSQError(f"{path}: {error}{sound}") from None
    check_configuration(path, state)


class ModelState(OrderedDict[str, Tensor]):
    """A checkpoint's tensors, which know their ``file``: what does not fit is said of the file that was read."""

    def __init__(self, tensors: Mapping[str, Tensor], file: str) -> None:
        super().__init__(tensors)
        self.__dict__.update(getattr(tensors, "__dict__", {}))  # torch's _metadata
        self.file = file

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())  # saved, it is a plain one


def _names(overrides: Mapping[str, Any]) -> Iterator[str]:
    for name, value in overrides.items():
        yield name
        if isinstance(value, Mapping):
            yield from _names(value)


def _seen_through(criterion: str) -> str:
    """The class name of a criterion, which older checkpoints have with DSQ in front."""
    own = criterion.removeprefix("DSQ")
    return own if own in {cls.__name__ for cls in CRITERION_REGISTRY.values()} else criterion


def guard_checkpoints() -> None:
    """Have fairseq read checkpoints through :func:`check_checkpoint`, and not start anew where it is given none."""
    if hasattr(checkpoint_utils.load_checkpoint_to_cpu, "__wrapped__"):
        return
    checkpoint_utils.load_checkpoint_to_cpu = _guarded(checkpoint_utils.load_checkpoint_to_cpu)
    checkpoint_utils.load_checkpoint = _refusing_missing(checkpoint_utils.load_checkpoint)


def _guarded(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(load)
    def load_checkpoint_to_cpu(
        path: str, arg_overrides: Mapping[str, Any] | None = None, load_on_all_ranks: bool = False
    ) -> dict[str, Any]:
        refuse_unknown(_names(arg_overrides or {}))
        check_checkpoint(PathManager.get_local_path(path))
        state = load(path, arg_overrides, load_on_all_ranks)
        state["model"] = ModelState(state["model"], str(path))
        for entry in state["optimizer_history"]:
            entry["criterion_name"] = _seen_through(str(entry.get("criterion_name")))
        return state

    return load_checkpoint_to_cpu


def _refusing_missing(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_checkpoint(cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        suffix = trainer.checkpoint_suffix
        last = os.path.join(cfg.save_dir, with_suffix(LAST, suffix))
        given: tuple[str, str] | None
        if cfg.restore_file != LAST:
            given = "--restore-file", with_suffix(cfg.restore_file, suffix)
        else:  # in fairseq's order
            first = not PathManager.exists(last)
            once, model = getattr(cfg, "continue_once", None), cfg.finetune_from_model
            others = {"--continue-once": once, "--finetune-from-model": model}
            given = next((item for item in others.items() if first and item[1]), None)
        if given and not PathManager.isfile(given[1]):  # fairseq would train from the beginning, and say so in its log
            raise DSQError(f"argument {given[0]}: got {given[1]}, which is no file, expected a checkpoint")
        # Of a training before in this process: what this one has reached, its checkpoint says.
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        found = load(cfg, trainer, **passthrough_args)
        if found[1].epoch < 1:  # what fairseq takes for granted where the position lacks
            path = given[1] if given else last
            raise DSQError(
                f"{path}: has no {_POSITION!r}, expected a checkpoint that training goes on from: fairseq's crash.pt, "
                "of a training that failed, is none"
            )
        refuse_foreign_states(trainer.optimizer)
        # fairseq has told the model the checkpoint's count; without an optimizer's state it counts from 0 itself.
        trainer.get_model().set_num_updates(trainer.get_num_updates())
        return found

    return load_checkpoint
