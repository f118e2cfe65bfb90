"""Print one row per epoch of a training log: level, losses, modelled arithmetic and DRAM traffic."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, metavar="RUN", help="log of fairseq-train, or a run's folder")


def main(args: argparse.Namespace) -> int:
    from fairseq_dsq.report.logs import epoch_table, read_run

    print(epoch_table(read_run(args.log).epochs))
    return 0
