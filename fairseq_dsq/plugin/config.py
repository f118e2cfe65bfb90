"""The flags of every DSQ architecture: the one list of their names, defaults, checks and help.

argparse's flags, a YAML file's entries, ``--model-overrides`` and Python's keywords, README's table, and what other
modules know of a flag derive from :class:`DSQConfig`.
"""

# fairseq and OmegaConf read the types of a configuration's fields: no annotation here may be a string.

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from omegaconf import OmegaConf, open_dict

from fairseq_dsq import formats
from fairseq_dsq.errors import DSQError, flag_error
from fairseq_dsq.nn import BOX_DIMS, FLOAT32, GEMM_MODES, STASH_SCOPES, VALUE_BOXES
from fairseq_dsq.plugin.modes import check_modes
from fairseq_dsq.precision import parse_levels
from fairseq_dsq.quant import ROUNDINGS
from fairseq_dsq.text import quoted

CRITERION_PREFIX = "dsq_"  # of the name of fairseq's criterion that it is made from

# Checks a flag's value, text from a command line or a value from YAML or Python, and gives it in its one form.
Check = Callable[[Any], Any]
# What a flag decides: the levels, by value; when they rise; what evaluation computes too; or training alone.
Role = Literal["levels", "schedule", "evaluation", "training"]


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


@dataclass(frozen=True)
class Choice:
    """A check of a name among ``values()``."""

    values: Callable[[], Sequence[str]]

    def __call__(self, value: Any) -> str:
        values = self.values()
        if isinstance(value, bool) and {"on", "off"} <= set(values):
            value = "on" if value else "off"  # YAML reads both as booleans
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"got {quoted(value)}, expected one of {', '.join(values)}")
        return value


def _choice(*values: str) -> Choice:
    return Choice(lambda: values)


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


def flag(default: Any, check: Check, metavar: str, help: str, role: Role = "evaluation", plain: bool = True) -> Any:
    """A field of a configuration.

    Args:
        help: one that ends in a colon is completed by the values of its :class:`Choice`.
        plain: the float model has the flag's effect too, or does not need it; else only the default can be exported.
    """
    metadata = {"check": check, "metavar": metavar, "help": help, "role": role, "plain": plain}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class DSQConfig:
    """Flags of a quantized model; the defaults are the paper's levels and patience (arXiv 2303.05295, section 4)."""

    dsq_format: str = flag("bfp", Choice(formats.names), "NAME", "number format:", "levels")
    dsq_levels: str = flag(
        "[2,2,2,16] [16,4,4,16]",
        _levels,
        "LEVELS",
        "precision levels [q0,q1,q2,q3] in rising order: q0 both operands of the output GEMM, q1 the stash, "
        "q2 the weight of grad_input, q3 the gradient; one level means static stashing",
        "levels",
    )
    dsq_patience: int = flag(
        5,
        integer("an integer >= 1", lambda value: value >= 1),
        "N",
        "validations in a row without a new best before the level rises",
        "schedule",
    )
    dsq_min_delta: float = flag(
        0.0,
        number("a finite number >= 0", lambda value: value >= 0),
        "D",
        "a new best is lower than the best by more than this",
        "schedule",
    )
    dsq_rounding: str = flag(
        "nearest",
        _choice(*ROUNDINGS),
        "MODE",
        "rounding in training (evaluation rounds to nearest):",
        "training",
    )
    dsq_sign_bit: str = flag(
        "counted",
        _choice("counted", "extra"),
        "MODE",
        "counted: q holds the sign bit; extra: the sign comes on top of q magnitude bits",
        "levels",
    )
    dsq_box_dim: str = flag(
        "reduction",
        _choice(*BOX_DIMS),
        "DIM",
        "boxes lie along the reduction dimension of the GEMM that reads them, or along the last:",
    )
    dsq_value_boxes: str = flag(
        "row",
        _choice(*VALUE_BOXES),
        "MODE",
        "what shares an exponent of attention's values, of which no two positions do: row, all of a position and head; "
        "feature, boxes along the features",
    )
    dsq_attention_matmul: str = flag("on", _choice("on", "off"), "SWITCH", "quantize attention's two batched products:")
    dsq_fixed_scale: str = flag(
        "dynamic",
        _choice(*formats.FIXED_SCALES),
        "MODE",
        "fixed point's scale: dynamic, from each tensor's largest magnitude (a sentence then depends on its batch); "
        "row, from each row's; static, half the bits are fraction",
        "levels",
    )
    dsq_scale: str = flag(
        "floor",
        _choice(*formats.SCALES),
        "MODE",
        "scale of a box, or of a tensor in dynamic fixed point: floor, from the power of two below its largest "
        "magnitude, values above the largest code clip; fit, twice that where one would, so that none does",
        "levels",
    )
    dsq_stash_scope: str = flag(
        "gemm",
        _choice(*STASH_SCOPES),
        "SCOPE",
        "what is packed for backward: gemm, what GEMMs keep; all, also what LayerNorm, softmax, activation functions "
        "and dropout keep",
        "training",
    )
    dsq_skip: str = flag(
        "",
        _patterns,
        "PATTERNS",
        "space-separated shell-style patterns of module names whose GEMMs stay float32",
    )
    dsq_gemm: str = flag(
        "auto",
        _choice(*GEMM_MODES),
        "MODE",
        "arithmetic of the GEMMs: auto, the cheapest that multiplies the quantized values exactly; float32",
        "training",
    )

    @classmethod
    def of(cls, args: Any) -> "DSQConfig":
        """The flags that ``args`` has, unchecked; the others' defaults, for checkpoints older than they are."""
        return cls(**{name: getattr(args, name, default) for name, default in defaults(cls).items()})


