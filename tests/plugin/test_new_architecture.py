"""To add an architecture: the twin of a fairseq model, its flags, training, evaluation and way back."""

import json
import re
import subprocess
import sys

import pytest

TWIN = '''
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture

import fairseq_dsq  # noqa: F401
from fairseq_dsq.plugin.checkpoints import DSQModelMixin
from fairseq_dsq.plugin.config import set_defaults


@register_model("transformer_lm_dsq")
class TransformerLanguageModelDSQ(DSQModelMixin, TransformerLanguageModel):
    """fairseq's language model, which has a dataclass, quantized."""


@register_model_architecture("transformer_lm_dsq", "transformer_lm_dsq")
def transformer_lm_dsq(args):
    set_defaults(args)
    base_lm_architecture(args)
'''
SHAPE = (
    "--decoder-layers",
    1,
    "--decoder-embed-dim",
    32,
    "--decoder-ffn-embed-dim",
    48,
    "--decoder-attention-heads",
    2,
)
BATCHES = ("--tokens-per-sample", 32, "--max-tokens", 256, "--required-batch-size-multiple", 1)


@pytest.fixture(scope="module")
def twin(cli, tmp_path_factory):
    """A user-dir with the twin, a corpus of one language, and a training of an epoch: (folder, its log)."""
    folder = tmp_path_factory.mktemp("twin")
    (folder / "my_plugin").mkdir()
    (folder / "my_plugin/__init__.py").write_text(TWIN, encoding="utf-8")
    text = cli.folder / "text"
    cli.run(
        "fairseq-preprocess", "--only-source", "--trainpref", text / "train.en", "--validpref", text / "valid.en",
        "--destdir", folder / "data",
    )  # fmt: skip
    out, err = cli.run(*train(folder, "--share-decoder-input-output-embed", "--dsq-levels", "[4,4,4,16]"))
    return folder, out + err


def train(folder, *flags):
    return (
        "fairseq-train", folder / "data", "--user-dir", folder / "my_plugin", "--task", "language_modeling",
        "--arch", "transformer_lm_dsq", "--criterion", "dsq_cross_entropy", *SHAPE,
        *BATCHES, "--optimizer", "adam", "--lr", 5e-3, "--max-epoch", 1, "--cpu", "--log-format", "json",
        "--no-epoch-checkpoints", "--save-dir", folder / "run", *flags,
    )  # fmt: skip


def valid_loss(log):
    lines = [json.loads(line[line.index("{") :]) for line in log.splitlines() if "| valid |" in line]
    return float(lines[-1]["valid_loss"])


def test_the_twin_has_every_flag_of_its_model(twin):
    names = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FLAGS_OF], cwd=twin[0], capture_output=True, text=True, check=True
    ).stdout.split()
    assert names == ["True"], names


FLAGS_OF = """
import argparse, my_plugin
from fairseq.models import MODEL_REGISTRY
def flags(name):
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    MODEL_REGISTRY[name].add_args(parser)
    return {action.dest for action in parser._actions}
own, twin = flags("transformer_lm"), flags("transformer_lm_dsq")
print(own < twin and all(name.startswith("dsq_") for name in twin - own) and len(own) > 40)
"""


def test_the_twin_trains_quantized_and_evaluates_to_the_loss_it_was_validated_with(cli, twin):
    folder, log = twin
    assert '"train_dsq_arithmetic_relative"' in log
    out, err = cli.run(
        "fairseq-eval-lm", folder / "data", "--user-dir", folder / "my_plugin", "--path",
        folder / "run/checkpoint_best.pt", "--gen-subset", "valid", *BATCHES,
    )  # fmt: skip
    loss = float(re.search(r"Loss \(base 2\): ([0-9.]+)", out + err)[1])
    assert loss == pytest.approx(valid_loss(log), abs=0.05)


def test_the_twin_s_export_is_read_by_plain_fairseq(cli, twin):
    folder, _ = twin
    cli.run("fairseq-dsq", "export-float", folder / "run/checkpoint_best.pt", folder / "plain.pt")
    out, err = cli.run(
        "fairseq-eval-lm",
        folder / "data",
        "--path",
        folder / "plain.pt",
        "--gen-subset",
        "valid",
        "--batch-size",
        4,
        "--required-batch-size-multiple",
        1,
    )
    assert "Loss (base 2)" in out + err


def test_the_twin_refuses_as_the_others_do(cli, twin):
    folder, _ = twin
    _, err = cli.run(*train(folder, "--dsq-skip", "decoder.nothing", "--save-dir", folder / "other"), code=1)
    assert err.splitlines()[-1].startswith("fairseq-train: error: argument --dsq-skip: ")
    _, err = cli.run(
        "fairseq-eval-lm", folder / "data", "--user-dir", folder / "my_plugin", "--path",
        folder / "run/checkpoint_best.pt", "--gen-subset", "valid", "--model-overrides", "{'dsq_roundin': 'nearest'}",
        *BATCHES, code=1,
    )  # fmt: skip
    assert err.splitlines()[-1] == "fairseq-eval-lm: error: dsq_roundin: no such flag, expected dsq_rounding"
