"""What a pass of a model shares: weights that are rounded together, and the number that their noise follows from.

On a GPU one launch rounds all weights that the output GEMMs read, one all that grad_input's read.

A model's hundred weights would be a hundred launches for each, of kernels that run shorter than a launch takes. Which
weights go together is learned: those that one pass rounded by themselves do in the next, before which the host notes
once on the GPU where they lie. Every pass rounds them anew, so that nobody has to say when a weight changes. To nearest
alone: each layer draws noise of its own.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq_dsq.formats import Format
from fairseq_dsq.kernels import ops


class _Key(NamedTuple):
    """What one launch rounds alike."""

    fmt: Format
    reduction: int
    dtype: torch.dtype
    device: torch.device

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight is still what it was when it was learned."""
        return weight.dtype is self.dtype and weight.device == self.device and weight.is_contiguous()


class _Rounded(NamedTuple):
    """What was made of a weight, and when."""

    weight: Tensor
    version: int
    tensor: Tensor


class Pass:
    """A model's forward pass and its backward pass.

    Args:
        owner: the module whose forward it is.
    """

    def __init__(self, together: Together, owner: nn.Module) -> None:
        self.owner = owner
        self._together = together
        self._rounded: dict[_Key, dict[int, _Rounded]] = {}

    def rounded(self, weight: Tensor, fmt: Format, reduction: int) -> Tensor | None:
        """``weight`` (N, K) in boxes along a dimension, as bfloat16 terms where it is float32; None: round it alone."""
        key = _Key(fmt, reduction, weight.dtype, weight.device)
        together = self._rounded.get(key)
        if together is None:
            together = self._rounded[key] = self._together.round(key)
        found = together.get(id(weight))
        if found is not None and found.weight is weight and found.version == weight._version:
            return found.tensor
        if isinstance(weight, nn.Parameter) and weight.is_contiguous():
            self._together.learn(key, weight)
        return None

    def end_forward(self) -> None:
        """Drop what the output GEMMs have read."""
        self._rounded.clear()


class Together:
    """The weights that a model's passes round together.

    Attributes:
        current: the forward pass that runs; None between them and in evaluation.
        number: of the last training pass since torch was seeded, from 0: data-parallel replicas count alike, and what
            a backward pass computes again counts with its own pass.
    """

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.number = 0
        self._seed: int | None = None
        self._weights: dict[_Key, dict[int, weakref.ref[Tensor]]] = {}
        self._matrices: dict[_Key, ops.Matrices] = {}

    def __reduce__(self) -> Any:
        # A copy's weights are others.
        return Together, ()

    def hang_on(self, model: nn.Module) -> None:
        """Have the training passes of ``model`` begin and end here."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, _: Any) -> None:
        if self.current is not None and self.current.owner is not module:
            return
        if not (module.training and torch.is_grad_enabled()):
            self.current = None
            return
        self.current = Pass(self, module)
        seed = torch.initial_seed()
        self.number, self._seed = self.number + 1 if seed == self._seed else 0, seed

    def _end(self, module: nn.Module, *_: Any) -> None:
        if self.current is not None and self.current.owner is module:
            self.current.end_forward()
            self.current = None

    def learn(self, key: _Key, weight: Tensor) -> None:
        """Have later passes round a weight with the others of its key."""
        self._weights.setdefault(key, {})[id(weight)] = weakref.ref(weight)

    def round(self, key: _Key) -> dict[int, _Rounded]:
        """What is known of a key, rounded now, by the weights' identities."""
        known = (weight() for weight in self._weights.get(key, {}).values())
        weights = [weight for weight in known if weight is not None and key.fits(weight)]
        if len(weights) < 2:
            return {}
        matrices = self._matrices.get(key)
        if matrices is None or not matrices.are(weights):
            matrices = self._matrices[key] = ops.Matrices(weights, key.reduction, key.fmt)
        made = zip(weights, matrices.quantize(), strict=True)
        return {id(weight): _Rounded(weight, weight._version, tensor) for weight, tensor in made}
