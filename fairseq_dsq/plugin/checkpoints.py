"""What makes a fairseq model its quantized twin: flags, building, and a checkpoint that does not fit, in one line."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.utils import safe_hasattr
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from fairseq_dsq.errors import DSQError
from fairseq_dsq.nn import DSQContext, log_softmax
from fairseq_dsq.plugin.attach import attach
from fairseq_dsq.plugin.config import add_args, set_defaults

Shape = tuple[int, ...] | None


def shape_to_str(shape: Shape) -> str:
    """Such as ``30522 x 384``; a tensor that is missing is ``none``."""
    return "none" if shape is None else " x ".join(map(str, shape)) or "a number"


def _misfits(own: dict[str, Tensor], checkpoint: dict[str, Tensor]) -> Iterator[tuple[str, Shape, Shape]]:
    """(name, shape in the checkpoint, shape in the model) of the tensors that differ; those that both have first.

    The schedule's entries fit whatever they are, see :class:`fairseq_dsq.plugin.state.Record`.
    """
    names = [name for name in dict.fromkeys([*own, *checkpoint]) if not name.startswith("dsq.")]
    for name in sorted(names, key=lambda name: name not in own or name not in checkpoint):
        has, expected = (tuple(state[name].shape) if name in state else None for state in (checkpoint, own))
        if has != expected:
            yield name, has, expected


def base_dataclass(cls: type) -> Any:
    """The dataclass that a model, or the nearest model it derives from, is registered with; None for legacy models."""
    # register_model gives a class of its own the value None where it is registered without.
    return next((found for base in cls.__mro__ if (found := vars(base).get("__dataclass")) is not None), None)


def _fill_from(dataclass: Any, args: Any) -> None:
    """Give ``args`` the fields that no flag and no architecture set, as fairseq does for the float model."""
    with open_dict(args) if OmegaConf.is_config(args) else contextlib.nullcontext():
        for name, value in vars(dataclass()).items():
            if not name.startswith("_") and not safe_hasattr(args, name):
                # What refers to another part of the configuration is a flag of the task, here without a value.
                setattr(args, name, None if str(value).startswith("${") else value)


class DSQModelMixin:
    """Makes a fairseq model its quantized twin; put in front of the model's class.

    The twin is registered without a dataclass and has all flags of the model, whether that has one or not. Its
    architectures' functions call :func:`set_defaults` and the model's own. It needs nothing of the model but
    ``nn.Linear`` layers and fairseq's attention::

        @register_model("transformer_lm_dsq")
        class TransformerLanguageModelDSQ(DSQModelMixin, TransformerLanguageModel):
            pass


        @register_model_architecture("transformer_lm_dsq", "transformer_lm_dsq")
        def transformer_lm_dsq(args):
            set_defaults(args)
            base_lm_architecture(args)
    """

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of the float model, and ``--dsq-*``."""
        super().add_args(parser)  # type: ignore[misc]
        if (dataclass := base_dataclass(cls)) is not None:
            gen_parser_from_dataclass(parser, dataclass(), delete_default=True)
        add_args(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        """The float model of ``args``, converted.

        Raises:
            DSQError: a flag that is refused; names it.
        """
        set_defaults(args)
        if (dataclass := base_dataclass(cls)) is not None:
            _fill_from(dataclass, args)
        model = super().build_model(args, task)  # type: ignore[misc]
        attach(model, args, task)
        return model

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """As fairseq's, which answers a tensor that does not fit with pages; one line names the first.

        Raises:
            DSQError: a tensor is missing, unknown or of another shape; names the file if it was read from one.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        except RuntimeError:
            own = self.state_dict()  # type: ignore[attr-defined]
            problem = next(_misfits(own, state_dict), None)  # fairseq has upgraded state_dict in place
            if problem is None:
                raise
            name, has, expected = problem
            file = getattr(state_dict, "file", "the checkpoint")
            blamed = self.blame(*problem)
            raise DSQError(
                f"{file}: {name} is {shape_to_str(has)}, expected {shape_to_str(expected)}{blamed}"
            ) from None

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
