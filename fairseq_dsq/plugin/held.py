"""Bytes that a model and its optimizer hold, measured; what an update logs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_dsq.adam import LowBitAdam
from fairseq_dsq.cost import CostProfile
from fairseq_dsq.cost.metrics import GRADIENT_BYTES, RELATIVE, STATE_BYTES
from fairseq_dsq.ledger import Update
from fairseq_dsq.nn import parameter_bytes

# Of a training's steps, those whose bytes are kept.
MOST_KNOWN = 64


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the distinct storages that autograd saves while ``run`` runs; the model's own tensors do not count."""
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no address is used twice; on the meta device data has none
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def update_of(model: nn.Module, optimizer: Any) -> Update:
    """What a step of a fairseq optimizer, which has been made, reads and writes: of the parameters with a gradient."""
    inner = inner_optimizers(optimizer)
    own = {id(parameter) for parameter in model.parameters()}
    # --fp16 and --bf16 make float copies, in which the optimizer steps, with gradients of their own.
    copies = [p for each in inner for group in each.param_groups for p in group["params"] if id(p) not in own]
    updated = [(parameter, grad) for parameter in model.parameters() if (grad := parameter.grad) is not None]
    return Update(
        values=sum(parameter.numel() for parameter, _ in updated),
        weight_bytes=sum(parameter_bytes(parameter) for parameter, _ in updated) + sum(map(_nbytes, copies)),
        gradient_bytes=sum(_nbytes(grad) for _, grad in updated)
        + sum(_nbytes(copy.grad) for copy in copies if copy.grad is not None),
        state_bytes=sum(_state_bytes(state) for each in inner for p, state in each.state.items() if p.grad is not None),
    )


def _state_bytes(state: Mapping[str, Any]) -> int:
    return sum(_nbytes(value) for value in state.values() if torch.is_tensor(value))


def known_update(model: nn.Module, optimizer: Any, known: dict[Any, tuple[Update, int]]) -> tuple[Update, int]:
    """:func:`update_of`, and the bytes of all states, those of parameters without a gradient too.

    Once for the same gradients and states: it takes a twentieth of a small step's Python time.
    """
    inner = inner_optimizers(optimizer)
    key = tuple(p.grad is not None for p in model.parameters()), *(len(each.state) for each in inner)
    if key not in known:
        if len(known) >= MOST_KNOWN:
            known.clear()  # with LayerDrop hardly two steps have the same gradients
        states = sum(_state_bytes(state) for each in inner for state in each.state.values())
        known[key] = update_of(model, optimizer), states
    return known[key]


def log_update(optimizer: Any, update: Update, states: int, profile: CostProfile | None) -> None:
    """Log the bytes of gradients and states after a step, and what the update costs where a profile prices it."""
    held = {GRADIENT_BYTES: update.gradient_bytes}
    if not isinstance(optimizer.optimizer, LowBitAdam):  # which logs its own, whatever model it trains
        held[STATE_BYTES] = states
    for key, value in held.items():
        metrics.log_scalar(key, value, weight=1, priority=200, round=0)
    if profile is not None and profile.prices_updates:
        cost = profile.update(update)  # once, though each worker makes it: as of one that accumulates their batches
        absolute, baseline = RELATIVE["dsq_dram_relative"]
        metrics.log_scalar_sum(absolute, cost.dram_bytes, priority=201)
        metrics.log_scalar_sum(baseline, cost.dram_baseline_bytes, priority=202)


def inner_optimizers(optimizer: Any) -> list[Any]:
    """torch's optimizers in a fairseq optimizer."""
    inner = optimizer.optimizer
    composed = getattr(inner, "optimizers", None)
    return [inner] if composed is None else [part for each in composed.values() for part in inner_optimizers(each)]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
