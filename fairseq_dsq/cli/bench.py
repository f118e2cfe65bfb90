"""Time and weigh this project beside plain float32 and its peers, interleaved in one process, as ratios."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fairseq_dsq.formats import DEFAULT_BOX_SIZE, BlockFloat
from fairseq_dsq.precision import PrecisionConfig, parse_q

ROWS, COLUMNS = 4096, 512  # quantize
LINEAR = (4096, 512, 2048)  # rows, inputs, outputs
LEVELS = ("[2,2,2,16]", "[16,4,4,16]", "[8,8,8,8]")
ARCH, TOKENS, LARGE_BATCH = "transformer_iwslt_de_en", 2048, 16384
MEMORY_LEVEL = "[2,2,2,16]"
Row = dict[str, Any]
Runs = Mapping[str, Callable[[], object]]
Quantize = Callable[[Tensor, int], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bench", choices=list(_BENCHES), help="; ".join(_BENCHES[name][1] for name in _BENCHES))
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is timed (default: by the bench)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    from fairseq_dsq.cost.hardware import processor
    from fairseq_dsq.quant import native

    for flag in ("rounds", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag}: got {value}, expected an integer >= 1")
    torch.set_num_threads(args.threads)
    run, _, rounds = _BENCHES[args.bench]
    rows = run(args.rounds or rounds)
    kernels = native.kernels.isa if native.kernels else f"none ({native.unavailable})"
    machine = {
        "processor": processor(), "capability": torch.backends.cpu.get_cpu_capability(), "kernels": kernels,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=1))
    else:
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
        print(tabulate(rows, "keys", floatfmt=".3f"))
    return 0


def interleave(variants: Runs, baseline: Callable[[], object], baseline_name: str, rounds: int) -> list[Row]:
    """Time every variant and the baseline once a round, after one round to warm up.

    Returns:
        One row per variant: the ratio of the fastest rounds, the median of the rounds' ratios, seconds.
    """
    runs = {"": baseline, **variants}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)
    for number in range(rounds + 1):
        order.shuffle(names)  # what runs after what matters to caches and to fresh memory
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    base = seconds.pop("")
    return [
        {
            "name": name,
            "ratio_min": min(times) / min(base),
            "ratio_median": statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True)),
            "over": baseline_name,
            "seconds_min": min(times),
            "over_seconds_min": min(base),
        }
        for name, times in seconds.items()
    ]


# Peers, as plain torch; qtorch itself where it is installed. All round blocks of 16 along the last dimension.


def naive(x: Tensor, bits: int) -> Tensor:
    """Block floating point as one writes it down in torch."""
    boxes = x.reshape(-1, DEFAULT_BOX_SIZE)
    largest = boxes.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-126)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - (bits - 2))
    limit = 2 ** (bits - 1) - 1
    return (torch.round(boxes / scale).clamp(-limit, limit) * scale).reshape(x.shape)


def microxcaling_style(x: Tensor, bits: int) -> Tensor:
    """The passes that microxcaling's emulation of an MX format takes (Rouhani et al., arXiv 2310.10537)."""
    boxes = x.unflatten(-1, (-1, DEFAULT_BOX_SIZE))
    exponent = boxes.abs().amax(dim=-1, keepdim=True)
    exponent = torch.floor(torch.log2(exponent + 2.0**-126 * (exponent == 0).to(x.dtype)))
    exponent = torch.where(exponent < -127, torch.full_like(exponent, -127), exponent)
    scaled = boxes / 2**exponent * 2.0 ** (bits - 2)
    rounded = torch.sign(scaled) * torch.floor(torch.abs(scaled) + 0.5)
    limit = 2 ** (bits - 1) - 1
    clamped = torch.clamp(rounded, -limit, limit) / 2.0 ** (bits - 2)
    result = clamped * 2**exponent
    result = torch.where(torch.isinf(boxes), boxes, result)
    return result.flatten(-2).contiguous()


def _qtorch(x: Tensor, bits: int) -> Tensor:
    from qtorch.quant import block_quantize

    rounded: Tensor = block_quantize(x.view(-1, DEFAULT_BOX_SIZE), wl=bits, dim=0, rounding="nearest")
    return rounded.view(x.shape)


def _peers() -> dict[str, Quantize]:
    peers: dict[str, Quantize] = {"naive torch": naive, "microxcaling-style": microxcaling_style}
    return peers | ({"qtorch": _qtorch} if importlib.util.find_spec("qtorch") else {})


