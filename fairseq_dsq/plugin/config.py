"""The flags of every DSQ architecture: defaults, checks, help."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

from omegaconf import OmegaConf, open_dict

from fairseq_dsq import formats
from fairseq_dsq.errors import DSQError, flag_error
from fairseq_dsq.formats import FIXED_SCALES
from fairseq_dsq.nn import (
    BOX_DIMS,
    FLOAT32,
    GEMM_MODES,
    STASH_SCOPES,
    VALUE_BOXES,
)
from fairseq_dsq.plugin.modes import check_modes
from fairseq_dsq.precision import parse_levels
from fairseq_dsq.quant import ROUNDINGS
from fairseq_dsq.text import quoted

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

# Checks a flag's value, text from a command line or a value from YAML or Python, and gives it in its one form.
Check = Callable[[Any], Any]


def checked(flag: str, check: Check) -> Callable[[str], Any]:
    """An argparse type that stops with one line; argparse's own error prints pages of usage first."""

    def parse(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            sys.exit(f"{os.path.basename(sys.argv[0])}: error: argument {flag}: {error}")

    return parse


def _levels(value: Any) -> str:
    if not isinstance(value, str):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"got {quoted(value)}, expected one or more levels such as '[2,2,2,16] [16,4,4,16]'")
        levels = value if any(isinstance(level, (str, list, tuple)) for level in value) else [value]
        value = " ".join(level if isinstance(level, str) else _level(level) for level in levels)
    parse_levels(value)
    return cast(str, value)


def _level(value: Any) -> str:
    return "[" + ",".join(map(str, value if isinstance(value, (list, tuple)) else [value])) + "]"


def integer(expected: str, accepts: Callable[[int], bool]) -> Check:
    """A check of an integer."""

    def check(value: Any) -> int:
        text = value.strip() if isinstance(value, str) else str(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or not re.fullmatch("[0-9]+", text):
            raise ValueError(f"got {quoted(value)}, expected {expected}")
        if not accepts(int(text)):
            raise ValueError(f"got {quoted(value)}, expected {expected}")
        return int(text)

    return check


def number(expected: str, accepts: Callable[[float], bool]) -> Check:
    """A check of a finite number."""

    def check(value: Any) -> float:
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not (math.isfinite(found) and accepts(found)):
            raise ValueError(f"got {quoted(value)}, expected {expected}")
        return found

    return check


def boolean(value: Any) -> bool:
    """A check of a switch without a value, such as ``--head-from-pooler``."""
    if not isinstance(value, bool):
        raise ValueError(f"got {quoted(value)}, expected True or False")
    return value


def _choice(*values: str) -> Check:
    def check(value: Any) -> str:
        if isinstance(value, bool) and {"on", "off"} <= set(values):
            value = "on" if value else "off"  # YAML reads both as booleans
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"got {quoted(value)}, expected one of {', '.join(values)}")
        return value

    return check


def _patterns(value: Any) -> str:
    if isinstance(value, (list, tuple)) and all(isinstance(pattern, str) for pattern in value):
        return shlex.join(value)
    if not isinstance(value, str):
        raise ValueError(f"got {quoted(value)}, expected space-separated patterns of module names")
    try:
        shlex.split(value)
    except ValueError as error:
        raise ValueError(f"got {quoted(value)}: {error}") from None
    return value


