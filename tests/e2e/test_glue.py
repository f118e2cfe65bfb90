"""scripts/glue.sh on toy tasks in GLUE's format: prepare, preprocess, fine-tune under DSQ, evaluate, report."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import run
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_dsq.cli import main
from fairseq_dsq.glue import find_task
from fairseq_dsq.glue.encoder import SPECIAL_TOKENS
from fairseq_dsq.glue.sentence_prediction import load

pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[2]
ARCH = (
    "--arch roberta_dsq --encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 48 "
    "--encoder-attention-heads 2 --max-positions 48"
)
FILLERS = ("the", "dog", "cat", "house", "sees", "likes", "old", "green")
EPOCHS = 8
LONG = 60
CLUES = {"entailment": "surely", "neutral": "perhaps", "contradiction": "never"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def make_encoder(folder):
    """An encoder folder with random weights and a WordPiece vocabulary of the toy's words."""
    folder.mkdir(exist_ok=True)
    words = [*FILLERS, *CLUES.values()]
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n")
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    (folder / "arch.args").write_text(ARCH + "\n")
    flags = ["data", "--task", "masked_lm", "--tokens-per-sample", "48", *ARCH.split()]
    config = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), flags))
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    dictionary.add_symbol("<mask>")
    torch.manual_seed(1)
    model = tasks.TASK_REGISTRY["masked_lm"](config.task, dictionary).build_model(config.model)
    state = {
        "cfg": config, "model": model.state_dict(), "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1}},
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
    }  # fmt: skip
    torch.save(state, folder / "model.pt")
    return folder


