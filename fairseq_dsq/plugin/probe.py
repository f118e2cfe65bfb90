"""What one training step of a fairseq architecture executes, found by running it without computing it.

The real model runs forward and backward on torch's meta device, where tensors have shapes and no data, so that a model
of any size takes seconds and no memory.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import (
    ARCH_MODEL_REGISTRY,
    FairseqEncoderDecoderModel,
    FairseqEncoderModel,
    FairseqLanguageModel,
)
from fairseq.modules import MultiheadAttention
from fairseq.tasks import TASK_REGISTRY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fairseq_dsq import data_files
from fairseq_dsq.nn import FLOAT32, DSQContext, GemmConfig, Ledger, Work
from fairseq_dsq.plugin.attach import quantize
from fairseq_dsq.plugin.config import DSQConfig, defaults, option
from fairseq_dsq.plugin.state import DSQState
from fairseq_dsq.precision import PrecisionConfig

FOLDER = "models"
# Operators that allocate or inspect and move no data; gathers read no more than they write.
_FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::_local_scalar_dense",
}
_GATHERS = {"aten::embedding", "aten::index_select", "aten::index"}
# Model class: the task that builds it.
TASKS: dict[type, str] = {
    FairseqEncoderDecoderModel: "translation",
    FairseqLanguageModel: "language_modeling",
    FairseqEncoderModel: "masked_lm",
}


@dataclass(frozen=True)
class ModelSpec:
    """A model by architecture and flags: a data file in configs/models/, or the name of a fairseq architecture.

    Attributes:
        arch: a registered architecture.
        flags: of fairseq-train, such as ``--encoder-layers 12``.
        vocabulary: entries of the dictionary, special symbols included.
        length: tokens of a sentence; of source and target alike.
        tokens: tokens of a batch (of the target, in translation).
        source: where the numbers come from.
    """

    arch: str
    flags: str = ""
    vocabulary: int = 10_000
    length: int = 32
    tokens: int = 4096
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "length", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected an integer >= 1")
        if self.tokens % self.length:
            raise ValueError(f"tokens: got {self.tokens}, expected a multiple of length {self.length}")
        if self.arch not in ARCH_MODEL_REGISTRY:
            raise ValueError(f"arch: got {self.arch!r}, expected one that fairseq-train --arch knows")

    @property
    def batch(self) -> int:
        """Sentences of a batch."""
        return self.tokens // self.length


def find_model(name: str) -> ModelSpec:
    """The model of a name in configs/models/, of a file's path, or of a fairseq architecture.

    Raises:
        ValueError: none of these; the message says what is expected.
    """
    if name in ARCH_MODEL_REGISTRY and name not in data_files.names(FOLDER):
        return ModelSpec(name)
    try:
        return data_files.load(ModelSpec, FOLDER, name)
    except ValueError as error:
        if str(error).startswith("got "):
            raise ValueError(f"{error}, or an architecture that fairseq-train --arch knows") from None
        raise


class NoData(TorchDispatchMode):
    """Answers what the meta device cannot: a value is zero (there is no padding), and a copy stays on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)


def training_config(flags: Sequence[str]) -> Any:
    """The configuration that fairseq-train makes of its command line.

    Raises:
        ValueError: flags that it refuses; the message is its last line.
    """
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            args = options.parse_args_and_arch(options.get_training_parser(), list(flags))
    except SystemExit as stop:  # argparse's follows pages of usage; this project's own is one line, the exit's
        error = stop.code if isinstance(stop.code, str) else usage.getvalue().strip().splitlines()[-1]
        raise ValueError(error.partition("error: ")[2]) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hydra's, about fairseq's use of it
        return convert_namespace_to_omegaconf(args)


def task_of(spec: ModelSpec) -> str:
    """The task that a spec's architecture is trained with.

    Raises:
        ValueError: an architecture of another family than those in ``TASKS``.
    """
    family = ARCH_MODEL_REGISTRY[spec.arch]
    names = [name for kind, name in TASKS.items() if issubclass(family, kind)]
    if not names:
        raise ValueError(f"arch: got {spec.arch!r}, expected a translation, language or masked language model")
    return names[0]


def configuration(spec: ModelSpec) -> Any:
    """What fairseq-train makes of a spec's flags; the optimizer is ``adam`` unless they name one.

    Raises:
        ValueError: flags that it refuses; or as :func:`task_of`.
    """
    own = ["--arch", spec.arch, "--task", task_of(spec), "--optimizer", "adam"]
    try:
        return training_config(["data", *own, *shlex.split(spec.flags)])
    except ValueError as error:
        raise ValueError(f"--flags: {error}") from None


def given_flags(spec: ModelSpec) -> dict[str, Any]:
    """The flags of ``*_dsq`` architectures that a spec's flags give; errors as :func:`configuration`."""
    model = configuration(spec).model
    words = {word.partition("=")[0] for word in shlex.split(spec.flags)}
    found = {name: (getattr(model, name, default), default) for name, default in defaults(DSQConfig).items()}
    return {name: value for name, (value, default) in found.items() if value != default or option(name) in words}


class Setup(NamedTuple):
    """What fairseq-train makes of a spec's flags: its configuration, task and model."""

    config: Any
    task: Any
    model: nn.Module


