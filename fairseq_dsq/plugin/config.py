"""The flags of every DSQ architecture: the one list of their names, defaults, checks and help.

argparse's flags, a YAML file's entries, ``--model-overrides`` and Python's keywords, this room's README, and what other
modules know of a flag derive from :class:`DSQConfig`.
"""

# fairseq and OmegaConf read the types of a configuration's fields: no annotation here may be a string.

import argparse
import contextlib
import dataclasses
import difflib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue

from fairseq_dsq import formats, gemm, schedules
from fairseq_dsq.errors import DSQError, flag_error
from fairseq_dsq.flags import Check, Choice, Role, boolean, choice, flag, integer, number
from fairseq_dsq.nn import BOX_DIMS, FLOAT32, ROTATIONS, STASH_SCOPES, VALUE_BOXES, WEIGHT_SCALES, weight_format
from fairseq_dsq.plugin.modes import check_modes, flag_of, trains
from fairseq_dsq.precision import parse_levels
from fairseq_dsq.quantized import ROUNDINGS
from fairseq_dsq.text import quoted

CRITERION_PREFIX = "dsq_"  # of the name of fairseq's criterion that it is made from


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


def _gemm(value: Any) -> str:
    found = choice(gemm.AUTO, *gemm.names())(value)
    gemm.check_mode(found)
    return found


