"""Print one row per epoch of a training: level, losses, modelled arithmetic and DRAM traffic."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN", help="a run's folder, its dsq.jsonl, or a log in JSON")


def main(args: argparse.Namespace) -> int:
    from fairseq_dsq.report.runs import epoch_table, read_run

    print(epoch_table(read_run(args.path).epochs))
    return 0
