"""Print one row per epoch of a training log: level, losses, modelled arithmetic and DRAM traffic."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_dsq.report.logs import epoch_table, read_json_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, metavar="LOG", help="log of fairseq-train --log-format json")


def main(args: argparse.Namespace) -> int:
    print(epoch_table(read_json_log(args.log)))
    return 0
