"""A linear layer's forward and backward over float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairseq_dsq.bench.peers import PeerLinear, Quantize, all_peers
from fairseq_dsq.bench.timing import LEVELS, Row, interleave
from fairseq_dsq.nn import DSQContext, DSQLinear, GemmConfig
from fairseq_dsq.precision import PrecisionConfig, parse_q

SHAPE = (4096, 512, 2048)  # rows, inputs, outputs
ROUNDS = 9


def run(rounds: int) -> list[Row]:
    torch.manual_seed(0)
    m, k, n = SHAPE
    x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)

    def step(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: layer(x).backward(grad)

    runs = {
        text: step(DSQLinear(k, n, DSQContext(GemmConfig(PrecisionConfig(parse_q(text)))), bias=False))
        for text in LEVELS
    }
    weight, q = nn.Parameter(torch.randn(n, k)), parse_q("[8,8,8,8]")

    def peer_layer(quantize: Quantize) -> Callable[[Tensor], Tensor]:
        return lambda x: PeerLinear.apply(x, weight, quantize, q)

    for peer, quantize in all_peers().items():
        runs[f"[8,8,8,8], {peer}"] = step(peer_layer(quantize))
    return interleave(runs, step(nn.Linear(k, n, bias=False)), "float32", rounds)
