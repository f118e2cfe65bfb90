"""What fairseq-train really writes, in each of its log formats, read back by ``fairseq-dsq report``."""

import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_dsq
from fairseq_dsq.cli import main
from fairseq_dsq.report.runs import read_run

BIN = Path(sys.executable).parent
FLAGS = (
    "--dsq-levels", "[2,2,2,16] [16,4,4,16]", "--dsq-patience", 1, "--dsq-min-delta", 100, "--max-epoch", 3,
    "--no-save", "--valid-subset", "valid,test", "--validate-interval-updates", 4, "--log-interval", 5,
)  # fmt: skip


def train_in_a_terminal(cli, *flags):
    """Train with standard error on a terminal, which is where fairseq draws bars; returns what it showed."""
    command = cli.train_command("unused", *flags)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [str(BIN / command[0]), *map(str, command[1:])],
        cwd=cli.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    assert process.wait(timeout=60) == 0, shown[-3000:]
    return shown


@pytest.fixture(scope="module")
def logs(cli, tmp_path_factory):
    """One training, written in every way. It is repeated per format: same seed, same numbers."""
    folder = tmp_path_factory.mktemp("logs")
    json_log = cli.train("unused", *FLAGS, "--log-file", folder / "json.raw", "--tensorboard-logdir", folder / "board")
    (folder / "json.log").write_text(json_log)
    simple_log = cli.train("unused", *FLAGS, "--log-format", "simple", "--log-file", folder / "simple.raw")
    (folder / "simple.log").write_text(simple_log)
    (folder / "tqdm.log").write_bytes(train_in_a_terminal(cli, *FLAGS, "--log-format", "tqdm"))
    return folder


@pytest.fixture(scope="module")
def expected(logs):
    """What the JSON lines say, read without the parser under test."""
    epochs = {}
    for line in (logs / "json.log").read_text().splitlines():
        if '"train_loss"' in line or '"valid_loss"' in line:
            record = json.loads(line[line.index("{") :])
            epochs.setdefault(record["epoch"], {}).update(record)
    return epochs


def test_json_holds_what_its_lines_say(logs, expected):
    run = read_run(logs / "json.log")
    assert len(run.epochs) == 3 and run.incomplete == ""
    for epoch in run.epochs:
        record = expected[epoch.number]
        assert epoch.updates == int(record["train_num_updates"])
        for field, key in {
            "train_loss": "train_loss",
            "valid_loss": "valid_loss",
            "level": "train_dsq_level",
            "stash_bytes": "train_dsq_stash_bytes",
            "arithmetic": "train_dsq_arithmetic",
            "arithmetic_baseline": "train_dsq_arithmetic_baseline",
            "dram_bytes": "train_dsq_dram_bytes",
            "dram_baseline_bytes": "train_dsq_dram_baseline_bytes",
            "arithmetic_relative": "train_dsq_arithmetic_relative",
            "dram_relative": "train_dsq_dram_relative",
        }.items():
            assert getattr(epoch, field) == float(record[key]), field
    assert run.epochs[0].level < run.epochs[-1].level == 1


@pytest.mark.parametrize("name", ["simple.log", "tqdm.log", "json.raw", "simple.raw"])
def test_every_text_format_gives_the_same_epochs(logs, name):
    reference, run = read_run(logs / "json.log"), read_run(logs / name)
    assert run.epochs == reference.epochs
    assert (run.best, run.incomplete, run.flags) == (reference.best, "", reference.flags)


def test_the_samples_are_of_the_kinds_that_they_are_called(logs):
    assert b"\r\n" in (logs / "tqdm.log").read_bytes()
    assert "| INFO |" not in (logs / "json.raw").read_text()
    assert (logs / "simple.raw").read_text().count("\nepoch 003 | valid on 'valid' subset | loss") > 3
    assert '{"epoch"' not in (logs / "simple.log").read_text()


@pytest.mark.parametrize("name", ["board", "board/valid", "events"])
def test_tensorboard_gives_the_same_epochs(logs, name):
    pytest.importorskip("tensorboard")
    path = next((logs / "board" / "train").iterdir()) if name == "events" else logs / name
    reference, run = read_run(logs / "json.log"), read_run(path)
    assert len(run.epochs) == len(reference.epochs)
    for ours, theirs in zip(run.epochs, reference.epochs, strict=True):
        # Events hold float32, so the last of a log's six digits may differ.
        assert dataclasses.asdict(ours) == pytest.approx(dataclasses.asdict(theirs), rel=2e-6)
    assert run.best == reference.best and run.incomplete == ""
    assert {key: run.flags[key] for key in ("arch", "dsq_levels", "max_epoch")} == {
        key: reference.flags[key] for key in ("arch", "dsq_levels", "max_epoch")
    }


def test_a_cut_log_is_reported_as_incomplete(logs, tmp_path):
    text = (logs / "simple.log").read_text()
    cut = tmp_path / "cut.log"
    cut.write_text(text[: text.index("| INFO | train | epoch 002") + 60])
    run = read_run(cut)
    assert run.epochs[0] == read_run(logs / "json.log").epochs[0]
    assert run.epochs[1].train_loss is None and run.epochs[1].valid_loss is not None
    assert run.incomplete == "epoch 2 of 3 begun and not ended"


def test_the_report_command_reads_a_folder_with_generate_s_output(cli, tmp_path, capsys):
    folder = tmp_path / "plain"
    flags = ("--max-epoch", 1, "--no-last-checkpoints", "--log-format", "simple")
    folder.mkdir()
    log = cli.train(folder, *flags, arch="transformer", criterion="label_smoothed_cross_entropy")
    (folder / "train.log").write_text(log)
    out, _ = cli.run(
        "fairseq-generate", cli.data, "--user-dir", fairseq_dsq.__path__[0], "--path", folder / "checkpoint_best.pt",
        "--beam", 1, "--required-batch-size-multiple", 1,
    )  # fmt: skip
    (folder / "generate.out").write_text(out)
    bleu = (
        next(line for line in out.splitlines() if line.startswith("Generate test")).split("BLEU4 = ")[1].split(",")[0]
    )
    assert main(["report", str(folder), str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 0
    text, err = capsys.readouterr()
    assert "| Float32 (fairseq) | [32,32,32,32]" in text and f" {bleu} |" in text
    assert err.count("\n") == 1 and "no such file or folder" in err
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000
