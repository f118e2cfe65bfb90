"""The scripts of the parallel corpora on a small corpus: prepare, train, translate, score, the paper's table."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_dsq import data_files
from fairseq_dsq.cli import main
from fairseq_dsq.precision import PrecisionConfig
from fairseq_dsq.recipes import load_recipe
from fairseq_dsq.report.runs import read_run
from fairseq_dsq.translation.toy import write

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--encoder-layers", "1", "--decoder-layers", "1", "--encoder-embed-dim", "16", "--decoder-embed-dim", "16",
    "--encoder-ffn-embed-dim", "16", "--decoder-ffn-embed-dim", "16",
    "--encoder-attention-heads", "2", "--decoder-attention-heads", "2", "--max-tokens", "1000", "--cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The scripts and the package elsewhere, so that runs/ is there and not in this clone; $DSQ_DATA beside them."""
    folder = tmp_path_factory.mktemp("a clone")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "fairseq_dsq").symlink_to(ROOT / "fairseq_dsq")
    for name in ("multi30k", "iwslt17_de-en", "wmt14_en-de"):
        write(folder / "data" / name, train=200, valid=8, test=9)
    for language in ("de", "en"):
        (folder / "data/multi30k" / f"valid.{language}").rename(folder / "data/multi30k" / f"val.{language}")
        (folder / "data/multi30k" / f"test.{language}").rename(
            folder / "data/multi30k" / f"test_2016_flickr.{language}"
        )
    return folder


def run(clone, script, *arguments, code=0):
    environment = {
        **os.environ, "DSQ_ENV": sys.prefix, "DSQ_DATA": str(clone / "data"), "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",  # fairseq's own, where Python may not keep what it compiled
    }  # fmt: skip
    done = subprocess.run(
        [clone / "scripts" / script, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done


# Minutes of fairseq's commands, as below: scripts/readme.sh runs them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "test", "language"),
    [("multi30k.sh", "test_2016_flickr", "en"), ("wmt14.sh", "newstest2014", "de")],
)
def test_one_method(clone, script, test, language):
    arguments = ("--format", "bfp", "--levels", "[4,4,4,16]", "--vocab", "200")
    done = run(clone, script, *arguments, "--epochs", "1", "--", *TINY)
    assert re.search(rf"^{test} sacreBLEU: [\d.]+$", done.stdout, re.M)
    # Named by us, so that no option of fairseq takes the name for a list.
    folder = clone / "runs" / script.removesuffix(".sh") / "bfp-4-4-4-16-seed1"
    assert len((folder / f"hypotheses.{language}").read_text().splitlines()) == 9
    assert json.loads((folder / "score.json").read_text())["name"] == "BLEU"
    assert read_run(folder).flags["dsq_levels"] == "[4,4,4,16]"
    translated = (folder / f"hypotheses.{language}").stat().st_mtime_ns
    again = run(clone, script, *arguments, "--epochs", "1", "--", *TINY)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert (folder / f"hypotheses.{language}").stat().st_mtime_ns == translated
    # Another command line does not get this one's score.
    other = run(clone, script, *arguments, "--epochs", "1", "--patience", "9", "--", *TINY, "--lr", "1e-2", code=2)
    (line,) = other.stderr.splitlines()
    assert f"{folder}: made with --dsq-patience " in line and ", asked for 9; --lr " in line
    assert "BLEU" not in other.stdout


def test_another_corpus_is_not_taken_for_the_one_that_was_prepared(clone, monkeypatch):
    folder = clone / "data/multi30k"
    monkeypatch.setenv("DSQ_DATA", str(clone / "data"))
    assert main(["translation-prepare", "multi30k", str(clone / "runs/multi30k/data-200"), "--vocab", "200"]) == 0
    for language in ("de", "en"):
        (folder / f"val.{language}").write_text((folder / f"val.{language}").read_text() * 2)
    done = run(clone, "multi30k.sh", "--vocab", "200", "--epochs", "1", "--", *TINY, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"fairseq-dsq translation-prepare: error: {clone / 'runs/multi30k/data-200'}: made with val.de "
    )


@pytest.mark.slow
def test_the_table(clone):
    done = run(clone, "iwslt17.sh", "--methods", "stash-fixed dsq", "--vocab", "200", "--epochs", "1", "--", *TINY)
    lines = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    levels, held = (next(i for i, row in enumerate(lines) if row[1] == name) for name in ("Levels", "Held (MB)"))
    table, held_rows = lines[:levels], lines[held + 2 :]
    assert [row[2:4] for row in lines[levels + 2 : held]] == [["[2,2,2,16] 100.0 %", "never"]]
    assert len(held_rows) == 2 and all(float(cell) > 0 for row in held_rows for cell in row[2:-1])
    assert [(row[1], row[2]) for row in table[2:]] == [
        ("Stashing (Fixed)", "[16,4,4,16]"),
        ("DSQ (BFP)", "[2,2,2,16] [16,4,4,16]"),
    ]
    assert [row[-3:-1] for row in table[2:]] == [["0.13", "0.31"], ["0.032", "0.31"]]
    assert {path.name for path in (clone / "runs/iwslt17").iterdir()} == {"data-200", "stash-fixed-seed1", "dsq-seed1"}


def test_the_methods_are_the_rows_of_table_1():
    methods = load_recipe("iwslt17").rows()
    assert load_recipe("wmt14").rows() == methods
    found = [f"{method.format} {method.levels}" for method in methods.values()]
    published = data_files.read(data_files.find("published", "dsq")).rows
    rows = [f"{row.format} {PrecisionConfig(tuple(row.q), row.format)}" for row in published if "1, 6" in row.table]
    assert found[0] == "float32 " and found[-1] == "bfp [2,2,2,16] [16,4,4,16]"
    assert set(rows) | {"bfp [16,4,4,16]"} == set(found[1:-1])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--levels", "[2,2,2,16]"), "--levels: got '[2,2,2,16]' without --format"),
        (
            ("--format", "bfp", "--methods", "float32"),
            "--methods: got 'float32' beside --format, expected one of the two",
        ),
        (("--", "--user-dir", "mine"), "--user-dir: got 'mine', expected a folder of Python"),
        (("--", "--save-dir", "mine"), "--save-dir: is "),
        (("--epochs", "0"), "--epochs: got '0', expected an integer >= 1"),
        (("--vocab", "4e3"), "--vocab: got '4e3', expected an integer >= 1"),
        (("--seed", "-1"), "--seed: got '-1', expected an integer >= 0"),
        (("--seed",), "--seed: expected one argument (--help lists the flags)"),
        (("--sed", "1"), "unrecognized arguments: --sed 1 (--help lists the flags)"),
        (("stray",), "unrecognized arguments: stray"),
        (("--methods", "float32 bfp8"), "--methods: got 'bfp8', expected some of float32 fixed32"),
        (("--format", "int3", "--vocab", "200"), "int3"),
    ],
)
def test_bad_arguments_are_named(clone, monkeypatch, capsys, arguments, expected):
    monkeypatch.setenv("DSQ_DATA", str(clone / "data"))
    assert main(["run", "iwslt17", "--runs", str(clone / "runs"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert expected in "\n".join(lines)
    assert lines[-1].startswith("fairseq-dsq run: error: ")
    assert len(lines) == 1
