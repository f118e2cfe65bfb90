"""Is the CUDA path right, and how fast is it? One GPU, at most 8 minutes.

    gpu.sh [--device cuda] [--out runs/gpu] [--minutes 8]

Bits against the CPU's definition, products against float64, layers and trainings against the CPU's, waits for the GPU
in a step; then times and memory over float32, TF32 and autocast. Writes OUT/gpu.json and OUT/gpu.md, a table for
README. Exit code 1 where something differed. ``--device cpu`` goes the same way in small: a rehearsal.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BITS = (2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 25, 32)
MODES = {
    "float32": ("--dsq-format", "float32"),
    "[2,2,2,16]": (),
    "fixed": ("--dsq-format", "fixed", "--dsq-levels", "[8,4,4,16]"),
    "scope all, checkpointing": ("--dsq-stash-scope", "all", "--checkpoint-activations"),
    "bf16": ("--bf16",),
    "fp16": ("--fp16",),
    "memory-efficient-fp16": ("--memory-efficient-fp16",),
    "amp": ("--amp",),
}
FIRST_LOSS = 0.01  # a first epoch's may be off by so much


class Check:
    """What was found: sections of rows, and what differed."""

    def __init__(self, device: str, minutes: float) -> None:
        self.device = torch.device(device)
        self.gpu = self.device.type == "cuda"
        self.end = time.monotonic() + 60 * minutes
        self.sections: dict[str, list[dict[str, Any]]] = {}
        self.wrong: list[str] = []

    def run(self, name: str, section: Callable[[Check], Iterator[dict[str, Any]]], seconds: float) -> None:
        """A section, cut after so many seconds, or at the end of all."""
        rows = self.sections[name] = []
        begun = time.monotonic()
        until = min(begun + seconds, self.end)
        try:
            for row in section(self):
                rows.append(row)
                if row.get("ok") is False:
                    self.wrong.append(f"{name}: {row}")
                if time.monotonic() > until:
                    rows.append({"what": "cut here: out of time", "ok": None})
                    break
        except Exception as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")
            rows.append({"what": "failed", "ok": False, "why": traceback.format_exc(limit=-4)})
        good = sum(row.get("ok") is True for row in rows)
        bad = sum(row.get("ok") is False for row in rows)
        print(f"{name}: {time.monotonic() - begun:.0f} s, {len(rows)} rows, {good} right, {bad} wrong", flush=True)


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Very different magnitudes, zeros, subnormal and huge values, a few Inf and NaN; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    reach = 10 if dtype is torch.float16 else 60
    x = torch.ldexp(x, torch.randint(-reach, reach, (*shape[:-1], 1), generator=generator)).to(dtype)
    kind = torch.randint(0, 400, shape, generator=generator)
    specials = (0.0, -0.0, torch.finfo(dtype).max, -torch.finfo(dtype).smallest_normal, 1e-41, torch.inf, torch.nan)
    for place, value in enumerate(specials):
        x[kind == place] = value
    return x


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    got = got.cpu()
    if got.is_floating_point():
        number = torch.int32 if got.dtype is torch.float32 else torch.int16
        equal = (got.contiguous().view(number) == expected.contiguous().view(number)) | (got.isnan() & expected.isnan())
        return bool(equal.all())
    return torch.equal(got, expected)


def environment(check: Check) -> Iterator[dict[str, Any]]:
    from fairseq_dsq.kernels import ops

    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kernels = ops._kernels(check.device)
    row = {"what": "kernels work here", "ok": kernels is not None, "seconds": round(time.monotonic() - begun, 1)}
    if check.gpu and kernels is not None:
        row["launched directly"] = kernels._direct
    yield row | {"said": [str(each.message) for each in said]}


def bits(check: Check) -> Iterator[dict[str, Any]]:
    """Every operator against the definition on the CPU."""
    from fairseq_dsq.formats import definition, parse
    from fairseq_dsq.kernels import masks, ops

    formats = [f"bfp{width}" for width in BITS] + [
        "bfp4-fit",
        "bfp6/32",
        "bfp5/row",
        "fixed8",
        "fixed16",
        "fixed25/row",
        "int8/row",
        "int4/128",
        "fp8e4m3/tensor",
        "mxfp8e5m2",
    ]
    shapes = [(37, 48), (2, 35, 33), (130, 257)]
    seeds = (None, 0x2BCDEF01_FEDCBA98)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for text, (number, dtype) in itertools.product(formats, enumerate(dtypes)):
        fmt, ok = parse(text), True
        for (place, shape), seed in itertools.product(enumerate(shapes), seeds):
            dim = (-1, -2, 0)[(place + number) % 3]
            x = awkward(shape, dtype, place)
            there = x.to(check.device)
            data = definition.pack(x, fmt, dim, seed)
            expected = definition.fake_quantize(x, fmt, dim, seed, dtype)
            ok &= same(ops.fake_quantize(there, dim, text, seed, dtype), expected)
            ok &= same(ops.pack(there, dim, text, seed), data)
            ok &= same(ops.unpack(data.to(check.device), shape, dim, text, dtype), expected)
        yield {"what": f"{text} {str(dtype)[6:]}", "ok": ok}
    three = [("bfp2", "bfp16", "bfp2"), ("bfp16", "bfp9", "bfp16"), ("bfp8", "bfp24", "bfp5")]
    for texts in (*three, ("fixed16", "fixed9", "fixed4")):
        ok = True
        for shape in shapes:
            x = awkward(shape, torch.float32, 5)
            along, across, stash = ops.quantize_both([x.to(check.device)], *texts, torch.float32, False)
            ok &= same(along, definition.fake_quantize(x, parse(texts[0]), -1, None, torch.float32))
            ok &= same(across, definition.fake_quantize(x, parse(texts[1]), -2, None, torch.float32))
            ok &= same(stash, definition.pack(x, parse(texts[2]), -2, None))
        yield {"what": f"read once {' '.join(texts)}", "ok": ok}
    xs = [awkward((129, 257), torch.float32, place).to(check.device) for place in range(3)]
    apart = ops.quantize_both(xs, "bfp16", "bfp9", "", torch.float32, True)
    stacked = ops.quantize_both([torch.stack(xs)], "bfp16", "bfp9", "", torch.float32, True)
    yield {
        "what": "three matrices where they lie",
        "ok": all(same(got, wanted.cpu()) for got, wanted in zip(apart, stacked, strict=True)),
    }
    for dtype, dim, text in itertools.product(dtypes, (-1, -2), ("bfp16", "fixed16")):
        xs = [awkward(shape, dtype, 8).to(check.device) for shape in ((512, 512), (37, 50), (1, 1), (2048, 130))]
        if not ops.reads_once(xs[0], [parse(text)]):
            continue
        made = zip(ops.Matrices(xs, dim, parse(text)).quantize(), xs, strict=True)
        alone = ops.round_terms if dtype is torch.float32 else functools.partial(ops.fake_quantize, dtype=dtype)
        ok = all(same(got, alone(x, dim, text, None).cpu()) for got, x in made)
        yield {"what": f"many matrices {text} {str(dtype)[6:]} {dim}", "ok": ok}
    for dtype in dtypes:
        x = awkward((130, 257), dtype, 6)
        ones = masks.pack_positive(x)
        ok = same(ops.pack_positive(x.to(check.device)), ones)
        ok &= same(ops.mask(x.to(check.device), ones.to(check.device)), masks.mask(x, ones))
        ok &= same(ops.dropout(x.to(check.device), 0.3, 1 / 0.7, 5), masks.dropout(x, 0.3, 1 / 0.7, 5))
        yield {"what": f"masks and dropout {str(dtype)[6:]}", "ok": ok}
    if check.gpu:
        x = awkward((512, 512), torch.float32, 7)
        there, stream = x.to(check.device), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            there.mul_(2)
            rounded = ops.fake_quantize(there, -1, "bfp4", None, torch.float32)
        stream.synchronize()
        yield {
            "what": "on a side stream",
            "ok": same(rounded, definition.fake_quantize(x * 2, parse("bfp4"), -1, None, torch.float32)),
        }
        if torch.cuda.mem_get_info()[0] > 20 << 30:
            yield {"what": "2^30 + 48 elements", "ok": _large(check)}


def _large(check: Check) -> bool:
    """Boxes beyond offsets of 32 bits, by slices: rows are quantized alone, each with its own boxes."""
    from fairseq_dsq.formats import definition, parse
    from fairseq_dsq.kernels import ops

    rows = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    x = torch.zeros((1 << 30) + 48, device=check.device)
    places = [0, (1 << 29) - (1 << 29) % 48, (1 << 30) - (1 << 30) % 48]
    for place in places:
        size = min(rows.numel(), x.numel() - place)
        x[place : place + size] = rows.flatten()[:size].to(check.device)
    x = x[: x.numel() // 48 * 48].view(-1, 48)
    rounded = ops.fake_quantize(x, -1, "bfp4", None, torch.float32)
    unpacked = ops.unpack(ops.pack(x, -1, "bfp4", None), x.shape, -1, "bfp4", torch.float32)
    ok = True
    for place in places:
        part = slice(place // 48, place // 48 + 64)
        expected = definition.fake_quantize(x[part].cpu(), parse("bfp4"), -1, None, torch.float32)
        ok &= same(rounded[part], expected) and same(unpacked[part], expected)
    return ok


def products(check: Check) -> Iterator[dict[str, Any]]:
    """Integers whose sums float32 holds must be exact, in any order of summation; random data to (K + 4) 2^-23."""
    from fairseq_dsq.formats import parse
    from fairseq_dsq.gemm import Operand, Side, plan
    from fairseq_dsq.quantized import fake_quantize

    pairs = [("bfp4", "bfp4"), ("bfp16", "bfp4"), ("bfp4", "bfp16"), ("bfp16", "bfp16"), ("bfp24", "bfp4")]
    pairs += [("bfp24", "bfp16"), ("fixed8", "fixed16")]
    for (a_text, b_text), allowed, batched in itertools.product(pairs, (False, True), (False, True)):
        sides = [Side(parse(text), True) for text in (a_text, b_text)]
        with tf32(allowed):
            multiply = plan(*sides, check.device, torch.float32)
            m, k, n, batch = 67, 130, 49, (3,) if batched else ()
            ok = True
            for integers in (True, False):
                tensors = []
                for size, side in zip((m, n), sides, strict=True):
                    x = torch.randn(*batch, size, k, generator=torch.Generator().manual_seed(size))
                    x = (x * 2).round_().clamp_(-2, 2) if integers else fake_quantize(x * 100, side.fmt)
                    tensors.append(x)
                exact = tensors[0].double() @ tensors[1].double().mT
                bound = (
                    0 if integers else (k + 4) * 2.0**-23 * (tensors[0].double().abs() @ tensors[1].double().abs().mT)
                )
                operands = [Operand(x.to(check.device), side, -1) for x, side in zip(tensors, sides, strict=True)]
                ok &= bool(((multiply.multiply(operands[0], operands[1]).double().cpu() - exact).abs() <= bound).all())
        name = f"{a_text} x {b_text}{', TF32 allowed' if allowed else ''}{', batched' if batched else ''}"
        yield {"what": name, "ok": ok, "engine": multiply.engines[0].name}


def layers(check: Check) -> Iterator[dict[str, Any]]:
    """A layer and attention: the first stash equals the CPU's bytes, the results are near the CPU's."""
    from fairseq_dsq.bench.timing import LEVELS
    from fairseq_dsq.nn import DSQAttention, DSQContext, DSQLinear, GemmConfig
    from fairseq_dsq.precision import PrecisionConfig, parse_q

    def pass_of(build: Callable[[Any], torch.nn.Module], context: Any, device: Any, dtype: Any) -> Any:
        torch.manual_seed(3)
        module = build(context).to(device, dtype)
        x = torch.randn(33, 4, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype is torch.uint8:
                kept.append(tensor.cpu())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(x, x, x)[0] if isinstance(module, DSQAttention) else module(x)
        y.float().square().sum().backward()
        results = [y, x.grad, *(parameter.grad for parameter in module.parameters())]
        return kept, [result.detach().float().cpu() for result in results]

    builds = {
        "linear": lambda context: DSQLinear(64, 48, context),
        "attention": lambda context: DSQAttention(64, 4, context),
    }
    for (name, build), text, dtype in itertools.product(
        builds.items(), (*LEVELS, "[16,16,16,16]"), (torch.float32, torch.bfloat16)
    ):
        level = PrecisionConfig(parse_q(text))
        runs = [pass_of(build, DSQContext(GemmConfig(level)), device, dtype) for device in ("cpu", check.device)]
        (bytes_here, here), (bytes_there, there) = runs
        # What a later stash holds follows from products, whose order of summation differs: the first is x's own.
        same_bytes = len(bytes_here) == len(bytes_there) and torch.equal(bytes_here[0], bytes_there[0])
        off = max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in zip(there, here, strict=True))
        ok = same_bytes and off < (0.02 if dtype is torch.float32 else 0.1)
        yield {
            "what": f"{name} {text} {str(dtype)[6:]}",
            "ok": ok,
            "first stash equal": same_bytes,
            "off": round(off, 5),
        }


def waits(check: Check) -> Iterator[dict[str, Any]]:
    """How often a step's forward and backward wait for the GPU, over fairseq's own."""
    from fairseq_dsq.bench import python

    counts = {}
    for name, flags in (("float", None), ("[2,2,2,16]", "--dsq-levels [2,2,2,16]"), ("fixed", "--dsq-format fixed"),
                        ("scope all", "--dsq-levels [2,2,2,16] --dsq-stash-scope all")):  # fmt: skip
        step = python.shrunken_step(flags, device=check.device.type)
        step()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if check.gpu:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn")
            step()
            if check.gpu:
                torch.cuda.set_sync_debug_mode("default")
        counts[name] = sum("synchroniz" in str(each.message) for each in said)
        yield {"what": name, "waits": counts[name], "ok": counts[name] <= counts["float"]}


def trainings(check: Check) -> Iterator[dict[str, Any]]:
    """fairseq-train's first epoch on a toy corpus in fairseq's modes, beside the CPU's."""
    from fairseq_dsq.translation import toy

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy.write(folder / "text", 240, 24, 24)
        prepare = (
            "fairseq_cli.preprocess", "--source-lang", "de", "--target-lang", "en", "--destdir", folder / "data",
            "--trainpref", folder / "text/train", "--validpref", folder / "text/valid",
        )  # fmt: skip
        _python(*prepare)
        here: dict[str, float] = {}
        for mode, flags in MODES.items():
            half = any(flag.endswith(("fp16", "amp")) for flag in flags)
            plain = () if half or "--bf16" in flags else flags  # half precision is held to the CPU's float32 gradients
            if " ".join(plain) not in here:
                here[" ".join(plain)] = _first_loss(folder, "--cpu", *plain)
            if not check.gpu and half:
                continue
            there = _first_loss(folder, *([] if check.gpu else ["--cpu"]), *flags)
            expected = here[" ".join(plain)]
            off = abs(there / expected - 1)
            yield {"what": mode, "loss": there, "on the CPU": expected, "ok": off <= (0.03 if half else FIRST_LOSS)}


