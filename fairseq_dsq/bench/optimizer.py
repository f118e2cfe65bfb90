"""A step of low-bit Adam, alone and in a whole update, over fairseq's Adam; and its peers where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from fairseq.optim.adam import Adam
from torch import Tensor

from fairseq_dsq.adam import LowBitAdam
from fairseq_dsq.bench.timing import CPU, Found, Settings, interleave
from fairseq_dsq.bench.train_step import TOKENS, training_step
from fairseq_dsq.nn import FLOAT32, CodedLinear, DSQContext, DSQLinear, GemmConfig, weight_format

PAIRS = (("int8/row", "log8/row"), ("int8/row", "int8/row"), ("float32", "float32"))
# Of weights that are held as codes.
CODES = "int8/row"
ROUNDS = 5
PEERS = ("torchao.optim", "bitsandbytes.optim")


def _optimizers() -> dict[str, Callable[..., Any]]:
    ours = {" ".join(pair): partial(LowBitAdam, moment1=pair[0], moment2=pair[1]) for pair in PAIRS}
    peers = [name for name in PEERS if importlib.util.find_spec(name.partition(".")[0])]
    return ours | {f"{name} AdamW8bit": importlib.import_module(name).AdamW8bit for name in peers}


def _in_codes(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters, matrices among them held as codes."""
    context = DSQContext(GemmConfig(FLOAT32))
    found = []
    for parameter in parameters:
        if parameter.dim() == 2:
            layer = DSQLinear(parameter.shape[1], parameter.shape[0], context)
            grad = parameter.grad
            parameter = CodedLinear.of(layer, weight_format(CODES)).weight
            parameter.grad = grad
        found.append(parameter)
    return found


def run(settings: Settings) -> Found:
    """Whole updates are float32's but for the optimizer."""
    rounds = settings.rounds
    parameters = list(training_step(None, TOKENS).model.parameters())
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    # All write to the same parameters: what these are does not matter to their time.
    optimizers = {name: make(parameters, lr=1e-6) for name, make in _optimizers().items()}
    optimizers[f"{' '.join(PAIRS[0])}, weights {CODES}"] = LowBitAdam(_in_codes(parameters), lr=1e-6)
    steps = {f"step {name}": optimizer.step for name, optimizer in optimizers.items()}
    rows = interleave(steps, Adam(parameters, lr=1e-6).step, "fairseq's Adam", rounds, CPU.clock)
    for row, optimizer in zip(rows, optimizers.values(), strict=True):
        row["state_bytes"] = optimizer.state_nbytes if isinstance(optimizer, LowBitAdam) else None
    update = training_step(None, TOKENS, LowBitAdam)
    baseline = training_step(None, TOKENS, Adam)
    whole = interleave({f"update {' '.join(PAIRS[0])}": update}, baseline, "fairseq's Adam", rounds, CPU.clock)
    return Found([*rows, {**whole[0], "state_bytes": rows[0]["state_bytes"]}])
