"""A tiny corpus, binarised once, and the real fairseq command lines."""

import gc
import logging
import os
import sys
from pathlib import Path

import pytest
from command import run
from fairseq_cli import train as fairseq_train

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


class CommandLine:
    """Runs console scripts of this environment as a user would, from a folder that is not the clone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"

    def run(self, *command, code=0, **environment):
        """Run to the end; fails the test on another exit code. Returns (stdout, stderr)."""
        found, out, err = run(list(map(str, command)), self.folder, {**os.environ, **environment})
        assert found == code, f"exit code {found}\n{out[-3000:]}\n{err[-3000:]}"
        return out, err

    def train_command(self, save_dir, *flags, arch="transformer_dsq", criterion="dsq_label_smoothed_cross_entropy"):
        return (
            "fairseq-train", self.data, "--user-dir", ROOT / "fairseq_dsq", "--arch", arch, "--criterion", criterion,
            "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 48,
            "--encoder-attention-heads", 2, "--decoder-attention-heads", 2, "--share-decoder-input-output-embed",
            "--dropout", 0.1, "--optimizer", "adam", "--lr", 5e-3, "--max-tokens", 600, "--seed", 3, "--cpu",
            "--log-format", "json", "--no-epoch-checkpoints", "--save-dir", save_dir, *flags,
        )  # fmt: skip

    def train(self, save_dir, *flags, **options):
        """Train; returns the log."""
        out, err = self.run(*self.train_command(save_dir, *flags, **options))
        return out + err


@pytest.fixture(scope="session")
def cli(tmp_path_factory):
    gc.freeze()  # trainings collect garbage at each epoch, in this process too: what was imported is none
    commands = CommandLine(tmp_path_factory.mktemp("e2e"))
    commands.run("fairseq-dsq", "corpus", "text", "--train", 240, "--valid", 24, "--test", 24)
    commands.run(
        "fairseq-preprocess", "-s", "de", "-t", "en", "--trainpref", "text/train", "--validpref", "text/valid",
        "--testpref", "text/test", "--destdir", "data",
    )  # fmt: skip
    yield commands
    gc.unfreeze()


@pytest.fixture
def train(cli, monkeypatch, caplog):
    """fairseq-train as a command would run it: with nothing left of the trainings before. Returns the log."""

    def run(save_dir, *flags, **options):
        for name in ("best", "num_runs"):
            vars(fairseq_train.should_stop_early).pop(name, None)
        command = cli.train_command(save_dir, "--num-workers", 0, *flags, **options)
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fairseq_train.cli_main()
        return caplog.text

    return run


@pytest.fixture(scope="session")
def lm_data(cli):
    """A tiny corpus of one language."""
    text = cli.folder / "text"
    cli.run(
        "fairseq-preprocess", "--only-source", "--trainpref", text / "train.en", "--validpref", text / "valid.en",
        "--destdir", cli.folder / "lm",
    )  # fmt: skip
    return cli.folder / "lm"
