"""What every DSQ architecture shares: flags and conversion."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fairseq_dsq import formats
from fairseq_dsq.flags import DEFAULTS, flag_error
from fairseq_dsq.formats import FormatOptions
from fairseq_dsq.models.heads import convert_heads
from fairseq_dsq.models.modes import check_modes
from fairseq_dsq.models.state import RESTARTS, DSQState, hang_on_training
from fairseq_dsq.nn import (
    BOX_DIMS,
    FLOAT32,
    GEMM_MODES,
    STASH_SCOPES,
    DSQContext,
    GemmConfig,
    convert,
    matching_patterns,
)
from fairseq_dsq.precision import parse_levels
from fairseq_dsq.quant import ROUNDINGS
from fairseq_dsq.schedule import PrecisionSchedule

logger = logging.getLogger(__name__)

# The paper's Appendix C: fixed-point training fails with gradients of 8 bits.
SAFE_GRAD_BITS = 16


def checked(flag: str, check: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type that stops with one line; argparse's own error prints pages of usage first."""

    def parse(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            flag_error(flag, str(error))

    return parse


def _levels(text: str) -> str:
    parse_levels(text)
    return text


def _patience(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"got {text!r}, expected an integer >= 1")
    return int(text)


def _min_delta(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"got {text!r}, expected a finite number >= 0")
    return value


def _choice(*values: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in values:
            raise ValueError(f"got {text!r}, expected one of {', '.join(values)}")
        return text

    return check


_FLAGS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "dsq_format": (_choice(*formats.names()), "NAME", "number format: " + ", ".join(formats.names())),
    "dsq_levels": (
        _levels,
        "LEVELS",
        "precision levels [q0,q1,q2,q3] in rising order: q0 both operands of the output GEMM, q1 the stash, "
        "q2 the weight of grad_input, q3 the gradient; one level means static stashing",
    ),
    "dsq_patience": (_patience, "N", "validations in a row without a new best before the level rises"),
    "dsq_min_delta": (_min_delta, "D", "a new best is lower than the best by more than this"),
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
    "dsq_attention_matmul": (_choice("on", "off"), "SWITCH", "quantize attention's two batched products: on, off"),
    "dsq_fixed_scale": (
        _choice("dynamic", "static"),
        "MODE",
        "fixed point's scale: dynamic, from each tensor's largest magnitude; static, half the bits are fraction",
    ),
    "dsq_stash_scope": (
        _choice(*STASH_SCOPES),
        "SCOPE",
        "what is packed for backward: gemm, what GEMMs keep; all, also what LayerNorm, softmax, activation functions "
        "and dropout keep",
    ),
    "dsq_skip": (str, "PATTERNS", "space-separated shell-style patterns of module names whose GEMMs stay float32"),
    "dsq_gemm": (
        _choice(*GEMM_MODES),
        "MODE",
        "arithmetic of the GEMMs: auto, the cheapest that multiplies the quantized values exactly; float32",
    ),
}


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the ``--dsq-*`` flags; an architecture's function fills in the defaults."""
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


def set_defaults(args: Any) -> None:
    """Give ``args`` the flags that neither the command line nor an architecture set.

    Every architecture's function calls this: fairseq-train's flags are looked at before anything is built.
    """
    check_modes(args)
    if getattr(args, "dsq_format", None) == "float32" and getattr(args, "dsq_levels", None) is None:
        args.dsq_levels = str(FLOAT32)
    for name, value in DEFAULTS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def quantize(model: nn.Module, context: DSQContext, skip: Sequence[str] = (), optional: Iterable[str] = ()) -> None:
    """:func:`fairseq_dsq.nn.convert`, and fairseq's heads that it does not know; arguments and errors are its own."""
    convert(model, context, skip, optional)
    convert_heads(model)


def attach(model: nn.Module, args: Any, task: Any, later: Sequence[str] = ()) -> None:
    """Convert a fairseq model as the flags in ``args`` say and hang its schedule on ``task``'s validation.

    Args:
        model: changed in place.
        args: the flags, after :func:`set_defaults`.
        task: the fairseq task that validates.
        later: names of layers that the model gets later and hands to :func:`convert_added`; ``--dsq-skip`` may name
            them.

    Raises:
        SystemExit: flags that contradict each other or the model; one line names the flag.
    """
    options = FormatOptions(sign_bit_extra=args.dsq_sign_bit == "extra", static_scale=args.dsq_fixed_scale == "static")
    try:
        levels = parse_levels(args.dsq_levels, args.dsq_format, options)
    except ValueError as error:
        flag_error("--dsq-levels", f"{error} (--dsq-format {args.dsq_format}, --dsq-sign-bit {args.dsq_sign_bit})")
    for number, level in enumerate(levels):
        if args.dsq_format != "float32" and level.q[3] < SAFE_GRAD_BITS:
            logger.warning(
                f"--dsq-levels: level {number} {level} has q3 = {level.q[3]} < {SAFE_GRAD_BITS}; training with so few "
                "gradient bits is known to fail (arXiv 2303.05295, Appendix C)"
            )
            break
    context = DSQContext(
        GemmConfig(levels[0], args.dsq_rounding, args.dsq_box_dim, args.dsq_gemm),
        attention_matmul=args.dsq_attention_matmul == "on",
        stash_scope=args.dsq_stash_scope,
    )
    schedule = PrecisionSchedule(len(levels), args.dsq_patience, args.dsq_min_delta)
    skip = shlex.split(args.dsq_skip)
    try:
        quantize(model, context, skip, {pattern for name in later for pattern in matching_patterns(skip, name)})
    except ValueError as error:
        flag_error("--dsq-skip" if "skip pattern" in str(error) else "--arch", str(error))
    may_restart = any(getattr(args, flag, None) for flag in RESTARTS)
    model.dsq = DSQState(levels, schedule, context, may_restart)
    hang_on_training(task)
    _warn_of_lone_workers()


def convert_added(model: nn.Module, args: Any, name: str) -> None:
    """Convert the module ``name``, which ``model`` was given after :func:`attach`; it shares the model's level.

    Raises:
        SystemExit: it cannot be converted; one line says why.
    """
    state = model.dsq
    assert isinstance(state, DSQState)
    # Inside of what contains it, so that --dsq-skip's patterns see its full name.
    tree = model.get_submodule(name)
    for part in reversed(name.split(".")):
        tree = nn.ModuleDict({part: tree})
    skip = shlex.split(args.dsq_skip)
    try:
        quantize(tree, state.context, skip, optional=skip)
    except ValueError as error:
        flag_error("--arch", str(error))


def _warn_of_lone_workers() -> None:
    """fairseq ignores torchrun's environment where there is no GPU."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world_size > 1 and not distributed and not torch.cuda.is_available():
        logger.warning(
            f"WORLD_SIZE is {world_size} but fairseq has not started distributed training: each process trains an "
            "independent copy. On CPU, start one command per rank with --distributed-init-method tcp://HOST:PORT "
            "--distributed-world-size N --distributed-rank R --distributed-no-spawn --distributed-backend gloo "
            "--ddp-backend legacy_ddp"
        )
