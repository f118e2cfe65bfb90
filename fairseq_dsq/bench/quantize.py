"""The kernels over clone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fairseq_dsq.bench.peers import all_peers
from fairseq_dsq.bench.timing import Found, Settings, interleave
from fairseq_dsq.formats import BlockFloat, parse
from fairseq_dsq.quantized import fake_quantize, pack

ROWS, COLUMNS = 4096, 512
ROUNDS = 50
# Beside block floating point of as many bits.
OTHERS = "mxfp4", "mxfp6e2m3", "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2", "mxint8"


def run(settings: Settings) -> Found:
    place = settings.place
    torch.manual_seed(0)
    x = torch.randn(ROWS, COLUMNS).to(place.device, place.dtype)
    runs: dict[str, Callable[[], object]] = {}
    for bits in (4, 6, 8):
        for name, dim in (("last", -1), ("first", 0)):
            runs[f"quantize bfp{bits} {name}"] = partial(fake_quantize, x, BlockFloat(bits), dim)
    for suffix, dim in (("", -1), (" first", 0)):
        for bits in (2, 4, 6, 8, 16):
            packed = pack(x, BlockFloat(bits), dim)
            runs[f"pack bfp{bits}{suffix}"] = partial(pack, x, BlockFloat(bits), dim)
            runs[f"unpack bfp{bits}{suffix}"] = packed.dequantize
    for text in OTHERS:
        for suffix, dim in (("", -1), (" first", 0)):
            packed = pack(x, parse(text), dim)
            runs[f"quantize {text}{suffix or ' last'}"] = partial(fake_quantize, x, parse(text), dim)
            runs[f"pack {text}{suffix}"] = partial(pack, x, parse(text), dim)
            runs[f"unpack {text}{suffix}"] = packed.dequantize
    for peer, quantize in all_peers(*place).items():
        runs[f"quantize bfp4 last, {peer}"] = partial(quantize, x, 4)
    return Found(interleave(runs, x.clone, "clone", settings.rounds, place.clock))
