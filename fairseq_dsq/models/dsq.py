"""What every DSQ architecture shares: flags, conversion, and the schedule hung on fairseq's validation."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from fairseq import checkpoint_utils
from torch import Tensor, nn

from fairseq_dsq import formats
from fairseq_dsq.flags import DEFAULTS, flag_error
from fairseq_dsq.formats import FormatOptions
from fairseq_dsq.models.heads import convert_heads
from fairseq_dsq.nn import (
    BOX_DIMS,
    FLOAT32,
    GEMM_MODES,
    STASH_SCOPES,
    DSQContext,
    GemmConfig,
    convert,
    log_softmax,
    matching_patterns,
)
from fairseq_dsq.precision import PrecisionConfig, levels_to_str, parse_levels
from fairseq_dsq.quant import ROUNDINGS
from fairseq_dsq.schedule import PrecisionSchedule, ScheduleState

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
    """Give ``args`` the flags that neither the command line nor an architecture set."""
    if getattr(args, "dsq_format", None) == "float32" and getattr(args, "dsq_levels", None) is None:
        args.dsq_levels = str(FLOAT32)
    for name, value in DEFAULTS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


# With these fairseq drops the best loss of the checkpoint that it starts from, and the schedule does.
RESTARTS = ("finetune_from_model", "reset_meters", "reset_optimizer")

Shape = tuple[int, ...] | None


def _checkpoint_flag(args: Any) -> tuple[str, str]:
    """The flag that named the checkpoint which is being loaded, and the start of a message: its value where known."""
    if any(part.partition("=")[0] == "--path" for part in sys.argv):
        return "--path", ""
    name = "finetune_from_model" if getattr(args, "finetune_from_model", None) else "restore_file"
    value = getattr(args, name, None)
    return "--" + name.replace("_", "-"), f"{value}: " if value else ""


def shape_to_str(shape: Shape) -> str:
    """Such as ``30522 x 384``; a tensor that is missing is ``none``."""
    return "none" if shape is None else " x ".join(map(str, shape)) or "a number"


def _misfits(own: dict[str, Tensor], checkpoint: dict[str, Tensor]) -> Iterator[tuple[str, Shape, Shape]]:
    """(name, shape in the checkpoint, shape in the model) of the tensors that differ; those that both have first."""
    names = dict.fromkeys([*own, *checkpoint])
    for name in sorted(names, key=lambda name: name not in own or name not in checkpoint):
        has, expected = (tuple(state[name].shape) if name in state else None for state in (checkpoint, own))
        if has != expected:
            yield name, has, expected


class DSQState(nn.Module):
    """The schedule and its state, as buffers of the model: fairseq's checkpoints carry nothing else of a plugin.

    Args:
        levels: the precision levels; ``level_in_force`` is the index of the current one.
        schedule: decides when the level rises.
        context: where the level in force is put.
        may_restart: the command may begin another training from a checkpoint; only :meth:`begin_training` then refuses
            a level that ``levels`` does not have.
    """

    level: Tensor
    best_loss: Tensor
    bad_validations: Tensor

    def __init__(
        self,
        levels: Sequence[PrecisionConfig],
        schedule: PrecisionSchedule,
        context: DSQContext,
        may_restart: bool = False,
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.schedule = schedule
        self.context = context
        self.may_restart = may_restart
        for name, value in self._buffers_of(ScheduleState()).items():
            self.register_buffer(name, value)
        self._apply_level()
        self.register_load_state_dict_post_hook(DSQState._after_load)

    @staticmethod
    def _buffers_of(state: ScheduleState) -> dict[str, Tensor]:
        return {
            "level": torch.tensor(state.level),
            "best_loss": torch.tensor(state.best_loss, dtype=torch.float64),
            "bad_validations": torch.tensor(state.bad_validations),
        }

    @property
    def state(self) -> ScheduleState:
        """The schedule's state, read from the buffers."""
        return ScheduleState(int(self.level), float(self.best_loss), int(self.bad_validations))

    def validated(self, loss: float) -> None:
        """Tell the schedule a validation loss of the first valid subset."""
        before = self.state
        after = self.schedule.step(before, loss)
        for name, value in self._buffers_of(after).items():
            getattr(self, name).copy_(value)
        if after.level != before.level:
            logger.info(
                f"precision rises from {self.levels[before.level]} to {self.levels[after.level]} after "
                f"{self.schedule.patience} validations without a new best (best loss {after.best_loss})"
            )
            self._apply_level()

    def begin_training(self, restart: bool) -> None:
        """Before the first update: ``restart`` forgets what another training reached, the level and the best loss.

        Raises:
            SystemExit: the checkpoint's level is not among ``levels``, and is not forgotten.
        """
        if not restart:
            self._check_level()
        elif self.state != ScheduleState():
            logger.info(f"the precision schedule starts anew; the checkpoint was at level {int(self.level)}")
            for name, value in self._buffers_of(ScheduleState()).items():
                getattr(self, name).copy_(value)
            self._apply_level()

    def _check_level(self) -> None:
        if not 0 <= int(self.level) < len(self.levels):
            flag_error(
                "--dsq-levels",
                f"got {levels_to_str(self.levels)!r}, expected the more than {int(self.level)} levels that the "
                "checkpoint was trained with",
            )

    def _apply_level(self) -> None:
        # Kept as a number too: reading a buffer on a GPU would wait for it, every step.
        self.level_in_force = int(self.level)
        self.context.set_precision(self.levels[self.level_in_force])

    @staticmethod
    def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
        assert isinstance(module, DSQState)
        if module.may_restart and int(module.level) >= len(module.levels):
            return  # the first level stays in force
        module._check_level()
        module._apply_level()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DSQState:
        # model.half() must not round the best loss.
        best_loss = self.best_loss
        super()._apply(fn, recurse)
        self.best_loss = best_loss.to(self.level.device)
        return self

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Let checkpoints of the float model load strictly: they start at the first level."""
        for buffer, value in self._buffers_of(ScheduleState()).items():
            state_dict.setdefault(f"{name}.{buffer}", value)


class DSQModelMixin:
    """For the model classes, what every architecture does its own way under DSQ."""

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """As fairseq's, which answers a tensor that does not fit with pages; one line names the first.

        Raises:
            SystemExit: a tensor is missing, unknown or of another shape.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        except RuntimeError:
            own = self.state_dict()  # type: ignore[attr-defined]
            problem = next(_misfits(own, state_dict), None)  # fairseq has upgraded state_dict in place
            if problem is None:
                raise
            name, has, expected = problem
            args = self.args  # type: ignore[attr-defined]
            flag, file = _checkpoint_flag(args)
            blamed = self.blame(*problem)
            flag_error(flag, f"{file}{name} is {shape_to_str(has)}, expected {shape_to_str(expected)}{blamed}")

    def blame(self, name: str, has: Shape, expected: Shape) -> str:
        """What of the command line or the data gives a model's tensor its shape, to end an error's line."""
        return "; the checkpoint is of another --arch, of other flags or of another dictionary"

    def get_normalized_probs(self, net_output: Any, log_probs: bool, sample: Any = None) -> Tensor:
        """As fairseq's; ``net_output`` begins with the logits, (..., vocabulary).

        Under the stash scope ``all`` the criterion's log-probabilities keep less for backward.
        """
        context: DSQContext = self.dsq.context  # type: ignore[attr-defined]
        # With adaptive softmax the decoder's output is features.
        adaptive = getattr(getattr(self, "decoder", None), "adaptive_softmax", None)
        if log_probs and adaptive is None and context.packs_everything:
            return log_softmax(net_output[0], context)
        return super().get_normalized_probs(net_output, log_probs, sample)  # type: ignore[misc,no-any-return]


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
    _hang_on_training(task)
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


