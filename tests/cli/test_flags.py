"""fairseq-dsq flags."""

from __future__ import annotations

import re

import pytest

from fairseq_dsq.cli import main
from fairseq_dsq.plugin import config


def shown(capsys, *argv):
    """(groups, flags) of what is printed."""
    assert main(["flags", *argv]) == 0
    out = capsys.readouterr().out
    return re.findall(r"^(--.*):$", out, re.M), re.findall(r"^  (--\S+)", out, re.M)


def test_every_flag_is_printed_once(capsys):
    groups, flags = shown(capsys)
    kinds = (config.DSQEncoderConfig, *config.OTHER_CONFIGS)
    expected = [config.option(name) for kind in kinds for name in config.defaults(kind)]
    assert sorted(flags) == sorted(expected)
    assert "--optimizer dsq_adam" in groups and "--criterion dsq_<criterion>" in groups


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("levels", ["--dsq-levels"]),
        ("--dsq-levels", ["--dsq-levels"]),
        ("dsq_moment", ["--dsq-moment1", "--dsq-moment2", "--dsq-moment-rounding"]),
        ("token", ["--token-types"]),
        ("profile", ["--dsq-cost-profile"]),
    ],
)
def test_a_part_of_a_name_chooses(capsys, name, expected):
    assert shown(capsys, "--", name)[1] == expected


def test_a_part_of_no_name_is_refused(capsys):
    assert main(["flags", "zzz"]) == 2
    assert capsys.readouterr().err == (
        "fairseq-dsq flags: error: NAME: got 'zzz', expected part of a flag's name, such as levels\n"
    )
