"""A linear layer's forward and backward over float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairseq_dsq.bench.peers import PeerLinear, Quantize, all_peers
from fairseq_dsq.bench.timing import CPU, LEVELS, Place, Row, interleave
from fairseq_dsq.nn import DSQContext, DSQLinear, GemmConfig
from fairseq_dsq.precision import PrecisionConfig, parse_q

SHAPE = (4096, 512, 2048)  # rows, inputs, outputs
ROUNDS = 9


def run(rounds: int, place: Place = CPU) -> list[Row]:
    torch.manual_seed(0)
    m, k, n = SHAPE
    x, grad = (torch.randn(m, size).to(place.device, place.dtype) for size in (k, n))
    x.requires_grad_()

    def step(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: layer(x).backward(grad)

    runs = {
        text: step(
            DSQLinear(k, n, DSQContext(GemmConfig(PrecisionConfig(parse_q(text)))), False, place.device, place.dtype)
        )
        for text in LEVELS
    }
    weight, q = nn.Parameter(torch.randn(n, k).to(place.device, place.dtype)), parse_q("[8,8,8,8]")

    def peer_layer(quantize: Quantize) -> Callable[[Tensor], Tensor]:
        return lambda x: PeerLinear.apply(x, weight, quantize, q)

    for peer, quantize in all_peers(*place).items():
        runs[f"[8,8,8,8], {peer}"] = step(peer_layer(quantize))
    plain = nn.Linear(k, n, bias=False, device=place.device, dtype=place.dtype)
    return interleave(runs, step(plain), str(place.dtype).removeprefix("torch."), rounds, place.clock)
