"""Time this project beside plain float32, interleaved in one process, as ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from tabulate import tabulate

BENCHES = ("logging",)
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bench", choices=BENCHES, help="logging: a step with the dsq_ criterion over the plain one")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="how often each is timed (default: 15)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    import torch

    from fairseq_dsq.cost.hardware import processor

    for flag in ("rounds", "threads"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag}: got {getattr(args, flag)}, expected an integer >= 1")
    torch.set_num_threads(args.threads)
    rows = {"logging": _logging}[args.bench](args.rounds)
    machine = {"processor": processor(), "threads": args.threads, "torch": torch.__version__}
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=1))
    else:
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
        print(tabulate(rows, "keys", floatfmt=".3f"))
    return 0


def interleave(
    variants: Mapping[str, Callable[[], object]], baseline: Callable[[], object], baseline_name: str, rounds: int
) -> list[Row]:
    """Time every variant and the baseline once a round, after one round to warm up.

    Returns:
        One row per variant: the ratio of the fastest rounds, the median of the rounds' ratios, seconds.
    """
    runs = {"": baseline, **variants}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
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


def _logging(rounds: int) -> list[Row]:
    """A step of transformer_iwslt_de_en, 512 tokens, in float32, where logging weighs the most."""
    from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
    from fairseq.data import Dictionary

    from fairseq_dsq.criterions.dsq_criterion import PREFIX
    from fairseq_dsq.models import probe

    name = "cross_entropy"
    spec = probe.ModelSpec("transformer_dsq_iwslt_de_en", "--dsq-format float32", tokens=512)
    model = probe.build(spec, "cpu")
    sample = probe.sample(model, spec)

    class Task:
        target_dictionary = Dictionary()

    def step(name: str) -> Callable[[], object]:
        config = CRITERION_DATACLASS_REGISTRY[name](sentence_avg=False)
        criterion = CRITERION_REGISTRY[name].build_criterion(config, Task())
        return lambda: criterion(model, sample)[0].backward()

    return interleave({f"{PREFIX}{name}": step(PREFIX + name)}, step(name), name, rounds)
