"""Average the parameters of checkpoints of one training into a checkpoint at the highest of their precision levels."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.plugin.averaging import average


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUT", help="checkpoint to write")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="IN", help="checkpoints to average")


def main(args: argparse.Namespace) -> int:
    record = average(args.output, args.checkpoints)
    at = "" if record is None else f", at precision level {record.in_force}, {record.levels[record.in_force]}"
    print(f"wrote {args.output}: the average of {len(args.checkpoints)} checkpoints{at}")
    return 0
