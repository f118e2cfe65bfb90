"""Print the flags that --user-dir fairseq_dsq gives fairseq-train, whose own --help leaves an architecture's out."""

from __future__ import annotations

import argparse
import dataclasses

from fairseq_dsq.plugin import config
from fairseq_dsq.text import quoted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="part of a flag's name, such as levels")


def main(args: argparse.Namespace) -> int:
    part = args.name.lstrip("-").replace("_", "-")
    every = {field.name for field in dataclasses.fields(config.DSQConfig)}
    page = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    found = False
    for of, kind in (
        ("--arch of every <model>_dsq", config.DSQConfig),
        ("--arch roberta_dsq and its like", config.DSQEncoderConfig),
        *((of, kind) for kind, of in config.OTHER_CONFIGS.items()),
    ):
        group = page.add_argument_group(of)
        for field in dataclasses.fields(kind):
            if part in config.option(field.name) and (kind is config.DSQConfig or field.name not in every):
                config.add_flag(group, field)
                found = True
    if not found:
        raise ValueError(f"NAME: got {quoted(args.name)}, expected part of a flag's name, such as levels")
    print(page.format_help(), end="")
    return 0
