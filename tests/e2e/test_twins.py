"""The quantized twins of fairseq's language model and of BART: training, evaluation, resuming and the way back."""

import json
import re

import pytest
from e2e.states import assert_equal_states, load_model

import fairseq_dsq  # noqa: F401  (allow-lists what checkpoints hold)

# Minutes of fairseq's commands: scripts/readme.sh runs them.
pytestmark = pytest.mark.slow

BATCHES = ("--tokens-per-sample", 32, "--max-tokens", 256, "--required-batch-size-multiple", 1)
TRAINING = (
    "--optimizer", "adam", "--lr", 5e-3, "--max-epoch", 1, "--cpu", "--log-format", "json", "--no-epoch-checkpoints",
    "--update-epoch-batch-itr", "True",
)  # fmt: skip


def train(cli, save_dir, *flags, arch="transformer_lm_dsq"):
    return (
        "fairseq-train", cli.folder / "lm", "--user-dir", "fairseq_dsq", "--task", "language_modeling", "--arch", arch,
        "--criterion", "dsq_cross_entropy", "--decoder-layers", 1, "--decoder-embed-dim", 32, "--decoder-ffn-embed-dim",
        48, "--decoder-attention-heads", 2, "--decoder-input-dim", 32, "--decoder-output-dim", 32, *BATCHES,
        *TRAINING, "--save-dir", save_dir, *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def language_model(cli, lm_data):
    """A training of an epoch: (folder of the run, its log)."""
    folder = cli.folder / "language_model"
    out, err = cli.run(*train(cli, folder, "--dsq-levels", "[4,4,4,16]"))
    return folder, out + err


def logged(log, kind, name):
    lines = [json.loads(line[line.index("{") :]) for line in log.splitlines() if f"| {kind} |" in line]
    return float(lines[-1][name])


def evaluate(cli, path, *flags, batches=BATCHES):
    return ("fairseq-eval-lm", cli.folder / "lm", "--path", path, "--gen-subset", "valid", *batches, *flags)


def evaluated(cli, *command):
    out, err = cli.run(*command)
    return float(re.search(r"Loss \(base 2\): ([0-9.]+)", out + err)[1])


def generate(cli, path):
    return (
        "fairseq-generate", cli.folder / "lm", "--user-dir", "fairseq_dsq", "--task", "language_modeling", "--path",
        path, "--gen-subset", "valid", "--sample-break-mode", "eos", "--prefix-size", 2,
        "--batch-size", 4, "--beam", 2, "--max-len-b", 8, "--cpu",
    )  # fmt: skip


FLAGS_OF = """
import argparse, fairseq_dsq
from fairseq.models import MODEL_REGISTRY
FEWEST = {"llama": 11}  # this package's own, which has no more
def flags(name):
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    MODEL_REGISTRY[name].add_args(parser)
    return {action.dest for action in parser._actions}
for name in fairseq_dsq.models.TWINS:
    own, twin = flags(name), flags(name + "_dsq")
    more = {name for name in twin - own if not name.startswith("dsq_")}
    print(name, own < twin and len(own) > FEWEST.get(name, 20), *sorted(more))
"""


def test_a_twin_has_every_flag_of_its_model(cli):
    out, _ = cli.run("python", "-c", FLAGS_OF)
    assert out.splitlines() == [
        "transformer True", "transformer_lm True", "bart True", "llama True",
        "roberta True head_from_pooler layer_norm_eps token_types",
    ]  # fmt: skip


def test_a_language_model_trains_quantized_and_evaluates_to_its_validation_loss(cli, language_model):
    folder, log = language_model
    assert logged(log, "train", "train_dsq_arithmetic_relative") < 0.3
    loss = logged(log, "valid", "valid_loss")
    # fairseq-eval-lm scores the model as fairseq-validate does, in blocks of its own.
    assert evaluated(cli, *evaluate(cli, folder / "checkpoint_best.pt", "--user-dir", "fairseq_dsq")) == pytest.approx(
        loss, abs=0.0015
    )
    out, err = cli.run(
        "fairseq-validate", cli.folder / "lm", "--user-dir", "fairseq_dsq", "--task", "language_modeling", "--path",
        folder / "checkpoint_best.pt", "--valid-subset", "valid", *BATCHES, "--cpu", "--log-format", "json",
    )  # fmt: skip
    assert logged(out + err, "valid", "valid_loss") == pytest.approx(loss, abs=0.0015)


def test_a_language_model_resumes_to_the_same_bits_and_generates(cli, language_model):
    folder, _ = language_model
    flags = ("--dsq-levels", "[4,4,4,16]", "--max-epoch", 2)
    cli.run(*train(cli, folder / "whole", *flags))
    cli.run(*train(cli, folder / "resumed", *flags, "--restore-file", folder / "checkpoint_last.pt"))
    assert_equal_states(load_model(folder / "whole"), load_model(folder / "resumed"))
    out, _ = cli.run(*generate(cli, folder / "checkpoint_last.pt"))
    assert out.count("\nH-") >= 20


def test_plain_fairseq_reads_a_language_model_s_export(cli, language_model, tmp_path):
    folder, log = language_model
    cli.run("fairseq-dsq", "export-float", folder / "checkpoint_best.pt", tmp_path / "plain.pt")
    loss = evaluated(cli, *evaluate(cli, tmp_path / "plain.pt"))
    assert loss == pytest.approx(logged(log, "valid", "valid_loss"), abs=0.3)


def test_a_language_model_is_refused_in_one_line(cli, language_model, tmp_path):
    folder, _ = language_model
    path = folder / "checkpoint_last.pt"
    for command, line in (
        (train(cli, tmp_path, "--dsq-skip", "decoder.nothing"), "fairseq-train: error: argument --dsq-skip: "),
        (
            train(cli, tmp_path, "--decoder-layers", 2, "--restore-file", path),
            f"fairseq-train: error: {path}: decoder.layers.1.self_attn.k_proj.weight is none, expected 32 x 32",
        ),
    ):
        _, err = cli.run(*command, code=1)
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith(line)


def test_bart_trains_translates_and_is_exported(cli, tmp_path):
    cli.run(
        "fairseq-preprocess", "-s", "de", "-t", "en", "--trainpref", "text/train", "--validpref", "text/valid",
        "--testpref", "text/test", "--joined-dictionary", "--destdir", tmp_path / "data",
    )  # fmt: skip
    out, err = cli.run(
        "fairseq-train", tmp_path / "data", "--user-dir", "fairseq_dsq", "--arch", "bart_dsq_base", "--encoder-layers",
        1, "--decoder-layers", 1, "--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 48, "--encoder-attention-heads",
        2, "--decoder-attention-heads", 2, "--max-source-positions", 64, "--max-target-positions", 64, *TRAINING,
        "--criterion", "dsq_label_smoothed_cross_entropy", "--max-tokens", 600, "--dsq-levels", "[4,4,4,16]",
        "--save-dir", tmp_path,
    )  # fmt: skip
    assert logged(out + err, "train", "train_dsq_arithmetic_relative") < 0.3
    cli.run("fairseq-dsq", "export-float", tmp_path / "checkpoint_last.pt", tmp_path / "plain.pt")
    for name in ("checkpoint_last.pt", "plain.pt"):
        out, _ = cli.run(
            "fairseq-generate", tmp_path / "data", "--path", tmp_path / name, "--user-dir", "fairseq_dsq",
            "--batch-size", 8, "--beam", 2, "--max-len-b", 10, "--cpu",
        )  # fmt: skip
        assert out.count("\nH-") == 24