@dataclass
class DSQEncoderConfig(DSQConfig):
    """Flags of ``roberta_dsq``: what BERT has beyond RoBERTa."""

    token_types: int = flag(
        0,
        integer("0, for none, or an integer >= 2", lambda value: value != 1),
        "N",
        "token types (segments), BERT's 2: what stands after the first </s> is of type 1; 0 for none",
        plain=False,
    )
    layer_norm_eps: float = flag(
        1e-5,
        number("a finite number > 0", lambda value: value > 0),
        "E",
        "epsilon of every LayerNorm; BERT has 1e-12",
        plain=False,
    )
    head_from_pooler: bool = flag(
        False,
        boolean,
        "",
        "start the classification head's dense layer from the pooler of a checkpoint that convert-hf made",
        "training",
    )


@dataclass
class DSQCriterionConfig:
    """The flag that every ``dsq_<criterion>`` has beside the criterion's own."""

    dsq_cost_profile: str = dataclasses.field(
        default="paper",
        metadata={"help": "cost profile that the dsq_* metrics follow: a name in configs/cost/ or a path of one's own"},
    )


def defaults(config: type, *roles: Role) -> dict[str, Any]:
    """Names and defaults of a configuration's flags, of some roles alone if any are given."""
    fields = dataclasses.fields(config)
    return {field.name: field.default for field in fields if not roles or field.metadata.get("role") in roles}


def option(name: str) -> str:
    """A field's flag: ``--dsq-format``."""
    return "--" + name.replace("_", "-")


def checked(name: str, check: Check) -> Callable[[str], Any]:
    """An argparse type that stops with one line; argparse's own error prints pages of usage first."""

    def parse(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            sys.exit(f"{os.path.basename(sys.argv[0])}: error: argument {option(name)}: {error}")

    return parse


def _help(field: "dataclasses.Field[Any]") -> str:
    check, text = field.metadata["check"], str(field.metadata["help"])
    return f"{text} {', '.join(check.values())}" if isinstance(check, Choice) and text.endswith(":") else text


def add_args(parser: argparse.ArgumentParser, config: type[DSQConfig] = DSQConfig) -> None:
    """Add a configuration's flags; :func:`set_defaults` fills in the defaults, and checks all entrances."""
    for field in dataclasses.fields(config):
        check, text = field.metadata["check"], _help(field)
        if check is boolean:
            parser.add_argument(option(field.name), action="store_true", help=text)
            continue
        parser.add_argument(
            option(field.name),
            type=checked(field.name, check),
            metavar=field.metadata["metavar"],
            help=f"{text} (default: {field.default!r})",
        )


def flag_table() -> str:
    """The flags of every architecture as rows of a Markdown table: flag, default, meaning."""
    rows = (
        (option(field.name), "(none)" if field.default == "" else field.default, _help(field))
        for field in dataclasses.fields(DSQConfig)
    )
    return "\n".join(f"| `{name}` | `{default}` | {text} |" for name, default, text in rows)


def refuse_unknown(names: Iterable[Any]) -> None:
    """Refuse names that look like a ``dsq_*`` flag and are none: fairseq would keep them and nobody would read them.

    Raises:
        DSQError: names the first, and the flags that it may stand for.
    """
    flags = (name for config in (DSQConfig, DSQCriterionConfig) for name in defaults(config))
    known = {name.removeprefix("dsq_"): name for name in flags}
    for name in names:
        spelling = str(name).lower().replace("-", "_")
        if spelling.startswith("dsq") and name not in known.values():
            near = difflib.get_close_matches(spelling.removeprefix("dsq").lstrip("_"), known, n=2)
            expected = " or ".join(known[match] for match in near) or "one of " + ", ".join(known.values())
            raise DSQError(f"{name}: no such flag, expected {expected}")


def set_defaults(args: Any, config: type[DSQConfig] = DSQConfig) -> DSQConfig:
    """Give ``args`` the flags that are not set, and check those that are: every entrance to a model passes here.

    A command line, a YAML file, ``--model-overrides``, ``from_pretrained(..., dsq_patience=3)`` and Python thus mean
    the same: numbers may be text, levels lists, on and off booleans. fairseq's own flags are looked at too, before
    anything is built.

    Args:
        args: a namespace or a configuration, changed in place.
        config: the architecture's flags.

    Returns:
        The flags.

    Raises:
        DSQError: a value that the flag does not take, or a name that is nearly a flag's.
    """
    check_modes(args)
    is_config = OmegaConf.is_config(args)
    refuse_unknown(list(args) if is_config else vars(args))
    values = defaults(config)
    if getattr(args, "dsq_format", None) == "float32":
        values["dsq_levels"] = str(FLOAT32)
    with open_dict(args) if is_config else contextlib.nullcontext():
        for field in dataclasses.fields(config):
            value = getattr(args, field.name, None)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value)
            try:
                setattr(args, field.name, field.metadata["check"](values[field.name] if value is None else value))
            except ValueError as error:
                flag_error(option(field.name), str(error))
    return config.of(args)
