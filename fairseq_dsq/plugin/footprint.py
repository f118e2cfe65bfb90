"""What a training step of a fairseq architecture holds, measured on torch's meta device: a step without its numbers.

Measured are the tensors that stay: weights, gradients, the optimizer's states, and what autograd keeps from the forward
pass of model and criterion. What comes and goes within an operation is not, nor what an allocator or a library takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial

from fairseq import optim
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, FairseqEncoderModel
from fairseq.modules.cross_entropy import cross_entropy
from torch import Tensor

from fairseq_dsq.cost.memory import Held, largest_batch
from fairseq_dsq.formats import DEFAULT_BOX_SIZE
from fairseq_dsq.ledger import Ledger, Update, Work
from fairseq_dsq.nn import StashScope, weight_bytes
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.criterion import DSQCriterionMixin
from fairseq_dsq.plugin.held import saved_bytes, update_of
from fairseq_dsq.plugin.modes import updates_codes
from fairseq_dsq.plugin.probe import ModelSpec
from fairseq_dsq.plugin.twins import DSQModelMixin, twin_arch
from fairseq_dsq.precision import PrecisionConfig

_HALF = ("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16", "amp")


def is_quantized(spec: ModelSpec) -> bool:
    """Whether the architecture is a ``*_dsq`` one."""
    return issubclass(ARCH_MODEL_REGISTRY[spec.arch], DSQModelMixin)


def quantized(spec: ModelSpec, scope: StashScope) -> ModelSpec:
    """The spec of the twin, with a stash scope.

    Raises:
        ValueError: an architecture that has no twin.
    """
    arch = spec.arch
    if not is_quantized(spec):
        arch = twin_arch(ARCH_MODEL_NAME_REGISTRY[spec.arch], spec.arch)
        if arch not in ARCH_MODEL_REGISTRY:
            raise ValueError(f"got {spec.arch!r}, expected one with a twin that ends in _dsq or contains _dsq_")
    return dataclasses.replace(spec, arch=arch, flags=f"{spec.flags} --dsq-stash-scope {scope}")


class Step:
    """A training step: forward with its criterion, backward, and the update.

    A masked language model projects every position to the vocabulary; translation has a source as long as the target.

    Args:
        spec: the criterion, ``cross_entropy`` by default, and the optimizer, ``adam`` by default, are in its flags.
        precision, number: the level of a ``*_dsq`` model, as :func:`fairseq_dsq.plugin.probe.put_in_force` takes it.
        device: where it runs; on the meta device nothing is computed.

    Raises:
        ValueError: flags that cannot be trained with, or trained with in float32.
    """

    def __init__(
        self,
        spec: ModelSpec,
        precision: PrecisionConfig | None = None,
        device: str = "meta",
        number: int | None = None,
    ) -> None:
        self.spec = spec
        self.config, self.task, self.model = probe.set_up(spec, device)
        half = [name for name in _HALF if getattr(self.config.common, name)]
        if half:
            raise ValueError(f"--flags: got --{half[0].replace('_', '-')}, expected none: bytes are those in float32")
        if precision is not None:
            probe.put_in_force(self.model.dsq, precision, number)  # type: ignore[arg-type]
        self.optimizer_name: str = self.config.optimizer._name
        coded = any(hasattr(parameter, "dsq_codes") for parameter in self.model.parameters())
        if coded and not updates_codes(self.optimizer_name):
            raise ValueError(
                f"--flags: --optimizer: got {self.optimizer_name}, expected one that updates codes, such as dsq_adam: "
                "--dsq-weights direct holds codes alone"
            )
        try:
            self.criterion = self.task.build_criterion(self.config.criterion)
        except Exception as error:  # fairseq's own raise nothing more special
            raise ValueError(f"--flags: --criterion: got {self.config.criterion._name} ({error})") from None

    @property
    def batches_of_update(self) -> int:
        """The first of ``--update-freq``."""
        return int(self.config.optimization.update_freq[0])

    def loss(self, batch: int) -> Tensor:
        """Of so many sentences."""
        spec = dataclasses.replace(self.spec, tokens=batch * self.spec.length)
        sample = probe.sample(self.model, spec)
        if isinstance(self.model, FairseqEncoderModel):  # its criterion picks masked positions, which need numbers
            logits = self.model(**sample["net_input"])[0]
            loss: Tensor = cross_entropy(logits.flatten(0, -2), sample["target"].flatten(), reduction="sum")
        elif isinstance(self.criterion, DSQCriterionMixin):  # which drains the ledger, of the same loss
            loss = super(DSQCriterionMixin, self.criterion).forward(self.model, sample)[0]  # type: ignore[misc]
        else:
            loss = self.criterion(self.model, sample)[0]
        return loss

    def _run(self, what: Callable[[], object]) -> None:
        try:
            with next(self.model.parameters()).device, probe.NoData():
                what()
        except (NotImplementedError, AssertionError) as error:
            line = f"{type(error).__name__} {error}".partition("\n")[0].strip()
            raise ValueError(f"--flags: got what cannot be measured on shapes without numbers ({line})") from None

    def activations(self, batch: int) -> tuple[Work, int]:
        """What the forward pass of so many sentences runs and packs, and the bytes of all that autograd keeps of it.

        Raises:
            ValueError: a model of which backward computes parts again.
        """
        if getattr(self.config.model, "checkpoint_activations", False):
            raise ValueError(
                "--flags: got --checkpoint-activations, expected none: what backward computes again is not measured"
            )
        state = getattr(self.model, "dsq", None)
        ledger = Ledger() if state is None else state.context.ledger
        ledger.drain()
        kept: list[int] = []
        self._run(lambda: kept.append(saved_bytes(partial(self.loss, batch), self.model)))
        return ledger.drain(), kept[0]

    @cached_property
    def update(self) -> Update:
        """What an update reads and writes: one is made.

        Raises:
            ValueError: an optimizer that does not run on shapes alone.
        """
        self._run(lambda: self.loss(1).backward())
        try:
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            optimizer = optim.build_optimizer(self.config.optimizer, parameters)
            self._run(optimizer.step)
        except (ImportError, RuntimeError, ValueError) as error:
            line = str(error).partition("\n")[0]
            raise ValueError(
                f"--flags: --optimizer: got {self.optimizer_name}, which cannot be measured ({line})"
            ) from None
        return update_of(self.model, optimizer)

    def held(self, batch: int) -> Held:
        """What a step of so many sentences holds."""
        work, kept = self.activations(batch)
        update = self.update
        # A float stash may be one tensor that several GEMMs keep.
        stash = min(work.stash_bytes, kept)
        return Held(weight_bytes(self.model), update.gradient_bytes, update.state_bytes, stash, kept - stash)

    def largest_batch(self, limit: int) -> int:
        """The most sentences of which a step holds at most ``limit`` bytes; 0 where not one fits."""
        levels = {key.precision for key in self.activations(1)[0].stashes}
        groups = {fmt.group for level in levels for pair in level.formats for fmt in pair}
        # Whole boxes of all formats along the tokens, and of what the stash scope all keeps; whole bytes of bits.
        period = math.lcm(DEFAULT_BOX_SIZE, *(group for group in groups if isinstance(group, int)))
        return largest_batch(lambda batch: self.held(batch).total, limit, period)
