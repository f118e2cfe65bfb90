"""The quantized twin of a fairseq model: its flags, its building, its architectures, and its checkpoints' fit."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_INV_REGISTRY,
    MODEL_REGISTRY,
    register_model,
    register_model_architecture,
)
from fairseq.utils import safe_hasattr
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from fairseq_dsq.errors import DSQError
from fairseq_dsq.nn import DSQContext, formats_of_codes, holds_codes, log_softmax
from fairseq_dsq.plugin.attach import attach, convert_added
from fairseq_dsq.plugin.checkpoints import Shape, misfit, shape_to_str
from fairseq_dsq.plugin.config import DSQConfig, add_args, set_defaults

logger = logging.getLogger(__name__)

SUFFIX = "_dsq"
# Where fairseq's encoders keep the heads that a task registers once the model is built.
HEADS = "classification_heads"


def base_dataclass(cls: type) -> Any:
    """The dataclass that a model, or the nearest model it derives from, is registered with; None for legacy models."""
    # register_model gives a class of its own the value None where it is registered without.
    return next((found for base in cls.__mro__ if (found := vars(base).get("__dataclass")) is not None), None)


def _fill_from(dataclass: Any, args: Any) -> None:
    """Give ``args`` the fields that no flag and no architecture set, as fairseq does for the float model."""
    is_config = OmegaConf.is_config(args)
    with open_dict(args) if is_config else contextlib.nullcontext():
        for name, value in vars(dataclass()).items():
            if name.startswith("_") or safe_hasattr(args, name):
                continue
            if (text := str(value)).startswith("${"):  # another section's: argparse's namespace has it already
                value = OmegaConf.select(args._get_root(), text[2:-1]) if is_config else None
            setattr(args, name, value)


class DSQModelMixin:
    """Makes a fairseq model its quantized twin; :func:`dsq_twin` puts it in front of the model's class.

    The twin is registered without a dataclass and has all flags of the model, whether that has one or not. It needs
    nothing of the model but ``nn.Linear`` layers and fairseq's attention.

    Attributes:
        config: the flags that it has beside the model's.
    """

    config: type[DSQConfig] = DSQConfig

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of the float model, and ``config``'s."""
        super().add_args(parser)  # type: ignore[misc]
        if (dataclass := base_dataclass(cls)) is not None:
            gen_parser_from_dataclass(parser, dataclass(), delete_default=True)
        add_args(parser, cls.config)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        """The float model of ``args``, extended and converted.

        Raises:
            DSQError: a flag that is refused; names it.
        """
        set_defaults(args, cls.config)
        if (dataclass := base_dataclass(cls)) is not None:
            _fill_from(dataclass, args)
        model = super().build_model(args, task)  # type: ignore[misc]
        if not isinstance(model, cls):  # a model that builds its class by name
            model.__class__ = cls
        model.args = args  # some of fairseq's models have it, and what is registered later reads it
        model.extend()
        model.attach(task)
        return model

    def extend(self) -> None:
        """Give the float model, before it is converted, what the flags ask for beyond fairseq's."""

    def attach(self, task: Any) -> None:
        """Convert the model."""
        attach(self, self.args, task)  # type: ignore[arg-type, attr-defined]

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """As fairseq's, which answers a tensor that does not fit with pages; one line names the first.

        Raises:
            DSQError: a tensor is missing, unknown or of another shape; names the file if it was read from one.
        """
        of_codes = getattr(self.args, "dsq_weight_format", None)  # type: ignore[attr-defined]
        if others := formats_of_codes(state_dict) - {of_codes}:
            file = getattr(state_dict, "file", "the checkpoint")
            logger.warning(f"{file}: weights held as {', '.join(sorted(others))} are encoded again as {of_codes}")
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        except RuntimeError:
            own = self.state_dict()  # type: ignore[attr-defined]
            problem = misfit(own, state_dict)  # fairseq has upgraded state_dict in place
            if problem is None:
                raise
            name, has, expected = problem
            file = getattr(state_dict, "file", "the checkpoint")
            blamed = self.blame(*problem)
            if holds_codes(state_dict) and not holds_codes(own):
                blamed = "; the checkpoint holds codes: expected --dsq-weights direct, or fairseq-dsq export-float"
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


class HeadsMixin(DSQModelMixin):
    """For models with heads that a task registers once the model is built."""

    def attach(self, task: Any) -> None:
        """Convert the model; ``--dsq-skip`` may name layers of the head to come, which starts as the float model's."""
        head = getattr(task.cfg, "classification_head_name", None)
        later = [f"{HEADS}.{head}.{layer}" for layer in ("dense", "out_proj")] if head else []
        with torch.random.fork_rng(devices=[]):
            attach(self, self.args, task, later)  # type: ignore[arg-type, attr-defined]

    def register_classification_head(
        self, name: str, num_classes: int | None = None, inner_dim: int | None = None, **kwargs: Any
    ) -> None:
        """As fairseq's; the head is quantized at the model's level."""
        super().register_classification_head(name, num_classes, inner_dim, **kwargs)  # type: ignore[misc]
        convert_added(self, self.args, f"{HEADS}.{name}")  # type: ignore[arg-type, attr-defined]


def twin_arch(model: str, arch: str) -> str:
    """The name of an architecture's twin: ``transformer_dsq_iwslt_de_en``; of ``bart``, ``mbart_large_dsq``."""
    rest = arch.removeprefix(model)
    return f"{model}{SUFFIX}{rest}" if arch.startswith(model) and rest[:1] in ("", "_") else arch + SUFFIX


def _architecture(own: Callable[[Any], None], config: type[DSQConfig]) -> Callable[[Any], None]:
    def set_architecture(args: Any) -> None:
        set_defaults(args, config)
        own(args)

    return set_architecture


def dsq_twin(name: str, mixin: type[DSQModelMixin] | None = None) -> type:
    """Register ``<name>_dsq``, the quantized twin of a fairseq model, and the twins of all its architectures.

    Args:
        name: a registered model, legacy or with a dataclass.
        mixin: what the twin has beyond :class:`DSQModelMixin`.

    Returns:
        The twin's class; parameter names and shapes are the float model's.

    Raises:
        DSQError: no such model.
    """
    base = MODEL_REGISTRY.get(name)
    if base is None:
        raise DSQError(f"got {name!r}, expected a model that fairseq has registered")
    mixin = mixin or (HeadsMixin if hasattr(base, "register_classification_head") else DSQModelMixin)
    about = f"fairseq's ``{name}`` with every GEMM quantized; parameter names and shapes are the same."
    twin: type = type(base.__name__.removesuffix("Model") + "DSQModel", (mixin, base), {"__doc__": about})
    register_model(name + SUFFIX)(twin)
    for arch in list(ARCH_MODEL_INV_REGISTRY[name]):
        register_model_architecture(name + SUFFIX, twin_arch(name, arch))(
            _architecture(ARCH_CONFIG_REGISTRY[arch], mixin.config)
        )
    return twin
