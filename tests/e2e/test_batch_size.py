"""A sentence's loss and translation do not depend on what it is batched with."""

import json

import pytest

import fairseq_dsq

USER_DIR = ("--user-dir", fairseq_dsq.__path__[0])


@pytest.fixture(scope="module")
def checkpoint(cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cli.train(folder, "--dsq-levels", "[4,4,4,16]", "--max-epoch", 3, "--lr", 1e-2)
    return folder / "checkpoint_last.pt"


def validation_loss(cli, checkpoint, batch_size):
    out, err = cli.run(
        "fairseq-validate", cli.data, *USER_DIR, "--path", checkpoint, "--batch-size", batch_size, "--cpu",
        "--required-batch-size-multiple", 1, "--log-format", "json", "--task", "translation",
    )  # fmt: skip
    line = next(line for line in (out + err).splitlines() if '"valid_loss"' in line)
    return json.loads(line[line.index("{") :])["valid_loss"]


def translations(cli, checkpoint, batch_size):
    """Number of the sentence -> (words, score)."""
    out, _ = cli.run(
        "fairseq-generate", cli.data, *USER_DIR, "--path", checkpoint, "--batch-size", batch_size, "--cpu", "--beam", 3,
        "--required-batch-size-multiple", 1,
    )  # fmt: skip
    lines = (line.split("\t") for line in out.splitlines() if line.startswith("H-"))
    return {name: (words, float(score)) for name, score, words in lines}


def test_the_validation_loss_is_the_same_at_any_batch_size(cli, checkpoint):
    losses = {batch_size: validation_loss(cli, checkpoint, batch_size) for batch_size in (1, 5, 24)}
    assert len(set(losses.values())) == 1, losses  # as printed, three decimals


def test_translations_are_the_same_at_any_batch_size(cli, checkpoint):
    alone, together = (translations(cli, checkpoint, batch_size) for batch_size in (1, 24))
    assert len(alone) == 24
    for name, (words, score) in alone.items():
        assert together[name][0] == words
        assert together[name][1] == pytest.approx(score, abs=2e-4)