def write_toy(folder, task, files, rows, seed=1):
    """A task's files, in which the second sentence's one clue word decides the label, or score.

    The last pair of each file is longer than the model's positions.
    """
    rng = random.Random(seed)
    folder.mkdir()
    columns = [*task.sentences, task.label]
    for name, count in zip(files, rows, strict=True):
        lines = ["\t".join(["index", *columns])]
        for index in range(count):
            label = rng.choice(list(CLUES))
            second = [*rng.choices(FILLERS, k=4), CLUES[label]]
            rng.shuffle(second)
            value = {"neutral": "2.500", "entailment": "5.000", "contradiction": "0.000"}[label]
            if not task.is_regression:
                value = label if label in task.labels else task.labels[-1]
            first = rng.choices(FILLERS, k=LONG if index == count - 1 else 5)
            fields = [" ".join(first), " ".join(second), value]
            lines.append("\t".join([str(index), *fields]))
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def start_glue(clone, *arguments):
    """scripts/glue.sh of a clone in this environment, in a process group of its own."""
    return subprocess.Popen(
        [str(clone / "scripts/glue.sh"), *map(str, arguments)],
        env={**os.environ, "DSQ_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mnli(encoder, tmp_path_factory):
    """A run with both development sets that was killed and then finished, and what the script printed.

    The run's folder has the name that the script gives it, in a clone of its own.
    """
    folder = tmp_path_factory.mktemp("mnli")
    clone = folder / "a clone"
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    (clone / "fairseq_dsq").symlink_to(ROOT / "fairseq_dsq")
    (folder / "run").symlink_to(clone / f"runs/glue/MNLI/{encoder.name}-bfp-4-4-4-16_16-4-4-16-seed1")
    files = ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")
    write_toy(folder / "tsv", find_task("MNLI"), files, (320, 61, 30))
    arguments = (
        "MNLI", "--encoder", encoder, "--data", folder / "tsv", "--lr", 1e-2,
        "--epochs", EPOCHS, "--train-rows", 300, "--levels", "[4,4,4,16] [16,4,4,16]", "--patience", 1,
        "--min-delta", 100, "--", "--dropout", 0, "--attention-dropout", 0,
    )  # fmt: skip
    stopped = start_glue(clone, *arguments)
    while stopped.poll() is None and not (folder / "run/checkpoint_last.pt").exists():
        time.sleep(0.05)
    os.killpg(stopped.pid, signal.SIGKILL)
    assert stopped.wait() == -signal.SIGKILL, stopped.communicate()
    finished = start_glue(clone, *arguments)
    out, err = finished.communicate(timeout=300)
    assert finished.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    assert err == ""
    return folder, out


def last_epoch(folder):
    log = (folder / "run/train.log").read_text()
    return json.loads(log[log.rindex(f'{{"epoch": {EPOCHS}, "train_loss"') :].splitlines()[0])


def test_a_toy_task_is_learnt_under_dsq(mnli):
    folder, out = mnli
    result = json.loads((folder / "run/glue.json").read_text())
    assert result["rows"] == {"valid": 61, "valid1": 30}
    assert result["scores"]["accuracy"] > 80
    assert result["scores"]["accuracy_mismatched"] > 80
    assert f"accuracy {result['scores']['accuracy']:.2f}" in out
    assert float(last_epoch(folder)["train_dsq_level"]) == 1


def test_the_decay_ends_with_the_last_update(mnli):
    folder, _ = mnli
    last = last_epoch(folder)
    assert float(last["train_lr"]) == 0
    assert int(last["train_num_updates"]) == EPOCHS * 10  # 300 rows in batches of 32


def test_evaluation_runs_at_the_checkpoint_s_level(mnli):
    folder, _ = mnli
    result = json.loads((folder / "run/glue.json").read_text())
    best = torch.load(folder / "run/checkpoint_best.pt")["model"]
    assert result["level"] == best["dsq.level"] == 1
    assert result["precision"] == "[16,4,4,16]"
    model = load(folder / "run/checkpoint_best.pt", folder / "run/data/bin").model
    assert model.encoder.sentence_encoder.layers[0].fc1.context.config.precision.q == (16, 4, 4, 16)


def test_a_pair_is_one_separator_apart_in_wordpiece(mnli):
    folder, _ = mnli
    loaded = load(folder / "run/checkpoint_best.pt", folder / "run/data/bin")
    dataset = loaded.task.load_dataset("valid")
    tokens = {item["id"]: item["net_input.src_tokens"] for item in map(dataset.__getitem__, range(len(dataset)))}
    first, second = (folder / "tsv/dev_matched.tsv").read_text().splitlines()[1].split("\t")[1:3]
    symbols = [loaded.task.dictionary[index] for index in tokens[0].tolist()]
    assert " ".join(symbols) == f"<s> {first} </s> {second} </s>"


def test_the_report_finds_the_scores(mnli, capsys):
    folder, _ = mnli
    scores = json.loads((folder / "run/glue.json").read_text())["scores"]
    assert main(["report", str(folder / "run")]) == 0
    header, _, row = (line.split("|") for line in capsys.readouterr().out.splitlines()[:3])
    cells = {name.strip(): cell.strip() for name, cell in zip(header, row, strict=True)}
    assert float(cells["accuracy (GLUE dev, %)"]) == pytest.approx(scores["accuracy"], abs=0.06)
    assert float(cells["accuracy mismatched (GLUE dev, %)"]) == pytest.approx(scores["accuracy_mismatched"], abs=0.06)


def test_a_stopped_run_goes_on(mnli, encoder):
    folder, out = mnli
    assert out.startswith(f"found {(folder / 'run').resolve()}/data: MNLI (train 300, valid 61, valid1 30)")
    log = (folder / "run/train.log").read_text()
    assert re.findall(r"Loaded checkpoint (.+) \(epoch \d+ @ (\d+) updates", log) == [
        (str(encoder / "model.pt"), "0"), (str((folder / "run").resolve() / "checkpoint_last.pt"), "10"),
    ]  # fmt: skip


def test_a_regression_is_scored_by_its_correlations(encoder, tmp_path, capsys):
    write_toy(tmp_path / "tsv", find_task("STS-B"), ("train.tsv", "dev.tsv"), (300, 60))
    prepared = str(tmp_path / "prepared")
    source = ["--encoder", str(encoder), "--data", str(tmp_path / "tsv")]
    assert main(["glue-prepare", "STS-B", prepared, *source, "--group-by-length"]) == 0
    capsys.readouterr()
    recipe = (
        "--criterion", "dsq_sentence_prediction", "--shorten-method", "truncate", "--batch-size", "32", "--optimizer",
        "adam", "--lr", "1e-2", "--lr-scheduler", "polynomial_decay", "--max-epoch", "4", "--no-epoch-checkpoints",
        "--save-dir", str(tmp_path / "run"), "--dsq-levels", "[16,4,4,16]",
    )  # fmt: skip
    assert main(["glue-flags", "--encoder", str(encoder), prepared, "--", *recipe]) == 0
    flags = capsys.readouterr().out.splitlines()
    code, _, err = run(["fairseq-train", *flags, "--user-dir", str(ROOT / "fairseq_dsq")], tmp_path, os.environ)
    assert code == 0, err[-3000:]
    result = tmp_path / "glue.json"
    assert main(["glue-evaluate", prepared, str(tmp_path / "run/checkpoint_best.pt"), "--out", str(result)]) == 0
    scores = json.loads(result.read_text())["scores"]
    assert scores.keys() == {"pearson", "spearman"}
    assert min(scores.values()) > 60

    capsys.readouterr()
    state = torch.load(tmp_path / "run/checkpoint_best.pt", weights_only=True)
    state["cfg"]["model"].encoder_ffn_embed_dim += 16
    other = str(tmp_path / "other.pt")
    torch.save(state, other)
    assert main(["glue-evaluate", prepared, other]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"fairseq-dsq glue-evaluate: error: {other}: encoder.sentence_encoder.layers.0.fc1.")
    assert "--finetune-from-model" not in line and "--restore-file" not in line
    (tmp_path / "cut.pt").write_bytes((tmp_path / "run/checkpoint_best.pt").read_bytes()[:-100])
    assert main(["glue-evaluate", prepared, str(tmp_path / "cut.pt")]) == 2
    assert f"{tmp_path / 'cut.pt'}: is cut" in capsys.readouterr().err.splitlines()[-1]