def _rules(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {quoted(value)}, expected rules such as '*.fc2=[4,4,4,16]; decoder.*=float32'")
    return value


def _box_size(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch("[1-9][0-9]{0,8}|row|tensor|", text):
        raise ValueError(f"got {quoted(value)}, expected an integer >= 1, row or tensor")
    return text


def _weight_format(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {quoted(value)}, expected a format such as int8/row or ternary")
    return weight_format(value).text


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


@dataclass
class _LevelConfig:
    dsq_format: str = flag("bfp", Choice(formats.names), "NAME", "number format:", "levels")
    dsq_levels: str = flag(
        "[4,4,4,16] [16,4,4,16]",
        _levels,
        "LEVELS",
        "precision levels [q0,q1,q2,q3], rising under --dsq-schedule plateau: q0 both operands of the output GEMM, q1 "
        "the stash, q2 the weight of grad_input, q3 the gradient; one level means static stashing",
        "levels",
    )


def _with_schedules(config: type) -> Any:
    """A configuration with ``--dsq-schedule`` and the flags of every policy."""
    text = "what changes the level, and when:"
    fields: list[tuple[str, type, Any]] = [
        ("dsq_schedule", str, flag("plateau", Choice(schedules.names), "NAME", text, "schedule"))
    ]
    fields += [
        (f"dsq_{name}", kind, dataclasses.field(default=field.default, metadata=field.metadata))
        for name, kind, field in schedules.flags()
    ]
    return dataclasses.make_dataclass("_ScheduleConfig", fields, bases=(config,))


@dataclass
class DSQConfig(_with_schedules(_LevelConfig)):  # type: ignore[misc]
    """Flags of a quantized model (arXiv 2303.05295, section 4)."""

    dsq_rounding: str = flag(
        "nearest",
        choice(*ROUNDINGS),
        "MODE",
        "rounding in training (evaluation rounds to nearest):",
        "training",
    )
    dsq_sign_bit: str = flag(
        "counted",
        choice("counted", "extra"),
        "MODE",
        "counted: q holds the sign bit; extra: the sign comes on top of q magnitude bits",
        "levels",
    )
    dsq_box_dim: str = flag(
        "reduction",
        choice(*BOX_DIMS),
        "DIM",
        "boxes lie along the reduction dimension of the GEMM that reads them, or along the last:",
    )
    dsq_value_boxes: str = flag(
        "row",
        choice(*VALUE_BOXES),
        "MODE",
        "what shares an exponent of attention's values, of which no two positions do: row, all of a position and head; "
        "feature, boxes along the features, as in float16 and of nvfp4 either way",
    )
    dsq_attention_matmul: str = flag("on", choice("on", "off"), "SWITCH", "quantize attention's two batched products:")
    dsq_fixed_scale: str = flag(
        "dynamic",
        choice(*formats.FIXED_SCALES),
        "MODE",
        "fixed point's scale: dynamic, from each tensor's largest magnitude (a sentence then depends on its batch); "
        "row, from each row's; static, half the bits are fraction",
        "levels",
    )
    dsq_scale: str = flag(
        "floor",
        choice(*formats.SCALE_RULES),
        "MODE",
        "scale of a box, or of a tensor in dynamic fixed point: floor, from the power of two below its largest "
        "magnitude, values above the largest code clip; fit, twice that where one would, so that none does",
        "levels",
    )
    dsq_box_size: str = flag(
        "",
        _box_size,
        "N",
        "values that share a scale, of bfp and nvfp4 (by itself 16), mx (32), int (row), fp8 and ternary (tensor): a "
        "number of them; row, all of a row (not nvfp4); tensor, all (not bfp, mx, nvfp4)",
        "levels",
    )
    dsq_stash_scope: str = flag(
        "gemm",
        choice(*STASH_SCOPES),
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
    dsq_rules: str = flag(
        "",
        _rules,
        "RULES",
        "levels of modules by name, as in 'decoder.output_projection=float32; *.fc2=[4,4,4,16] [16,4,4,16]': one, or "
        "as many as --dsq-levels; the first pattern that matches wins, --dsq-skip's before all",
    )
    dsq_rotate: str = flag(
        "off",
        choice(*ROTATIONS),
        "GEMMS/N",
        "random Hadamard rotation of a GEMM's operands along its reduction, in blocks of N, before they are quantized: "
        "of grad_weight (along tokens, as NVFP4's recipe has it), or backward, grad_input (along output features) too:",
        "training",
    )
    dsq_weights: str = flag(
        "float",
        choice("float", "direct"),
        "KIND",
        "what the weights of quantized layers are held as: float; or direct, integer codes and no float, which an "
        "optimizer that knows them updates by stochastically rounded integers",
    )
    dsq_weight_format: str = flag(
        "int8/row",
        _weight_format,
        "FORMAT",
        "with --dsq-weights direct: of the codes, int or ternary with a scale by row or tensor; all GEMMs read them",
    )
    dsq_weight_scale: str = flag(
        "own",
        choice(*WEIGHT_SCALES),
        "RULE",
        "with --dsq-weights direct: what the scale follows from, once: own, int's largest magnitude and ternary's "
        "mean; absmean, the mean magnitude is the largest code (clips); absmax, the largest is; mse, the multiple of "
        "the mean with the least squared error",
        "training",
    )
    dsq_gemm: str = flag(
        gemm.AUTO,
        _gemm,
        "ENGINE",
        "engine of the GEMMs: auto, the cheapest that multiplies the quantized values exactly; or one by name, which "
        "leaves to float32 what it does not take (generation's held weights, whatever is given): "
        + ", ".join(gemm.names()),
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


@dataclass
class DSQOptimizerConfig:
    """The flags that ``--optimizer dsq_adam`` has beside those of fairseq's Adam."""

    dsq_moment1: str = dataclasses.field(
        default="int8/row",
        metadata={"help": "format of Adam's first moment, such as int8/row, int8/128, float32; small tensors: float32"},
    )
    dsq_moment2: str = dataclasses.field(
        default="log8/row",
        metadata={"help": "format of Adam's second moment; beside a logarithmic one the first is held as m/sqrt(v)"},
    )
    dsq_moment_rounding: str = dataclasses.field(
        default="stochastic", metadata={"help": "rounding of the moments: " + ", ".join(ROUNDINGS)}
    )
    dsq_residual: str = dataclasses.field(
        default="none",
        metadata={
            "help": "with --dsq-weights direct: moment1 gives what rounding leaves undone of an update to the first "
            "moment; none drops it"
        },
    )


# The flags beside an architecture's own, and what has them.
OTHER_CONFIGS: dict[type, str] = {
    DSQCriterionConfig: f"--criterion {CRITERION_PREFIX}<criterion>",
    DSQOptimizerConfig: "--optimizer dsq_adam",
}


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
    check, text = field.metadata.get("check"), str(field.metadata["help"])
    return f"{text} {', '.join(check.values())}" if isinstance(check, Choice) and text.endswith(":") else text


def add_args(parser: argparse.ArgumentParser, config: type[DSQConfig] = DSQConfig) -> None:
    """Add a configuration's flags; :func:`set_defaults` fills in the defaults, and checks all entrances.

    Raises:
        DSQError: this process is fairseq-train, and was given a flag that is nearly one of these.
    """
    if trains():  # fairseq's parser would answer with pages of usage
        refuse_unknown_flags(sys.argv[1:])
    for field in dataclasses.fields(config):
        add_flag(parser, field)


def add_flag(parser: argparse._ActionsContainer, field: "dataclasses.Field[Any]") -> None:
    """Add one of a configuration's flags."""
    check, text = field.metadata.get("check", str), _help(field)
    if check is boolean:
        parser.add_argument(option(field.name), action="store_true", help=text)
        return
    parser.add_argument(
        option(field.name),
        type=checked(field.name, check),
        metavar=field.metadata.get("metavar", "VALUE"),
        help=f"{text} (default: {field.default!r})",
    )


def flag_table() -> str:
    """The flags of every architecture as rows of a Markdown table: flag, default, meaning."""
    rows = (
        (option(field.name), "(none)" if field.default == "" else field.default, _help(field))
        for field in dataclasses.fields(DSQConfig)
    )
    return "\n".join(f"| `{name}` | `{default}` | {text} |" for name, default, text in rows)


def _names() -> list[str]:
    """Every ``dsq_*`` flag, whatever it belongs to."""
    return [name for config in (DSQConfig, *OTHER_CONFIGS) for name in defaults(config)]


def _near(name: str) -> list[str]:
    """The flags that a misspelt one may stand for, at most two."""
    known = {name.removeprefix("dsq_"): name for name in _names()}
    spelling = name.lower().replace("-", "_").strip("_")
    return [known[match] for match in difflib.get_close_matches(spelling.removeprefix("dsq").lstrip("_"), known, n=2)]


def refuse_unknown_flags(words: Iterable[str]) -> None:
    """The same as :func:`refuse_unknown`, of a command line's words, and levels without quotes; errors are its own."""
    words, known, name = list(words), list(map(option, _names())), ""
    for before, word in itertools.pairwise(words):
        if before.startswith("--"):
            name, _, before = before.partition("=")
        if name in known and word.startswith("[") and before.rpartition("=")[2].startswith("["):
            raise DSQError(f"argument {name}: got {word} as a word of its own, expected quotes: '{before} {word}'")
    for given in (word.partition("=")[0] for word in words):
        if given.startswith("--dsq") and given not in known:
            near = " or ".join(map(option, _near(given))) or "one that fairseq-dsq flags lists"
            raise DSQError(f"{given}: no such flag, expected {near}")


def refuse_unknown(names: Iterable[Any]) -> None:
    """Refuse names that look like a ``dsq_*`` flag and are none: fairseq would keep them and nobody would read them.

    Raises:
        DSQError: names the first, and the flags that it may stand for.
    """
    known = _names()
    for name in map(str, names):
        if name.lower().startswith("dsq") and name not in known:
            expected = " or ".join(_near(name)) or "one of " + ", ".join(known)
            raise DSQError(f"{name}: no such flag, expected {expected}")


def _check_data(args: Any) -> None:
    """Refuse folders of data that are not there, which fairseq answers with a traceback.

    Raises:
        DSQError: names the first.
    """
    try:
        data = flag_of(args, "data")
    except MissingMandatoryValue:
        return
    for folder in data.split(os.pathsep) if isinstance(data, str) and "://" not in data else ():
        if not os.path.exists(folder):
            raise DSQError(f"DATA: got {quoted(folder)}, expected a folder that fairseq-preprocess made")


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
    if trains():
        _check_data(args)
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
