"""Bad input ends in one line that names the flag and the value, a non-zero exit code, and nothing trained."""

import sys

import pytest
from fairseq_cli.train import cli_main

from fairseq_dsq.errors import DSQError

CASES = [
    ("--dsq-levels", "[2,2,2]", "four integers"),
    ("--dsq-levels", "[2,2,2,16.5]", "16.5"),
    ("--dsq-levels", "[2,2,2,x]", "[2,2,2,x]"),
    ("--dsq-levels", "[1,2,2,16]", "q0: got 1, expected 2 to 32"),
    ("--dsq-levels", "[2,2,2,33]", "q3: got 33, expected 2 to 32"),
    ("--dsq-levels", "[2,2,2,16", "[2,2,2,16"),
    ("--dsq-levels", "", "expected one or more levels"),
    ("--dsq-levels", "  ", "expected one or more levels"),
    ("--dsq-format", "bfp16", "got 'bfp16', expected one of bfp, fixed, float32"),
    ("--dsq-schedule", "step", "got 'step', expected one of plateau, updates, cyclic, callback"),
    ("--dsq-raise-at", "9,5", "got '9,5', expected rising updates such as 1000,4000"),
    ("--dsq-cycle", "0", "got '0', expected an integer >= 1"),
    ("--dsq-callback", "rule", "got 'rule', expected module:function"),
    ("--dsq-rounding", "up", "got 'up', expected one of nearest, stochastic"),
    ("--dsq-patience", "0", "got '0', expected an integer >= 1"),
    ("--dsq-patience", "two", "got 'two', expected an integer >= 1"),
    ("--dsq-min-delta", "-1", "got '-1', expected a finite number >= 0"),
    ("--dsq-min-delta", "nan", "got 'nan', expected a finite number >= 0"),
    ("--dsq-sign-bit", "none", "got 'none', expected one of counted, extra"),
    ("--dsq-box-dim", "first", "got 'first', expected one of reduction, last"),
    ("--dsq-attention-matmul", "maybe", "got 'maybe', expected one of on, off"),
    ("--dsq-fixed-scale", "auto", "got 'auto', expected one of dynamic, row, static"),
    ("--dsq-scale", "ceil", "got 'ceil', expected one of floor, fit"),
]


@pytest.mark.parametrize(("flag", "value", "expected"), CASES)
def test_a_bad_flag_is_named_in_one_line(cli, tmp_path, monkeypatch, capsys, flag, value, expected):
    command = cli.train_command(tmp_path / "run", f"{flag}={value}")
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as stop:
        cli_main()
    message = str(stop.value)
    assert "\n" not in message
    assert message.startswith("fairseq-train: error: argument")
    assert flag in message
    assert expected in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--dsq-level=[2,2,2,16]", "--dsq-level: no such flag, expected --dsq-levels"),
        ("--dsq_patience=5", "--dsq_patience: no such flag, expected --dsq-patience"),
        ("--dsq-cost-profil=paper", "--dsq-cost-profil: no such flag, expected --dsq-cost-profile"),
        (
            ("--dsq-levels", "[2,2,2,16]", "[16,4,4,16]"),
            "argument --dsq-levels: got [16,4,4,16] as a word of its own, expected quotes: '[2,2,2,16] [16,4,4,16]'",
        ),
        (
            ("--dsq-rules=*.fc2=[4,4,4,16]", "[8,8,8,16]"),
            "argument --dsq-rules: got [8,8,8,16] as a word of its own, expected quotes: '*.fc2=[4,4,4,16] [8,8,8,16]'",
        ),
        ("--dsq-zzz", "--dsq-zzz: no such flag, expected one that fairseq-dsq flags lists"),
    ],
)
def test_a_misspelt_flag_is_named_in_one_line(cli, tmp_path, monkeypatch, flag, expected):
    words = (flag,) if isinstance(flag, str) else flag
    monkeypatch.setattr(sys, "argv", [str(part) for part in cli.train_command(tmp_path / "run", *words)])
    with pytest.raises(DSQError) as error:  # which ends a command in one line
        cli_main()
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--dsq-levels", "[4,4,4,16] [2,4,4,16]"), "argument --dsq-levels: level 1 [2,4,4,16]: q0 falls from 4 to 2"),
        (("--dsq-skip", "decoder.nothing"), "argument --dsq-skip: skip pattern 'decoder.nothing' matches no layer"),
        (("--dsq-sign-bit", "extra", "--dsq-levels", "[2,2,2,32]"), "argument --dsq-levels"),
        (("--dsq-format", "float32", "--dsq-levels", "[2,2,2,16]"), "argument --dsq-levels"),
        (("--quant-noise-pq", "0.1"), "quant noise"),
        (("--dsq-patince", "3"), "fairseq-train: error: --dsq-patince: no such flag, expected --dsq-patience"),
        (("--dsq-cost-profile", "nix"), "argument --dsq-cost-profile: got 'nix', expected operands, paper"),
    ],
)
def test_the_command_exits_non_zero_without_a_traceback(cli, tmp_path, flags, expected):
    _, err = cli.run(*cli.train_command(tmp_path / "run", *flags), code=1)
    assert expected in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.glob("run/*.pt"))


def test_data_that_are_not_there_are_named_in_one_line(cli, tmp_path, monkeypatch):
    command = [str(part) for part in cli.train_command(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["/nope" if part == str(cli.data) else part for part in command])
    with pytest.raises(DSQError, match="DATA: got '/nope', expected a folder that fairseq-preprocess made"):
        cli_main()


def test_the_criterion_without_dsq_layers_is_named(cli, tmp_path):
    _, err = cli.run(*cli.train_command(tmp_path / "run", arch="transformer"), code=1)
    assert "argument --criterion" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_checkpoint_with_more_levels_than_the_flags_is_named(cli, tmp_path):
    levels = "[2,2,2,16] [4,4,4,16]"
    cli.train(tmp_path / "run", "--dsq-levels", levels, "--dsq-patience", 1, "--dsq-min-delta", 100, "--max-epoch", 2)
    command = cli.train_command(tmp_path / "run", "--dsq-levels", "[2,2,2,16]", "--max-epoch", 3)
    _, err = cli.run(*command, code=1)
    assert "argument --dsq-levels" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("fairseq-dsq", "epochs", "missing.log"), "missing.log"),
        (("fairseq-dsq", "export-float", "missing.pt", "out.pt"), "missing.pt"),
        (("fairseq-dsq", "average", "out.pt", "text/train.de"), "error: text/train.de: is cut or no checkpoint: torch"),
        (("fairseq-dsq", "convert-hf", "text", "out"), "error: text: expected a folder with config.json"),
        (("fairseq-dsq", "roofline", "--hardware", "none"), "or the path of a .yaml file, or measure"),
        (("fairseq-dsq", "translation-prepare", "multi30k", "folder"), "DSQ_DATA"),
    ],
)
def test_the_tools_name_what_is_wrong_with_a_file(cli, tmp_path, command, expected):
    _, err = cli.run(*command, code=2, DSQ_DATA=str(tmp_path))
    assert expected in err.splitlines()[-1]
    assert "Traceback" not in err
