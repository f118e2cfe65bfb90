"""A checkpoint that does not fit the model, said in one line; what a DSQ model does its own way in fairseq."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fairseq_dsq.errors import DSQError
from fairseq_dsq.nn import DSQContext, log_softmax

Shape = tuple[int, ...] | None


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


class DSQModelMixin:
    """For the model classes, what every architecture does its own way under DSQ."""

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
