"""A converted encoder fine-tuned, resumed, evaluated and refused by fairseq's own command lines."""

import json
import random
import sys

import pytest
import torch
from e2e.states import assert_equal_states, load, load_model
from fairseq import options
from fairseq_cli import preprocess
from fairseq_cli.train import cli_main
from plugin.encoders import masked_lm
from plugin.test_roberta_dsq import official_layout

import fairseq_dsq
from fairseq_dsq.cli import main
from fairseq_dsq.errors import line_of

hugging_face = pytest.importorskip("hugging_face", reason="needs transformers and safetensors")
RESET = ("--reset-optimizer", "--reset-dataloader", "--reset-meters")
TWO_LEVELS = ("--dsq-levels", "[8,8,8,16] [16,8,8,16]", "--dsq-patience", 1, "--dsq-min-delta", 100)
PAIRS, VALID = 160, 40


def binarize(text, dictionary, destination):
    arguments = ["--only-source", "--trainpref", f"{text}.train", "--validpref", f"{text}.valid"]
    arguments += ["--destdir", str(destination), *(["--srcdict", str(dictionary)] if dictionary else [])]
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """Pairs of sentences, alike or not, for a converted BERT: its folder with source, encoder and data."""
    folder = tmp_path_factory.mktemp("glue")
    hugging_face.bert(folder / "source")
    assert main(["convert-hf", str(folder / "source"), str(folder / "encoder")]) == 0
    draw = random.Random(1)
    words = hugging_face.wordpiece_vocabulary()[len(hugging_face.SPECIAL) :]
    for split, size in (("train", PAIRS), ("valid", VALID)):
        first = [draw.sample(words, draw.randint(2, 5)) for _ in range(size)]
        labels = [draw.random() < 0.5 for _ in range(size)]
        second = [a if label else draw.sample(words, len(a)) for a, label in zip(first, labels, strict=True)]
        for name, lines in (("input0", first), ("input1", second), ("label", [[f"class{int(x)}"] for x in labels])):
            text = "".join(" ".join(line) + "\n" for line in lines)
            (folder / f"{name}.{split}").write_text(text, encoding="utf-8")
    for name in ("input0", "input1", "label"):
        dictionary = folder / "encoder/dict.txt" if name != "label" else None
        binarize(folder / name, dictionary, folder / "data" / name)
    return folder


def train_command(folder, save_dir, *flags, restore="encoder/model.pt", arch=None):
    return (
        "fairseq-train", folder / "data", "--user-dir", fairseq_dsq.__path__[0],
        *(arch or (folder / "encoder/arch.args").read_text().split()),
        "--task", "sentence_prediction", "--criterion", "dsq_sentence_prediction", "--num-classes", 2,
        "--init-token", 0, "--optimizer", "adam", "--lr", 1e-3, "--batch-size", 16, "--seed", 3, "--cpu",
        "--num-workers", 0, "--required-batch-size-multiple", 1, "--log-format", "json", "--no-epoch-checkpoints",
        "--save-dir", save_dir, *(("--restore-file", folder / restore) if restore else ()), *flags,
    )  # fmt: skip


@pytest.fixture
def train_here(monkeypatch):
    """fairseq-train in this process, which saves the seconds that each command takes to start."""

    def train(command):
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        cli_main()

    return train


def test_half_and_a_resume_equal_all_in_one_go_and_the_result_is_evaluated(cli, train_here, glue, tmp_path):
    exact = (
        *(*TWO_LEVELS, "--update-epoch-batch-itr", "True"),
        *("--dsq-rounding", "stochastic", "--dsq-stash-scope", "all"),
    )
    log = "".join(cli.run(*train_command(glue, tmp_path / "whole", *exact, *RESET, "--max-epoch", 3)))
    train_here(train_command(glue, tmp_path / "halves", *exact, *RESET, "--max-epoch", 2))
    train_here(train_command(glue, tmp_path / "halves", *exact, "--max-epoch", 3, restore=None))
    whole, halves = (load_model(tmp_path / name) for name in ("whole", "halves"))
    assert_equal_states(whole, halves)
    # The second validation is no better by 100: the level rises.
    assert (whole["dsq.level"], whole["dsq.bad_validations"]) == (1, 1)
    start = load_model(glue / "encoder/model.pt")
    assert "classification_heads.pooler.dense.weight" in start
    assert {name for name in whole if "classification_heads" in name} == {
        f"classification_heads.sentence_classification_head.{layer}.{kind}"
        for layer in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }
    (trained,) = (json.loads(line[line.index("{") :]) for line in log.splitlines() if '"epoch": 3, "valid_' in line)
    assert float(trained["valid_dsq_level"]) == 1

    out, err = cli.run(
        "fairseq-validate", glue / "data", "--user-dir", fairseq_dsq.__path__[0], "--task", "sentence_prediction",
        "--criterion", "dsq_sentence_prediction", "--num-classes", 2, "--init-token", 0, "--batch-size", 16,
        "--required-batch-size-multiple", 1, "--path", tmp_path / "whole/checkpoint_last.pt", "--log-format", "json",
        "--num-workers", 0, "--cpu",
    )  # fmt: skip
    (line,) = (line for line in (out + err).splitlines() if '"valid_accuracy"' in line)
    evaluated = json.loads(line[line.index("{") :])
    assert float(evaluated["valid_dsq_level"]) == 1
    for name in ("valid_accuracy", "valid_loss"):
        assert float(evaluated[name]) == pytest.approx(float(trained[name]), rel=0.02), name