class _PeerLinear(torch.autograd.Function):
    """A linear layer as emulators train it: rounded copies, and the input kept in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quantize: Callable[[Tensor, int], Tensor], q: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.quantize, ctx.q = quantize, q
        return quantize(x, q[0]) @ quantize(weight, q[0]).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        quantize, (_, q1, q2, q3) = ctx.quantize, ctx.q
        # Each operand along the dimension that its GEMM sums over.
        grad_x = quantize(grad, q3) @ quantize(weight.t().contiguous(), q2).t()
        grad_weight = quantize(grad.t().contiguous(), q3) @ quantize(x.t().contiguous(), q1).t()
        return grad_x, grad_weight, None, None


def _quantize(rounds: int) -> list[Row]:
    from fairseq_dsq.quant import fake_quantize, pack

    torch.manual_seed(0)
    x = torch.randn(ROWS, COLUMNS)
    runs: dict[str, Callable[[], object]] = {}
    for bits in (4, 8):
        for name, dim in (("last", -1), ("first", 0)):
            runs[f"quantize bfp{bits} {name}"] = partial(fake_quantize, x, BlockFloat(bits), dim)
    for suffix, dim in (("", -1), (" first", 0)):
        for bits in (2, 4, 8, 16):
            packed = pack(x, BlockFloat(bits), dim)
            runs[f"pack bfp{bits}{suffix}"] = partial(pack, x, BlockFloat(bits), dim)
            runs[f"unpack bfp{bits}{suffix}"] = packed.unpack
    for peer, quantize in _peers().items():
        runs[f"quantize bfp4 last, {peer}"] = partial(quantize, x, 4)
    return interleave(runs, x.clone, "clone", rounds)


def _linear(rounds: int) -> list[Row]:
    from fairseq_dsq.nn import DSQContext, DSQLinear, GemmConfig

    torch.manual_seed(0)
    m, k, n = LINEAR
    x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)

    def step(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: layer(x).backward(grad)

    runs = {
        text: step(DSQLinear(k, n, DSQContext(GemmConfig(PrecisionConfig(parse_q(text)))), bias=False))
        for text in LEVELS
    }
    weight, q = nn.Parameter(torch.randn(n, k)), parse_q("[8,8,8,8]")

    def peer_layer(quantize: Quantize) -> Callable[[Tensor], Tensor]:
        return lambda x: _PeerLinear.apply(x, weight, quantize, q)

    for peer, quantize in _peers().items():
        runs[f"[8,8,8,8], {peer}"] = step(peer_layer(quantize))
    return interleave(runs, step(nn.Linear(k, n, bias=False)), "float32", rounds)


def _criterion(name: str, **settings: Any) -> Any:
    """fairseq's criterion of a name, or this project's."""
    from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
    from fairseq.data import Dictionary

    class Task:
        target_dictionary = Dictionary()

    config = CRITERION_DATACLASS_REGISTRY[name](sentence_avg=False, **settings)
    return CRITERION_REGISTRY[name].build_criterion(config, Task())


def _step(flags: str | None, tokens: int) -> tuple[Callable[[], object], nn.Module]:
    """A training step of the model: forward with its criterion, backward, clipping, Adam; float32 without flags."""
    from fairseq_dsq.plugin import probe

    torch.manual_seed(0)
    prefix = "" if flags is None else "dsq_"
    arch = ARCH if flags is None else ARCH.replace("transformer", "transformer_dsq")
    spec = probe.ModelSpec(arch, flags or "", tokens=tokens)
    model = probe.build(spec, "cpu")
    sample = probe.sample(model, spec)
    criterion = _criterion(f"{prefix}label_smoothed_cross_entropy", label_smoothing=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model, sample)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, model


def _train_step(rounds: int) -> list[Row]:
    runs = {}
    for scope in ("gemm", "all"):
        for text in LEVELS:
            name = text if scope == "gemm" else f"{text} scope all"
            runs[name] = _step(f"--dsq-levels {text} --dsq-stash-scope {scope}", TOKENS)[0]
    return interleave(runs, _step(None, TOKENS)[0], "float32", rounds)


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the distinct storages that autograd saves while ``run`` runs; ``model``'s parameters do not count."""
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


def _peak_resident(flags: str | None, threads: int) -> int:
    """Peak resident bytes of a process that makes two steps on a large batch."""
    import resource

    torch.set_num_threads(threads)
    step, _ = _step(flags, LARGE_BATCH)
    for _ in range(2):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory(rounds: int) -> list[Row]:
    def weigh(name: str, ours: float, float32: float) -> Row:
        return {"name": name, "ratio_min": ours / float32, "ratio_median": ours / float32, "over": "float32",
                "bytes": int(ours), "over_bytes": int(float32)}  # fmt: skip

    def flags(scope: str, level: str = MEMORY_LEVEL) -> str:
        return f"--dsq-levels {level} --dsq-stash-scope {scope}"

    float32 = saved_bytes(*_step(None, TOKENS))
    rows = [
        weigh(f"saved bytes {scope} {level}", saved_bytes(*_step(flags(scope, level), TOKENS)), float32)
        for level in LEVELS[:2]
        for scope in ("all", "gemm")
    ]
    # A process of its own for each: memory that is freed may stay with the process that used it.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = [
            min(pool.apply(_peak_resident, (choice, torch.get_num_threads())) for _ in range(rounds))
            for choice in (None, flags("all"))
        ]
    return [*rows, weigh(f"peak resident all {MEMORY_LEVEL}", peaks[1], peaks[0])]


def _logging(rounds: int) -> list[Row]:
    """A step of 512 tokens in float32, where logging weighs the most."""
    from fairseq_dsq.plugin import probe
    from fairseq_dsq.plugin.criterion import PREFIX

    name = "cross_entropy"
    spec = probe.ModelSpec("transformer_dsq_iwslt_de_en", "--dsq-format float32", tokens=512)
    model = probe.build(spec, "cpu")
    sample = probe.sample(model, spec)

    def step(name: str) -> Callable[[], object]:
        criterion = _criterion(name)
        return lambda: criterion(model, sample)[0].backward()

    return interleave({f"{PREFIX}{name}": step(PREFIX + name)}, step(name), name, rounds)


# name: (what runs it, what it is, rounds)
_BENCHES: dict[str, tuple[Callable[[int], list[Row]], str, int]] = {
    "quantize": (_quantize, "quantize: kernels over clone", 50),
    "linear": (_linear, "linear: a layer's forward and backward over float32", 9),
    "train-step": (_train_step, f"train-step: {ARCH}, {TOKENS} tokens, over float32", 5),
    "memory": (_memory, "memory: bytes kept for backward, and peak resident memory, over float32", 1),
    "logging": (_logging, "logging: a step with the dsq_ criterion over the plain one", 15),
}
