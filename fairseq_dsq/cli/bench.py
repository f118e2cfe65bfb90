"""Time and weigh this project beside float32, what a user may pick instead, and its peers, as ratios."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq_dsq import artefact
from fairseq_dsq.bench import ALL, BENCHES, IN_HALF_PRECISION, ON_A_GPU, RIVALS
from fairseq_dsq.cli import blame
from fairseq_dsq.cli.arguments import size_in_bytes
from fairseq_dsq.text import quoted

EVERY = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "; ".join(f"{name}: {what}" for name, what in BENCHES.items())
    parser.add_argument(
        "bench", choices=[*BENCHES, EVERY], help=f"{what}; {EVERY}: {', '.join(ALL)}, each in a process of its own"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is timed (default: by the bench)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (default: 1)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPE", help="float32, bfloat16 or float16 (default: float32)"
    )
    rivals = "; ".join(f"{name}: {', '.join(names)}" for name, names in RIVALS.items())
    parser.add_argument(
        "--rivals", metavar="NAMES", help=f"what stands beside this project, of {rivals} (default: all; none for none)"
    )
    parser.add_argument(
        "--fit", metavar="SIZE", help="with memory: the largest batch that fits in so much, such as 4GB or 4GiB"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help=f"with {EVERY}: write one JSON file a bench; those of the same version, settings and machine are kept",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    for flag in ("rounds", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag}: got {value}, expected an integer >= 1")
    if (args.bench == EVERY) != (args.out is not None):
        raise ValueError(f"--out: got {'none' if args.out is None else args.out} with {args.bench}, expected a folder "
                         f"with {EVERY}, which needs one, and with nothing else")  # fmt: skip
    if args.bench == EVERY:
        return _run_all(args)

    from tabulate import tabulate

    settings = _settings(args)
    document = _made_by(args)
    bench = importlib.import_module(f"fairseq_dsq.bench.{args.bench.replace('-', '_')}")
    found = bench.run(settings._replace(rounds=args.rounds or bench.ROUNDS))
    document |= {"command": shlex.join(["fairseq-dsq", "bench", *_words(args)]), "notes": found.notes}
    if args.json:
        print(json.dumps({**document, "rows": found.rows}, indent=1))
    else:
        print(", ".join(f"{key} {value}" for key, value in document["machine"].items()))
        print(tabulate(found.rows, "keys", floatfmt=".3f"))
        for note in found.notes:
            print(note)
    return 0


def _words(args: argparse.Namespace) -> list[str]:
    """The words that ask for the same bench."""
    words = [args.bench, "--threads", str(args.threads)]
    for flag, default in (("rounds", None), ("device", "cpu"), ("dtype", "float32"), ("rivals", None), ("fit", None)):
        if (value := getattr(args, flag)) != default:
            words += [f"--{flag}", str(value)]
    return words


def _made_by(args: argparse.Namespace) -> dict[str, Any]:
    """Which bench, of which version, with what settings and on what machine."""
    import torch

    from fairseq_dsq.bench.timing import Place
    from fairseq_dsq.cost.hardware import processor
    from fairseq_dsq.kernels import native

    torch.set_num_threads(args.threads)
    machine = {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.kernels.isa if native.kernels else f"none ({native.unavailable})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "dtype": args.dtype,
        "clock": Place(args.device).clock_name,
    }
    settings = {flag: getattr(args, flag) for flag in ("rounds", "rivals", "fit")}
    return {"bench": args.bench, "what": BENCHES[args.bench], "version": artefact.version(), "settings": settings,
            "machine": machine}  # fmt: skip


def _settings(args: argparse.Namespace) -> Any:
    """How the bench runs.

    Raises:
        ValueError: it cannot there, or not so.
    """
    import torch

    from fairseq_dsq.bench.timing import Place, Settings

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if args.dtype not in dtypes:
        raise ValueError(f"--dtype: got {args.dtype!r}, expected one of {', '.join(dtypes)}")
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {args.device!r}, expected cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, which torch does not find here")
    for flag, default, benches in (
        ("device", "cpu", ON_A_GPU), ("dtype", "float32", IN_HALF_PRECISION), ("rivals", None, tuple(RIVALS)),
        ("fit", None, ("memory",)),
    ):  # fmt: skip
        if getattr(args, flag) != default and args.bench not in benches:
            raise ValueError(f"--{flag}: got {args.bench}, expected one of {', '.join(benches)} beside it")
    known = RIVALS.get(args.bench, ())
    rivals = known if args.rivals is None else _rivals(args.rivals, known)
    with blame("--fit"):
        fit = size_in_bytes(args.fit) if args.fit else None
    return Settings(0, Place(args.device, dtypes[args.dtype]), rivals, fit)


def _rivals(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a list with commas; of ``none``, none."""
    names = tuple(() if text == "none" else text.split(","))
    for name in names:
        if name not in known:
            raise ValueError(f"--rivals: got {quoted(name)}, expected none or some of {', '.join(known)}")
    return names


# ---- all


def _run_all(args: argparse.Namespace) -> int:
    """Run every bench in a process of its own; one that fails is named, and the others run."""
    if args.json:
        raise ValueError(f"--json: got it with {EVERY}, which writes JSON, expected none")
    if args.rivals is not None:
        _rivals(args.rivals, tuple(dict.fromkeys(name for names in RIVALS.values() for name in names)))
    asked = [_one_of_all(args, name) for name in ALL]
    for each in asked:
        _settings(each)  # refused before hours have passed
    failed = False
    for each in asked:
        path = args.out / f"{each.bench}.json"
        if _is_made(path, _made_by(each)):
            print(f"{each.bench}: kept {path}", flush=True)
            continue
        try:
            document = run_alone(_words(each))
        except ValueError as error:
            print(f"fairseq-dsq bench: {each.bench} failed: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        with artefact.atomic(path) as partial:
            partial.write_text(document, encoding="utf-8")
        print(f"{each.bench}: wrote {path}", flush=True)
    return 1 if failed else 0


def _one_of_all(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The arguments of one of the benches: those of all that are its own."""
    given: dict[str, Any] = {**vars(args), "bench": name, "out": None}
    if name not in ON_A_GPU:
        given["device"] = "cpu"
    if name not in IN_HALF_PRECISION:
        given["dtype"] = "float32"
    if name != "memory":
        given["fit"] = None
    if name not in RIVALS:
        given["rivals"] = None
    elif args.rivals is not None:
        asked = args.rivals.split(",")
        given["rivals"] = ",".join(known for known in RIVALS[name] if known in asked) or "none"
    return argparse.Namespace(**given)


def _is_made(path: Path, made_by: Mapping[str, Any]) -> bool:
    """Whether the file holds what the same bench, version and settings found on the same machine."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and all(document.get(key) == value for key, value in made_by.items())


def run_alone(words: list[str]) -> str:
    """What a bench prints as JSON in a process of its own.

    Raises:
        ValueError: it failed; the message is its last line.
    """
    command = [sys.executable, "-m", "fairseq_dsq.cli", "bench", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return done.stdout[done.stdout.index("{") :]
