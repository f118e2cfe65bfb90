"""Converts a fairseq model as its flags say, and hangs its schedule on the task that trains it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fairseq_dsq import schedules
from fairseq_dsq.errors import flag_error
from fairseq_dsq.formats import Format
from fairseq_dsq.nn import (
    DSQAttention,
    DSQContext,
    GemmConfig,
    Rotation,
    convert,
    hold_codes,
    matching_patterns,
    warn_of_float,
    weight_bytes,
    weight_format,
)
from fairseq_dsq.plugin.config import set_defaults
from fairseq_dsq.plugin.effects import levels_of, rules_of
from fairseq_dsq.plugin.hooks import hang_on_training
from fairseq_dsq.plugin.layers import convert_heads
from fairseq_dsq.plugin.modes import flag_of
from fairseq_dsq.plugin.state import DSQState, refuse_field
from fairseq_dsq.precision import PrecisionConfig, Rule
from fairseq_dsq.schedules import Policy

logger = logging.getLogger(__name__)

# Of integers, under whichever scale. The paper's Appendix C: fixed-point training fails with gradients of 8 bits.
SAFE_GRAD_BITS = 16


def quantize(
    model: nn.Module,
    context: DSQContext,
    skip: Sequence[str] = (),
    optional: Iterable[str] = (),
    rules: Sequence[Rule] = (),
) -> None:
    """:func:`fairseq_dsq.nn.convert`, and fairseq's heads that it does not know; arguments and errors are its own."""
    convert(model, context, skip, optional, warn=False, rules=rules)
    convert_heads(model)
    warn_of_float(model, [*skip, *(rule.pattern for rule in rules if not any(level.rounds for level in rule.levels))])


def attach(model: nn.Module, args: Any, task: Any, later: Sequence[str] = ()) -> None:
    """Convert a fairseq model as the flags in ``args`` say and hang its schedule on ``task``'s validation.

    Args:
        model: changed in place.
        args: the flags; :func:`set_defaults` checks them.
        task: the fairseq task that validates.
        later: names of layers that the model gets later and hands to :func:`convert_added`; ``--dsq-skip`` may name
            them.

    Raises:
        DSQError: flags that contradict each other or the model; one line names the flag.
    """
    flags: Any = set_defaults(args)  # checked: its choices are literals
    if flags.dsq_fixed_scale == "static" and flags.dsq_format == "fixed" and flags.dsq_scale != "floor":
        flag_error("--dsq-scale", f"got {flags.dsq_scale} beside --dsq-fixed-scale static, expected floor")
    try:
        levels = levels_of(flags)
    except ValueError as error:
        flag_error("--dsq-levels", f"{error} (--dsq-format {flags.dsq_format}, --dsq-sign-bit {flags.dsq_sign_bit})")
    for number, level in enumerate(levels):
        if any(member.bits < SAFE_GRAD_BITS and member.fmt.integer_elements for member in level.members[3]):
            logger.warning(
                f"--dsq-levels: level {number} {level} has q3 = {level.q[3]} < {SAFE_GRAD_BITS}; training with so few "
                "gradient bits is known to fail (arXiv 2303.05295, Appendix C)"
            )
            break
    mixing = sorted({fmt.text for level in levels for fmt in _of_activations(level, flags) if fmt.mixes})
    if mixing:
        dynamic = flags.dsq_format == "fixed" and flags.dsq_fixed_scale == "dynamic"
        logger.warning(
            f"{'--dsq-fixed-scale dynamic' if dynamic else ', '.join(mixing)}: one scale per tensor lets a sentence's "
            "result depend on its batch and a position's on later ones; row and static do not"
        )
    seed = flag_of(args, "seed")
    context = DSQContext(
        GemmConfig(
            *(levels[0], flags.dsq_rounding, flags.dsq_box_dim, flags.dsq_gemm, flags.dsq_value_boxes),
            rotation=Rotation.of(flags.dsq_rotate, 1 if seed is None else seed),
        ),
        attention_matmul=flags.dsq_attention_matmul == "on",
        stash_scope=flags.dsq_stash_scope,
    )
    schedule = _schedule(flags, levels)
    skip, rules = shlex.split(flags.dsq_skip), _rules(flags, len(levels), schedule)
    patterns = [*skip, *(rule.pattern for rule in rules)]
    optional = {pattern for name in later for pattern in matching_patterns(patterns, name)}
    try:
        quantize(model, context, skip, optional, rules)
    except ValueError as error:
        kind = str(error).partition(" pattern ")[0]
        flag_error({"skip": "--dsq-skip", "rule": "--dsq-rules"}.get(kind, "--arch"), str(error))
    _refuse_squares(model, context, levels)
    if flags.dsq_weights == "direct":
        _hold_codes(model, context, flags)
    model.dsq = DSQState(levels, schedule, context)
    hang_on_training(task, args)


