"""A linear layer's forward and backward over float32, beside what its user may pick instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from fairseq_dsq.bench.peers import PeerLinear, Quantize, all_peers
from fairseq_dsq.bench.rivals import PEERS, Rival, rivals
from fairseq_dsq.bench.timing import LEVELS, Found, Settings, interleave
from fairseq_dsq.nn import DSQContext, DSQLinear, GemmConfig
from fairseq_dsq.precision import PrecisionConfig, parse_q

SHAPE = (4096, 512, 2048)  # rows, inputs, outputs
ROUNDS = 9


def run(settings: Settings) -> Found:
    torch.manual_seed(0)
    place, (m, k, n) = settings.place, SHAPE
    x, grad = (torch.randn(m, size).to(place.device, place.dtype) for size in (k, n))
    x.requires_grad_()
    grads = {dtype: grad.to(dtype) for dtype in {place.dtype, torch.bfloat16}}

    def step(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            y = layer(x)
            y.backward(grads[y.dtype])

        return run

    def by(rival: Rival) -> Callable[[], object]:
        layer = cast(nn.Linear, torch.compile(plain)) if rival.compiled else plain

        def forward(x: Tensor) -> Tensor:
            with torch.autocast(place.device, rival.dtype, enabled=rival.dtype not in (None, torch.float32)):
                y: Tensor = layer(x)
            return y

        def run() -> None:
            with rival.around():
                step(forward)()

        return run

    runs = {
        text: step(
            DSQLinear(k, n, DSQContext(GemmConfig(PrecisionConfig(parse_q(text)))), False, place.device, place.dtype)
        )
        for text in LEVELS
    }
    weight, q = nn.Parameter(torch.randn(n, k).to(place.device, place.dtype)), parse_q("[8,8,8,8]")

    def peer_layer(quantize: Quantize) -> Callable[[Tensor], Tensor]:
        return lambda x: PeerLinear.apply(x, weight, quantize, q)

    if PEERS in settings.rivals:
        for peer, quantize in all_peers(*place).items():
            runs[f"[8,8,8,8], {peer}"] = step(peer_layer(quantize))
    plain = nn.Linear(k, n, bias=False, device=place.device, dtype=place.dtype)
    at_hand, notes = rivals(settings)
    runs |= {rival.name: by(rival) for rival in at_hand}
    base = str(place.dtype).removeprefix("torch.")
    return Found(interleave(runs, step(plain), base, settings.rounds, place.clock), notes)
