"""scripts/lm.sh on a small text: prepared, trained, evaluated; found again, gone on with, refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq.data import Dictionary

from fairseq_dsq.cli import main
from fairseq_dsq.lm import split
from fairseq_dsq.report.runs import read_run
from fairseq_dsq.translation.toy import write

# Minutes of fairseq's commands: scripts/readme.sh runs them.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--vocab", "120", "--layers", "1", "--dim", "16", "--ffn", "24", "--heads", "2", "--length", "32")
MORE = ("--", "--max-tokens", "256", "--warmup-updates", "8", "--lr")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The scripts and the package elsewhere, so that runs/ is there; a text beside them."""
    folder = tmp_path_factory.mktemp("a clone")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "fairseq_dsq").symlink_to(ROOT / "fairseq_dsq")
    write(folder / "toy", train=200, valid=8, test=9)
    shutil.copy(folder / "toy/train.en", folder / "toy.txt")
    return folder


def run(clone, *arguments, code=0):
    environment = {**os.environ, "DSQ_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [clone / "scripts/lm.sh", *arguments], env=environment, cwd=clone, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def train(clone, arch, epochs, lr="5e-3", code=0):
    own = ("--arch", arch, "--levels", "[4,4,4,16]", "--epochs", epochs)
    return run(clone, "toy.txt", *own, *TINY, *MORE, lr, code=code)


def perplexity(done):
    return float(re.search(r"^test perplexity \(of sentence pieces\): ([\d.]+)$", done.stdout, re.M)[1])


def test_a_llama_is_trained_on_a_text(clone):
    assert 2 < perplexity(train(clone, "llama_dsq", "1")) < 120


def test_a_text_is_prepared_trained_and_evaluated_once(clone):
    first = perplexity(train(clone, "transformer_lm_dsq", "1"))
    assert 2 < first < 120
    folder = clone / "runs/lm/toy/transformer_lm_dsq-bfp-4-4-4-16-seed1"
    score = folder / "perplexity.json"
    assert json.loads(score.read_text())["perplexity"] == first
    assert read_run(folder).flags["dsq_levels"] == "[4,4,4,16]"
    evaluated = score.stat().st_mtime_ns
    assert perplexity(train(clone, "transformer_lm_dsq", "1")) == first
    assert score.stat().st_mtime_ns == evaluated
    # It goes on, and is evaluated anew.
    assert perplexity(train(clone, "transformer_lm_dsq", "2")) < first
    assert (folder / "train.log").read_text().count("loading train data for epoch 1") == 1
    (line,) = train(clone, "transformer_lm_dsq", "2", lr="1e-2", code=2).stderr.splitlines()
    assert f"{folder}: made with --lr 0.005, asked for 0.01" in line


def test_every_line_is_in_one_split_and_every_piece_is_known(clone, tmp_path):
    assert (
        main(["lm-prepare", str(clone / "toy.txt"), str(tmp_path / "data"), "--vocab", "120", "--held-out", "0.1"]) == 0
    )
    splits = {name: (tmp_path / f"data/raw.{name}").read_text().splitlines() for name in ("train", "valid", "test")}
    assert {name: len(found) for name, found in splits.items()} == {"train": 160, "valid": 20, "test": 20}
    text = (clone / "toy.txt").read_text().splitlines()
    assert sorted(line for found in splits.values() for line in found) == sorted(text)
    numbers = [text.index(line) for line in splits["train"] if text.count(line) == 1]
    assert numbers == sorted(numbers) and len(numbers) > 20
    words = Dictionary.load(str(tmp_path / "data/bin/dict.txt"))
    pieces = (tmp_path / "data/train").read_text().split()
    assert {words.index(piece) for piece in pieces}.isdisjoint({words.unk()})


def test_lines_longer_than_sentencepiece_s_limit_are_learnt_from(tmp_path):
    (tmp_path / "text").write_text("".join(f"{'ab cd ' * 1000}{number}\n" for number in range(10)))
    assert main(["lm-prepare", str(tmp_path / "text"), str(tmp_path / "data"), "--vocab", "20"]) == 0
    assert "ab" in (tmp_path / "data/dict.txt").read_text()


def test_a_split_is_drawn_and_stays():
    found = split(1000, 0.05)
    assert (found.count("valid"), found.count("test")) == (50, 50)
    assert found == split(1000, 0.05) and found[:50] != ["valid"] * 50
    assert sorted(split(3, 0.01)) == ["test", "train", "valid"]


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (None, (), "TEXT: got 'own.txt', expected a text file"),
        (b"a\n\n \nb\n", (), "own.txt: got 2 lines that are not empty, expected more than 2, for valid and test"),
        (b"a\n\xff\nb\n", (), "own.txt: not UTF-8"),
        (b"a b\nc d\ne f\n", ("--vocab", "9999"), "--vocab: got 9999: "),
        (b"a b\nc d\ne f\n", ("--held-out", "0.5"), "--held-out: got 0.5, expected a share above 0 and below 0.5"),
        (b"a b\nc d\ne f\n", ("--held-out", "nan"), "--held-out: got nan, expected a share"),
    ],
)
def test_bad_input_is_named_in_one_line(tmp_path, monkeypatch, capfd, text, arguments, expected):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("own.txt").write_bytes(text)
    assert main(["run", "lm", "own.txt", *arguments]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("fairseq-dsq lm-prepare: error: ") and expected in line
    assert not list(Path().glob("runs/lm/own/data*"))


def test_another_text_of_the_same_name_is_refused(clone, tmp_path, capsys):
    (tmp_path / "toy.txt").write_text((clone / "toy.txt").read_text() * 2)
    for path, code in ((clone, 0), (tmp_path, 2)):
        assert main(["lm-prepare", str(path / "toy.txt"), str(tmp_path / "data"), "--vocab", "120"]) == code
    assert f"{tmp_path / 'data'}: made with text " in capsys.readouterr().err
