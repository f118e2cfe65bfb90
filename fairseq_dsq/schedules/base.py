"""What a precision schedule is: pure functions from states to states."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from fairseq_dsq.precision import PrecisionConfig


@dataclass(frozen=True)
class State:
    """Where a schedule stands. Every field is a number, which checkpoints keep under the field's name.

    Attributes:
        level: index of the level that training goes on at.
    """

    level: int = 0


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Policy(Generic[S]):
    """Decides when the level changes. Every field that is a :func:`fairseq_dsq.flags.flag` is a flag of fairseq-train:
    ``patience`` is ``--dsq-patience``.

    Attributes:
        num_levels: of ``--dsq-levels``.

    Raises:
        ValueError: a value that a flag's check refuses; begins with the field's name.
    """

    name: ClassVar[str]
    num_levels: int

    def __post_init__(self) -> None:
        if self.num_levels < 1:
            raise ValueError(f"num_levels: got {self.num_levels!r}, expected >= 1")
        for field in dataclasses.fields(self):
            if check := field.metadata.get("check"):
                try:
                    check(getattr(self, field.name))
                except ValueError as error:
                    raise ValueError(f"{field.name}: {error}") from None

    def start(self) -> S:
        """The state of a training that begins."""
        raise NotImplementedError

    def check(self, levels: Sequence[PrecisionConfig]) -> None:
        """Refuse levels that the policy cannot use.

        Raises:
            ValueError: it cannot; names the level.
        """

    def prepare(self) -> None:
        """Called where training begins, and not for evaluation.

        Raises:
            ValueError: the policy cannot be used; begins with a field's name.
        """

    def on_validation(self, state: S, loss: float) -> S:
        """The state after a validation that counts; ``loss`` may be NaN."""
        return state

    def on_update(self, state: S, updates: int, epoch: int) -> S:
        """The state before the next update, of ``epoch``, when ``updates`` are done. Called once for each.

        A training that goes on from a checkpoint calls it as one that was never stopped, with the state of then.

        What fairseq logs is there too: the last update's gradient norm is ``.val`` of ``get_meter("train", "gnorm")``
        in ``fairseq.logging.metrics``. fairseq resets it with each epoch: before the first update of one there is no
        meter, or its value is None.
        """
        return state

    def why(self, before: S, after: S) -> str:
        """Why a validation changed the level: what follows on "precision rises from A to B "."""
        return "after a validation"


P = TypeVar("P", bound=type[Policy[Any]])
_POLICIES: dict[str, type[Policy[Any]]] = {}


def register(policy: P) -> P:
    """Make ``--dsq-schedule`` know a policy, by its ``name``.

    Flags of its own are known to fairseq-train if it is registered by this package; another's file can use those that
    there are, by naming its fields alike.
    """
    _POLICIES[policy.name] = policy
    return policy


def names() -> list[str]:
    """Of all policies."""
    return list(_POLICIES)


def flags() -> list[tuple[str, type, Any]]:
    """Name, type and field of every flag of a policy, each name once."""
    found: dict[str, tuple[str, type, Any]] = {}
    for policy in _POLICIES.values():
        kinds = typing.get_type_hints(policy)
        for field in _flags(policy):
            found.setdefault(field.name, (field.name, kinds[field.name], field))
    return list(found.values())


def own_flags(name: str) -> list[str]:
    """The names of a policy's flags."""
    return [field.name for field in _flags(_POLICIES[name])]


def make(name: str, num_levels: int, values: Any) -> Policy[Any]:
    """The policy of a name, with its flags from the attributes ``dsq_...`` of ``values``.

    Raises:
        ValueError: as :class:`Policy`.
    """
    if name not in _POLICIES:
        raise ValueError(f"schedule: got {name!r}, expected one of {', '.join(_POLICIES)}")
    policy = _POLICIES[name]
    own = {field.name: getattr(values, f"dsq_{field.name}", field.default) for field in _flags(policy)}
    return policy(num_levels, **own)


def _flags(policy: type[Policy[Any]]) -> Iterator[dataclasses.Field[Any]]:
    return (field for field in dataclasses.fields(policy) if "check" in field.metadata)
