"""Time and weigh this project beside plain float32 and its peers, interleaved in one process, as ratios."""

from __future__ import annotations

import argparse
import importlib
import json

from fairseq_dsq.bench import BENCHES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bench", choices=list(BENCHES), help="; ".join(f"{name}: {what}" for name, what in BENCHES.items())
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is timed (default: by the bench)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    import torch
    from tabulate import tabulate

    from fairseq_dsq.cost.hardware import processor
    from fairseq_dsq.kernels import native

    for flag in ("rounds", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag}: got {value}, expected an integer >= 1")
    torch.set_num_threads(args.threads)
    bench = importlib.import_module(f"fairseq_dsq.bench.{args.bench.replace('-', '_')}")
    rows = bench.run(args.rounds or bench.ROUNDS)
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