_FLAGS: dict[str, tuple[Check, str, str]] = {
    "dsq_format": (_choice(*formats.names()), "NAME", "number format: " + ", ".join(formats.names())),
    "dsq_levels": (
        _levels,
        "LEVELS",
        "precision levels [q0,q1,q2,q3] in rising order: q0 both operands of the output GEMM, q1 the stash, "
        "q2 the weight of grad_input, q3 the gradient; one level means static stashing",
    ),
    "dsq_patience": (
        integer("an integer >= 1", lambda value: value >= 1),
        "N",
        "validations in a row without a new best before the level rises",
    ),
    "dsq_min_delta": (
        number("a finite number >= 0", lambda value: value >= 0),
        "D",
        "a new best is lower than the best by more than this",
    ),
    "dsq_rounding": (
        _choice(*ROUNDINGS),
        "MODE",
        "rounding in training (evaluation rounds to nearest): " + ", ".join(ROUNDINGS),
    ),
    "dsq_sign_bit": (
        _choice("counted", "extra"),
        "MODE",
        "counted: q holds the sign bit; extra: the sign comes on top of q magnitude bits",
    ),
    "dsq_box_dim": (
        _choice(*BOX_DIMS),
        "DIM",
        "boxes lie along the reduction dimension of the GEMM that reads them, or along the last: "
        + ", ".join(BOX_DIMS),
    ),
    "dsq_value_boxes": (
        _choice(*VALUE_BOXES),
        "MODE",
        "what shares an exponent of attention's values, of which no two positions do: row, all of a position and head; "
        "feature, boxes along the features",
    ),
    "dsq_attention_matmul": (_choice("on", "off"), "SWITCH", "quantize attention's two batched products: on, off"),
    "dsq_fixed_scale": (
        _choice(*FIXED_SCALES),
        "MODE",
        "fixed point's scale: dynamic, from each tensor's largest magnitude (a sentence then depends on its batch); "
        "row, from each row's; static, half the bits are fraction",
    ),
    "dsq_scale": (
        _choice(*formats.SCALES),
        "MODE",
        "scale of a box, or of a tensor in dynamic fixed point: floor, from the power of two below its largest "
        "magnitude, values above the largest code clip; fit, twice that where one would, so that none does",
    ),
    "dsq_stash_scope": (
        _choice(*STASH_SCOPES),
        "SCOPE",
        "what is packed for backward: gemm, what GEMMs keep; all, also what LayerNorm, softmax, activation functions "
        "and dropout keep",
    ),
    "dsq_skip": (
        _patterns,
        "PATTERNS",
        "space-separated shell-style patterns of module names whose GEMMs stay float32",
    ),
    "dsq_gemm": (
        _choice(*GEMM_MODES),
        "MODE",
        "arithmetic of the GEMMs: auto, the cheapest that multiplies the quantized values exactly; float32",
    ),
}


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the ``--dsq-*`` flags; :func:`set_defaults` fills in the defaults, and checks all entrances."""
    for name, (check, metavar, text) in _FLAGS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=checked(flag, check), metavar=metavar, help=f"{text} (default: {DEFAULTS[name]!r})"
        )


def flag_table() -> str:
    """The flags as rows of a Markdown table: flag, default, meaning."""
    rows = (
        (name.replace("_", "-"), "(none)" if DEFAULTS[name] == "" else DEFAULTS[name], text)
        for name, (_, _, text) in _FLAGS.items()
    )
    return "\n".join(f"| `--{flag}` | `{default}` | {text} |" for flag, default, text in rows)


def refuse_unknown(names: Iterable[Any]) -> None:
    """Refuse names that look like a ``dsq_*`` flag and are none: fairseq would keep them and nobody would read them.

    Raises:
        DSQError: names the first, and the flags that it may stand for.
    """
    known = {name.removeprefix("dsq_"): name for name in (*DEFAULTS, PROFILE_FIELD)}
    for name in names:
        spelling = str(name).lower().replace("-", "_")
        if spelling.startswith("dsq") and name not in known.values():
            near = difflib.get_close_matches(spelling.removeprefix("dsq").lstrip("_"), known, n=2)
            expected = " or ".join(known[match] for match in near) or "one of " + ", ".join(known.values())
            raise DSQError(f"{name}: no such flag, expected {expected}")


def set_defaults(args: Any, own: Mapping[str, tuple[Check, Any]] = MappingProxyType({})) -> None:
    """Give ``args`` the flags that are not set, and check those that are: every entrance to a model passes here.

    A command line, a YAML file, ``--model-overrides``, ``from_pretrained(..., dsq_patience=3)`` and Python thus mean
    the same: numbers may be text, levels lists, on and off booleans. fairseq's own flags are looked at too, before
    anything is built.

    Args:
        args: a namespace or a configuration, changed in place.
        own: check and default of the flags that the architecture has beside these.

    Raises:
        DSQError: a value that the flag does not take, or a name that is nearly a flag's.
    """
    check_modes(args)
    is_config = OmegaConf.is_config(args)
    refuse_unknown(list(args) if is_config else vars(args))
    if getattr(args, "dsq_format", None) == "float32" and getattr(args, "dsq_levels", None) is None:
        default_levels = str(FLOAT32)
    else:
        default_levels = DEFAULTS["dsq_levels"]
    flags = {name: (check, DEFAULTS[name]) for name, (check, _, _) in _FLAGS.items()}
    flags["dsq_levels"] = (_levels, default_levels)
    with open_dict(args) if is_config else contextlib.nullcontext():
        for name, (check, default) in {**flags, **own}.items():
            value = getattr(args, name, None)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value)
            try:
                setattr(args, name, check(default if value is None else value))
            except ValueError as error:
                flag_error("--" + name.replace("_", "-"), str(error))
