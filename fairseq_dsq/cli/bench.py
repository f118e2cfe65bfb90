"""Time and weigh this project beside plain float32 and its peers, interleaved in one process, as ratios."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from fairseq_dsq.bench import BENCHES, ON_A_GPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bench", choices=list(BENCHES), help="; ".join(f"{name}: {what}" for name, what in BENCHES.items())
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is timed (default: by the bench)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (default: 1)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPE", help="float32, bfloat16 or float16 (default: float32)"
    )
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
    place = _place(args)
    torch.set_num_threads(args.threads)
    bench = importlib.import_module(f"fairseq_dsq.bench.{args.bench.replace('-', '_')}")
    rows = bench.run(args.rounds or bench.ROUNDS, *([place] if args.bench in ON_A_GPU else []))
    kernels = native.kernels.isa if native.kernels else f"none ({native.unavailable})"
    machine = {
        "processor": processor(), "capability": torch.backends.cpu.get_cpu_capability(), "kernels": kernels,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device, "dtype": args.dtype,
    }  # fmt: skip
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=1))
    else:
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
        print(tabulate(rows, "keys", floatfmt=".3f"))
    return 0


def _place(args: argparse.Namespace) -> Any:
    """Where the bench runs.

    Raises:
        ValueError: it cannot there.
    """
    import torch

    from fairseq_dsq.bench.timing import CPU, Place

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if args.dtype not in dtypes:
        raise ValueError(f"--dtype: got {args.dtype!r}, expected one of {', '.join(dtypes)}")
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {args.device!r}, expected cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, which torch does not find here")
    place = Place(args.device, dtypes[args.dtype])
    if place != CPU and args.bench not in ON_A_GPU:
        raise ValueError(f"--device, --dtype: got {args.bench}, expected one of {', '.join(ON_A_GPU)} beside these")
    return place
