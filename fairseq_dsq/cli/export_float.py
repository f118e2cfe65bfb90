"""Turn a checkpoint of a *_dsq architecture into one of the float architecture it was made from."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.plugin.export import export_float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="IN", help="checkpoint of a *_dsq architecture")
    parser.add_argument("output", type=Path, metavar="OUT", help="checkpoint to write, for plain fairseq")


def main(args: argparse.Namespace) -> int:
    arch = export_float(args.checkpoint, args.output)
    print(f"wrote {args.output} ({arch})")
    return 0