def _python(*words: Any) -> str:
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip()[-1500:])
    return done.stdout + done.stderr


def _first_loss(folder: Path, *flags: str) -> float:
    size = [f"--{side}-{name}" for side in ("encoder", "decoder") for name in ("layers", "embed-dim", "ffn-embed-dim")]
    numbers = dict(zip(size, (1, 32, 48) * 2, strict=True))
    log = _python(
        "fairseq_cli.train", folder / "data", "--user-dir", ROOT / "fairseq_dsq", "--arch", "transformer_dsq",
        "--criterion", "dsq_label_smoothed_cross_entropy", *(word for pair in numbers.items() for word in pair),
        "--encoder-attention-heads", 2, "--decoder-attention-heads", 2, "--dropout", 0, "--optimizer", "adam",
        "--lr", 5e-3, "--max-tokens", 600, "--seed", 3, "--max-epoch", 1, "--no-save", "--log-format", "json",
        "--fp16-init-scale", 128, *flags,
    )  # fmt: skip
    lines = [line[line.index("{") :] for line in log.splitlines() if '"train_loss"' in line]
    return float(json.loads(lines[-1])["train_loss"])


def _times(check: Check, runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Of each: median seconds on the device, and seconds of the host until all is enqueued; interleaved."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    flush = torch.empty(64 << 20, dtype=torch.uint8, device=check.device) if check.gpu else None
    for number in range(rounds + 2):
        for name, run in runs.items():
            if check.gpu:
                assert flush is not None
                flush.zero_()  # the L2 cache
                torch.cuda.synchronize()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                started = time.perf_counter()
                run()
                host = time.perf_counter() - started
                end.record()
                torch.cuda.synchronize()
                pair = begin.elapsed_time(end) / 1e3, host
            else:
                started = time.perf_counter()
                run()
                pair = (time.perf_counter() - started,) * 2
            if number > 1:
                found[name].append(pair)
    return {
        name: (statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs))
        for name, pairs in found.items()
    }