def set_up(spec: ModelSpec, device: str = "meta") -> Setup:
    """The float (or ``*_dsq``) model of a spec, in training mode; errors as :func:`configuration`."""
    config, name = configuration(spec), task_of(spec)
    dictionary = Dictionary()
    for index in range(spec.vocabulary - len(dictionary)):
        dictionary.add_symbol(f"token{index}")
    dictionaries = (dictionary, dictionary) if name == "translation" else (dictionary,)
    task = TASK_REGISTRY[name](config.task, *dictionaries)
    with torch.device(device), NoData():
        model: nn.Module = task.build_model(config.model)
    return Setup(config, task, model.train())


def build(spec: ModelSpec, device: str = "meta") -> nn.Module:
    """The model of :func:`set_up`; errors are its own."""
    return set_up(spec, device).model


def sample(model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """A full batch without padding, as fairseq's criteria take it, on the model's device."""
    with next(model.parameters()).device:
        tokens = torch.full((spec.batch, spec.length), Dictionary().nspecial)
        lengths = torch.full((spec.batch,), spec.length)
    inputs = {"src_tokens": tokens}
    if isinstance(model, FairseqEncoderDecoderModel):
        inputs |= {"src_lengths": lengths, "prev_output_tokens": tokens}
    return {"net_input": inputs, "target": tokens, "ntokens": spec.tokens}


def step(model: nn.Module, spec: ModelSpec, training: bool = True) -> None:
    """One forward pass of a full batch and, in training, the backward pass of the sum of its output.

    A masked language model projects every position to the vocabulary; translation has a source as long as the target.
    """
    with next(model.parameters()).device, NoData():
        with torch.set_grad_enabled(training):
            output = model.train(training)(**sample(model, spec)["net_input"])[0]
        if training:
            output.sum().backward()


class _Traffic(NoData):
    """Counts the elements that operators other than GEMMs read and write, inside attention and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[bool] = Counter()
        self.in_attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name
        if func.overloadpacket in flop_registry or func.is_view or name in _FREE:
            return result
        read = [] if name in _GATHERS else [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements[self.in_attention > 0] += sum(tensor.numel() for tensor in (*read, *written))
        return result


def traffic(spec: ModelSpec) -> tuple[int, int]:
    """Elements that the operators other than GEMMs move in one training step of the float model.

    Each operator reads its tensors once and writes its result once, as in eager execution: nothing is fused.

    Returns:
        Elements moved within attention (between its projections), and elsewhere.

    Raises:
        ValueError: a ``*_dsq`` architecture, whose quantization would be counted as operators.
    """
    model = build(spec)
    if hasattr(model, "dsq"):
        raise ValueError(
            f"got {spec.arch!r}, expected the float architecture: --format and --levels quantize its GEMMs"
        )
    mode = _Traffic()

    def enter(*_: Any) -> None:
        mode.in_attention += 1

    def leave(*_: Any) -> None:
        mode.in_attention -= 1

    def leave_forward(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        leave()
        inputs = {tensor.grad_fn for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for node in _nodes(output[0].grad_fn, inputs):
            node.register_prehook(enter)
            node.register_hook(leave)

    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave_forward, with_kwargs=True)
    with mode:
        step(model, spec)
    return mode.elements[True], mode.elements[False]


def _nodes(last: Any, stop: set[Any]) -> set[Any]:
    """The autograd nodes from ``last`` back to, and without, those in ``stop``."""
    found: set[Any] = set()
    pending = [last]
    while pending:
        node = pending.pop()
        if node is not None and node not in stop and node not in found:
            found.add(node)
            pending += [previous for previous, _ in node.next_functions]
    return found


def put_in_force(state: DSQState, precision: PrecisionConfig, number: int | None = None) -> None:
    """Put a level in force; modules with rules take theirs of its number.

    Args:
        number: of ``--dsq-levels``; None: of the first of them that it equals, if any.
    """
    if number is None:
        equal = (index for index, level in enumerate(state.levels) if level.by_value == precision.by_value)
        number = next(equal, 0)
    state.context.set_precision(precision, number)


def trace(
    spec: ModelSpec, training: bool = True, precision: PrecisionConfig = FLOAT32, number: int | None = None
) -> Work:
    """The GEMMs and stashes of one step, each with the module it serves as its scope; ``number`` as put_in_force's.

    They come from the ledger of the converted model: the layers of a ``*_dsq`` model have their rules' and weights'
    formats. :meth:`Work.at_precision` puts all of them at another level.
    """
    model = build(spec)
    state = getattr(model, "dsq", None)
    if isinstance(state, DSQState):
        ledger = state.context.ledger
        put_in_force(state, precision, number)
    else:
        context = DSQContext(GemmConfig(precision))
        quantize(model, context)
        ledger = context.ledger
    with ledger_scopes(model, ledger):
        step(model, spec, training)
    return ledger.drain()


@contextlib.contextmanager
def ledger_scopes(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """While this lasts, what ``ledger`` counts carries the name of the module at work."""
    stack = [ledger.scope]

    def enter(name: str) -> None:
        stack.append(name)
        ledger.scope = name

    def leave(*_: Any) -> None:
        stack.pop()
        ledger.scope = stack[-1]

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