def test_the_official_layout_and_the_pooler_are_where_training_starts(train_here, glue, tmp_path):
    """A learning rate of zero leaves what was loaded as it is."""
    frozen = ("--lr", 0, "--max-epoch", 1)
    train_here(train_command(glue, tmp_path / "bert", *frozen, *RESET, "--head-from-pooler"))
    before, after = load_model(glue / "encoder/model.pt"), load_model(tmp_path / "bert/checkpoint_last.pt")
    for name, value in before.items():
        name = name.replace(".pooler.dense", ".sentence_classification_head.dense")
        if ".pooler." not in name:
            assert torch.equal(after[name], value), name

    size = len(before["encoder.sentence_encoder.embed_tokens.weight"])
    own = masked_lm(arch="roberta", words=size - 5)
    history = {"criterion_name": "MaskedLmLoss", "optimizer_name": "FairseqAdam", "num_updates": 7}
    state = load(glue / "encoder/model.pt")
    state["model"] = official_layout(own.state_dict())
    state["optimizer_history"] = [{**history, "lr_scheduler_state": {"best": 1.0}}]
    state["last_optimizer_state"] = {"state": {}, "param_groups": []}
    torch.save(state, tmp_path / "official.pt")
    arch = ("--arch", "roberta_dsq", "--encoder-layers", 2, "--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 48)
    arch += ("--encoder-attention-heads", 4, "--max-positions", 24)
    train_here(train_command(glue, tmp_path / "roberta", *frozen, *RESET, arch=arch, restore=tmp_path / "official.pt"))
    after = load_model(tmp_path / "roberta/checkpoint_last.pt")
    for name, value in own.state_dict().items():
        if not name.endswith("version"):
            assert torch.equal(after[name], value), name


OTHER_FLAGS = [
    (("--encoder-embed-dim", 64), "embed_tokens.weight is 82 x 32, expected 82 x 64 (--encoder-embed-dim 64)"),
    (("--token-types", 0), "embed_token_types.weight is 2 x 32, expected none (--token-types 0)"),
    (("--head-from-pooler", "--encoder-layers", 3), "layers.2.self_attn.k_proj.weight is none, expected 32 x 32"),
]


@pytest.mark.parametrize(("flags", "expected"), OTHER_FLAGS)
def test_a_checkpoint_of_other_flags_ends_in_one_line(train_here, glue, tmp_path, flags, expected):
    with pytest.raises(Exception, match="Cannot load model parameters") as stop:  # fairseq's own around any other
        train_here(train_command(glue, tmp_path / "run", *flags, *RESET))
    line = line_of(stop.value)
    assert "\n" not in line
    assert f"{glue / 'encoder/model.pt'}: " in line
    assert expected in line
    assert not list(tmp_path.glob("run/*.pt"))


def test_data_of_another_dictionary_ends_in_one_line(cli, glue, tmp_path):
    (tmp_path / "dict.txt").write_text((glue / "encoder/dict.txt").read_text() + "another 1\n", encoding="utf-8")
    for name in ("input0", "input1", "label"):
        binarize(glue / name, tmp_path / "dict.txt" if name != "label" else None, tmp_path / "data" / name)
    command = list(train_command(glue, tmp_path / "run", *RESET))
    command[1] = tmp_path / "data"
    _, err = cli.run(*command, code=1)
    assert err.splitlines()[-1].startswith(f"fairseq-train: error: {glue / 'encoder/model.pt'}: ")
    assert f"82 x 32, expected 83 x 32 (entries of the dictionary in {tmp_path / 'data'}" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.glob("run/*.pt"))