def quantizers(check: Check) -> Iterator[dict[str, Any]]:
    """Bandwidth by logical bytes over time: what is read and what is written once."""
    from fairseq_dsq.formats import parse
    from fairseq_dsq.kernels import ops

    rows, columns = (16384, 4096) if check.gpu else (64, 128)
    x = torch.randn(rows, columns, device=check.device)
    runs: dict[str, Callable[[], object]] = {"clone": x.clone}
    moved = {"clone": 8 * x.numel()}

    def add(name: str, run: Callable[[], object], nbytes: float) -> None:
        runs[name], moved[name] = run, int(nbytes)

    for text, (way, dim) in itertools.product(("bfp4", "bfp16", "fixed8"), (("rows", -1), ("columns", -2))):
        packed, size = ops.pack(x, dim, text, None), parse(text).nbytes(x.shape, dim)
        out = 2 * ops.terms(parse(text).significand_bits) * x.numel()
        add(f"terms {text} {way}", functools.partial(ops.round_terms, x, dim, text, None), 4 * x.numel() + out)
        add(f"pack {text} {way}", functools.partial(ops.pack, x, dim, text, None), 4 * x.numel() + size)
        add(f"unpack {text} {way}", functools.partial(ops.unpack_terms, packed, x.shape, dim, text), out + size)
    both = functools.partial(ops.quantize_both, [x])
    add("operand and stash, bfp2", lambda: both("bfp2", "", "bfp2", torch.float32, True), 6.3 * x.numel())
    add("both directions, bfp16", lambda: both("bfp16", "bfp16", "", torch.float32, True), 12 * x.numel())
    times = _times(check, runs, 20 if check.gpu else 1)
    for name, (seconds, host) in times.items():
        speed = moved[name] / seconds / 1e9
        yield {"what": name, "GB/s": round(speed, 1), "over clone": round(seconds / times["clone"][0], 3),
               "host us": round(host * 1e6, 1)}  # fmt: skip


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _in(context: Callable[[], Any], run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> None:
        with context():
            run()

    return inside


def steps(check: Check) -> Iterator[dict[str, Any]]:
    """A training step at three levels beside float32, TF32 and autocast to bfloat16; its peak of memory."""
    from fairseq_dsq.bench.timing import LEVELS, Place
    from fairseq_dsq.bench.train_step import training_step

    shapes = [("transformer_iwslt_de_en", 4096, 32), ("transformer_vaswani_wmt_en_de_big", 16384, 32)]
    if not check.gpu:
        shapes = [("transformer_tiny", 64, 32)]
    for arch, tokens, length in shapes:
        place, half = Place(check.device.type), Place(check.device.type, torch.bfloat16)

        def step(flags: str | None, place: Place, arch: str = arch, tokens: int = tokens, length: int = length) -> Any:
            return training_step(flags, tokens, place=place, arch=arch, length=length)

        plain = step(None, place)
        runs = {"float32": _in(lambda: tf32(False), plain), "TF32": _in(lambda: tf32(True), plain)}
        runs["autocast bf16"] = step(None, half)
        runs |= {text: step(f"--dsq-levels {text}", place) for text in LEVELS}
        runs["[2,2,2,16] scope all"] = step("--dsq-levels [2,2,2,16] --dsq-stash-scope all", place)
        runs["--dsq-format float32"] = step("--dsq-format float32", place)
        times = _times(check, runs, 8 if check.gpu else 1)
        base = times["float32"][0]
        for name, (seconds, host) in times.items():
            yield {"what": f"{arch} {tokens}: {name}", "ms": round(1e3 * seconds, 2),
                   "over float32": round(seconds / base, 3), "over TF32": round(seconds / times["TF32"][0], 3),
                   "over autocast": round(seconds / times["autocast bf16"][0], 3),
                   "enqueued in ms": round(1e3 * host, 2)}  # fmt: skip


def memory(check: Check) -> Iterator[dict[str, Any]]:
    """Peak memory of a step, and the largest batch that fits in 8 GiB."""
    from fairseq_dsq.bench.timing import Place
    from fairseq_dsq.bench.train_step import training_step
    from fairseq_dsq.plugin.held import saved_bytes

    variants: dict[str, tuple[str | None, torch.dtype]] = {
        "float32": (None, torch.float32),
        "autocast bf16": (None, torch.bfloat16),
    }
    for scope in ("gemm", "all"):
        variants[f"[2,2,2,16] scope {scope}"] = f"--dsq-levels [2,2,2,16] --dsq-stash-scope {scope}", torch.float32
    arch, batches = ("transformer_iwslt_de_en", (4096, 16384)) if check.gpu else ("transformer_tiny", (32, 64))

    def peak(flags: str | None, dtype: torch.dtype, tokens: int, length: int) -> float:
        """GiB of a step; on the CPU what autograd keeps."""
        step = training_step(flags, tokens, place=Place(check.device.type, dtype), arch=arch, length=length)
        if not check.gpu:
            return saved_bytes(step, step.model) / 2**30
        torch.cuda.empty_cache()
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**30

    for length in (32, 512) if check.gpu else (32,):
        for name, (flags, dtype) in variants.items():
            small, large = (peak(flags, dtype, tokens, length) for tokens in batches)
            per_token = (large - small) / (batches[1] - batches[0])
            fits = int((8 - (small - batches[0] * per_token)) / per_token)
            yield {"what": f"{name}, sentences of {length}", f"GiB at {batches[0]} tokens": round(small, 2),
                   f"GiB at {batches[1]} tokens": round(large, 2), "tokens in 8 GiB": fits}  # fmt: skip


SECTIONS: list[tuple[str, Callable[[Check], Iterator[dict[str, Any]]], float]] = [
    ("environment", environment, 60), ("bits", bits, 75), ("products", products, 40), ("layers", layers, 60),
    ("waits", waits, 20), ("quantizers", quantizers, 40), ("steps", steps, 80), ("memory", memory, 40),
    ("trainings", trainings, 100),
]  # fmt: skip


def table(check: Check, machine: dict[str, str]) -> str:
    """Markdown: the machine, what was right, and the times."""
    lines = [", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    for name in ("environment", "bits", "products", "layers", "waits", "trainings"):
        rows = [row for row in check.sections.get(name, []) if row.get("ok") is not None]
        lines.append(f"- {name}: {sum(row['ok'] for row in rows)} of {len(rows)} right")
    for name in ("quantizers", "steps", "memory"):
        if rows := [row for row in check.sections.get(name, []) if "ok" not in row]:
            columns = list(rows[0])
            lines += ["", f"| {name} | {' | '.join(columns[1:])} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is checked (default: cuda)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu", metavar="DIR", help="folder to write to (default: runs/gpu)"
    )
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="when to end at last (default: 8)")
    names = [name for name, *_ in SECTIONS]
    parser.add_argument(
        "--sections", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)} (default: all)"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu.sh: error: torch finds no CUDA device here, expected one, or --device cpu", file=sys.stderr)
        return 2
    import fairseq_dsq  # noqa: F401  registers the architectures

    check = Check(args.device, args.minutes)
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine |= {"device": torch.cuda.get_device_name() if check.gpu else "cpu"}
    with contextlib.suppress(ImportError):
        import triton

        machine["triton"] = triton.__version__
    for name, section, seconds in SECTIONS:
        if args.sections is None or name in args.sections:
            check.run(name, section, seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "wrong": check.wrong, "sections": check.sections}
    (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "gpu.md").write_text(table(check, machine))
    for line in check.wrong:
        print(f"wrong: {line[:400]}")
    print(f"written: {args.out / 'gpu.json'}, {args.out / 'gpu.md'}")
    return 1 if check.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