def _refuse_squares(model: nn.Module, context: DSQContext, levels: tuple[PrecisionConfig, ...]) -> None:
    """Refuse levels with square boxes of a weight where attention's products follow them.

    Raises:
        DSQError: names the level and the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, DSQAttention) and module.context.attention_matmul:
            for level in context.levels_of(module.context, levels):
                if level.squares:
                    expected = (
                        "expected --dsq-attention-matmul off: squares are a weight's boxes, its products have none"
                    )
                    flag_error("--dsq-levels", f"got {level} for {name}, {expected}")


def _hold_codes(model: nn.Module, context: DSQContext, flags: Any) -> None:
    """Have the layers hold codes; heads that are added later stay float.

    Raises:
        DSQError: no layer can, or one whose weight is zeros.
    """
    try:
        names = hold_codes(model, context, weight_format(flags.dsq_weight_format), flags.dsq_weight_scale)
    except ValueError as error:
        flag_error("--dsq-weights", str(error))
    if not names:
        flag_error("--dsq-weights", "got direct, and no layer is quantized whose weight is its own, expected some")
    logger.info(
        f"--dsq-weights direct: {len(names)} weights are codes of {flags.dsq_weight_format}; all weights take "
        f"{weight_bytes(model):,} bytes"
    )


def _of_activations(level: PrecisionConfig, flags: Any) -> list[Format]:
    """The formats that activations and gradients are rounded to; attention's products have them on both sides."""
    (first, second), stash, weight, grad = level.formats
    weights = (second, *weight) if flags.dsq_attention_matmul == "on" else ()
    return [first, *stash, *grad, *weights]


def _schedule(flags: Any, levels: Sequence[PrecisionConfig]) -> Policy[Any]:
    """The policy that the flags name.

    Raises:
        DSQError: its flags are missing, or do not fit the levels.
    """
    try:
        policy = schedules.make(flags.dsq_schedule, len(levels), flags)
    except ValueError as error:
        refuse_field(error)
    try:
        policy.check(levels)
    except ValueError as error:
        flag_error("--dsq-levels", str(error))
    return policy


def _rules(flags: Any, levels: int, policy: Policy[Any]) -> tuple[Rule, ...]:
    """The rules that the flags name.

    Raises:
        DSQError: they are malformed, or the policy does not take their levels.
    """
    try:
        rules = rules_of(flags, levels)
        for rule in rules:
            policy.check(rule.levels)
    except ValueError as error:
        flag_error("--dsq-rules", str(error))
    return rules


def convert_added(model: nn.Module, args: Any, name: str) -> None:
    """Convert the module ``name``, which ``model`` was given after :func:`attach`; it shares the model's level.

    Raises:
        DSQError: it cannot be converted; one line says why.
    """
    state = model.dsq
    assert isinstance(state, DSQState)
    # Inside of what contains it, so that --dsq-skip's patterns see its full name.
    tree = model.get_submodule(name)
    for part in reversed(name.split(".")):
        tree = nn.ModuleDict({part: tree})
    skip, rules = shlex.split(args.dsq_skip), rules_of(args, len(state.levels))
    try:
        quantize(tree, state.context, skip, [*skip, *(rule.pattern for rule in rules)], rules)
    except ValueError as error:
        flag_error("--arch", str(error))