def _hang_on_training(task: Any) -> None:
    """Have ``task`` tell the model's schedule the loss of the first valid subset of every validation, and of a restart.

    ``post_validate`` runs after each subset and before the checkpoint is written; a task's own is kept.
    """
    if getattr(task, "_dsq_hooked", False):
        return
    own_begin_epoch, begin, own = task.begin_epoch, task.begin_valid_epoch, getattr(task, "post_validate", None)
    started = pending = False

    def begin_epoch(epoch: int, model: nn.Module) -> None:
        nonlocal started
        # fairseq takes its best loss from a checkpoint too, unless a reset or --finetune-from-model forbids it: what
        # another training, perhaps of another task, has reached says nothing of this one.
        if not started:
            state = model.dsq
            assert isinstance(state, DSQState)
            state.begin_training(restart=not hasattr(checkpoint_utils.save_checkpoint, "best"))
        started = True
        own_begin_epoch(epoch, model)

    def begin_valid_epoch(epoch: int, model: nn.Module) -> None:
        nonlocal pending
        pending = True
        begin(epoch, model)

    def post_validate(model: nn.Module, stats: dict[str, Any], agg: Any) -> None:
        nonlocal pending
        if own is not None:
            own(model, stats, agg)
        if pending:
            pending = False
            # As fairseq logs it, so that the log alone explains the level.
            state = model.dsq
            assert isinstance(state, DSQState)
            state.validated(float(stats["loss"]))

    task.begin_epoch = begin_epoch
    task.begin_valid_epoch = begin_valid_epoch
    task.post_validate = post_validate
    task._dsq_hooked = True


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
