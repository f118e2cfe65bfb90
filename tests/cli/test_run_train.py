"""A run's folder is for one run: a stand-in for fairseq-train and fairseq-generate, which say what they are told to."""

import json
import os
import subprocess
import sys
import time

import pytest
from report import samples

from fairseq_dsq import artefact
from fairseq_dsq.cli import main
from fairseq_dsq.recipes.fairseq_command import last_error
from fairseq_dsq.recipes.training import identity

PATIENCE = ("--dsq-patience", "1")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs ``fairseq-dsq run-train``; the stand-in counts its calls, and writes a checkpoint of what it was asked."""
    stand_in = tmp_path / "bin/fairseq-train"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--save-dir') + 1])\n"
        "print('called', *sys.argv[1:], flush=True)\n"
        "sys.exit(os.environ['SAYS']) if 'SAYS' in os.environ else None\n"
        "(folder / 'checkpoint_best.pt').write_text(' '.join(sys.argv))\n"
        "sys.exit('Killed') if 'STOPS' in os.environ else None\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:/usr/bin:/bin")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.bin").write_text("data")

    def run(*flags, code=0, folder="run"):
        assert main(["run-train", str(tmp_path / folder), "--", str(tmp_path / "data"), *flags]) == code
        return calls(tmp_path / folder)

    return run


def calls(folder):
    log = folder / "train.log"
    return log.read_text().count("called") if log.exists() else 0


def test_a_run_that_is_done_is_not_repeated_and_more_epochs_go_on(run):
    assert run(*PATIENCE, "--lr", "0.01", "--max-epoch", "2") == 1
    assert run("--lr", "1e-2", *PATIENCE, "--max-epoch", "2") == 1
    assert run(*PATIENCE, "--lr", "0.01", "--max-epoch", "3", "--log-interval", "5") == 2
    assert run(*PATIENCE, "--lr", "0.01", "--max-epoch", "3") == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--dsq-patience", "9"), "--dsq-patience 1, asked for 9"),
        ((*PATIENCE, "--lr", "1e-2"), "--lr nothing, asked for 0.01"),
        ((), "--dsq-patience 1, asked for nothing"),
    ],
)
def test_other_settings_are_refused_in_one_line(run, tmp_path, capsys, flags, expected):
    run(*PATIENCE)
    before = (tmp_path / "run/checkpoint_best.pt").read_text()
    assert run(*flags, code=2) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fairseq-dsq run-train: error: {tmp_path}/run: made with {expected}")
    assert (tmp_path / "run/checkpoint_best.pt").read_text() == before


def test_fewer_epochs_are_refused(run, capsys):
    run("--max-epoch", "3")
    run("--max-epoch", "2", code=2)
    assert "made with --max-epoch 3, asked for 2" in capsys.readouterr().err


def test_other_data_under_the_same_name_is_refused(run, tmp_path, capsys):
    run(*PATIENCE)
    (tmp_path / "data/train.bin").write_text("other")
    run(*PATIENCE, code=2)
    assert "made with DATA " in capsys.readouterr().err


def test_another_checkpoint_under_the_same_name_is_refused(run, tmp_path, capsys):
    (tmp_path / "model.pt").write_text("one")
    start = ("--finetune-from-model", str(tmp_path / "model.pt"))
    run(*start)
    (tmp_path / "model.pt").write_text("two")
    run(*start, code=2)
    assert "made with --finetune-from-model " in capsys.readouterr().err


def test_checkpoints_of_unknown_settings_are_refused(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint_last.pt").touch()
    assert run(*PATIENCE, code=2) == 0
    assert "run: does not say what made it" in capsys.readouterr().err


def test_a_stopped_run_goes_on_with_its_own_settings_alone(run, monkeypatch, capsys):
    monkeypatch.setenv("STOPS", "")
    assert run(*PATIENCE, code=1) == 1
    monkeypatch.delenv("STOPS")
    run("--dsq-patience", "2", code=2)
    assert run(*PATIENCE) == 2
    assert run(*PATIENCE) == 2


def test_the_last_failure_is_shown_not_an_earlier_one(run, monkeypatch, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("SAYS", "train.py: error: argument --lr: invalid float value: 'fast'")
    run("--lr", "fast", code=1)
    assert capsys.readouterr().err == "train.py: error: argument --lr: invalid float value: 'fast'\n"
    monkeypatch.setenv("SAYS", "out of luck")
    run("--lr", "1", code=1)
    assert "--lr" not in capsys.readouterr().err
    # Also where the log goes on.
    monkeypatch.delenv("SAYS")
    run("--lr", "1", "--max-epoch", "1")
    monkeypatch.setenv("SAYS", "ValueError: first")
    run("--lr", "1", "--max-epoch", "2", code=1)
    monkeypatch.setenv("SAYS", "stopped without a word")
    capsys.readouterr()
    run("--lr", "1", "--max-epoch", "2", code=1)
    assert capsys.readouterr().err == "fairseq-train ended with code 1\n"


def test_a_run_without_checkpoints_is_begun_anew_with_its_log_and_results(run, tmp_path, monkeypatch):
    run(*PATIENCE)
    (tmp_path / "run/score.json").write_text("{}")
    artefact.write(tmp_path / "run/score.json", {artefact.CHECKPOINT: "one"})
    (tmp_path / "run/checkpoint_best.pt").unlink()
    assert run("--dsq-patience", "3") == 1
    assert not (tmp_path / "run/score.json").exists()


def test_two_commands_in_one_folder(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with artefact.locked(tmp_path / "run"):
        assert run(*PATIENCE, code=2) == 0
    assert "run: another command is at work there" in capsys.readouterr().err
    assert run(*PATIENCE) == 1


def test_a_training_whose_parent_was_killed_keeps_its_folder(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    slow = "import time; time.sleep(30)"
    with artefact.locked(tmp_path / "run") as lock:
        child = subprocess.Popen([sys.executable, "-c", slow], pass_fds=[lock])
    run(*PATIENCE, code=2)
    child.kill()
    child.wait()
    run(*PATIENCE)


@pytest.mark.parametrize("flags", [("--save-dir", "x"), ("--save-dir=x",)])
def test_the_folder_is_named_once(run, capsys, flags):
    assert run(*flags, code=2) == 0
    assert f"{flags[0][:10]}: is " in capsys.readouterr().err


def test_a_folder_that_fairseq_would_split_is_refused(run, capsys):
    assert run(code=2, folder="a:b") == 0
    assert "RUN: got " in capsys.readouterr().err


def test_an_identity_is_of_values_not_of_their_spelling(tmp_path):
    one = identity(["data", "--lr", "1e-2", "--cpu", "--adam-betas", "(0.9, 0.98)", "--seed=12345678901"])
    other = identity(
        ["data", "--seed", "12345678901", "--lr", "5", "--adam-betas", "(0.9, 0.98)", "--cpu", "--lr", "0.01"]
    )
    assert one == other
    assert one == {
        "DATA": "data", "--lr": "0.01", "--cpu": "given", "--adam-betas": "(0.9, 0.98)", "--seed": "12345678901"
    }  # fmt: skip
    assert identity(["data", "--lr", "0.01", "-1"])["--lr"] == "0.01 -1"


def test_a_data_folder_is_known_by_its_content_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "14").mkdir()
    before = identity(["14", "--lr", "14"])
    (tmp_path / "14/train").write_text("a text")
    after = identity(["14", "--lr", "14"])
    assert before["DATA"] != after["DATA"] and before["--lr"] == after["--lr"] == "14"


def test_code_of_one_s_own_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import fairseq_dsq\n")
    flags = ["data", "--user-dir", "mine"]
    before = identity(flags)
    (tmp_path / "mine/__init__.pyc").write_bytes(b"compiled")
    assert identity(flags) == before
    (tmp_path / "mine/__init__.py").write_text("import fairseq_dsq, math\n")
    assert identity(flags) != before


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Traceback (most recent call last):\n  File x\n    error: 1\nKeyError: 'a'\nmore\n", "KeyError: 'a'"),
        (
            "Traceback (most recent call last):\n  a\nRuntimeError: Error(s)\n\nDuring handling ...\n\n"
            "Traceback (most recent call last):\n  b\nException: Cannot load model parameters\n",
            "Exception: Cannot load model parameters",
        ),
        ("usage: x\nfairseq-train: error: argument --lr\n", "fairseq-train: error: argument --lr"),
        ("no errors were found, or an error rate of 3\n", ""),
        ("", ""),
    ],
)
def test_the_error_is_what_the_last_traceback_ends_with(output, expected):
    assert last_error(output) == expected


@pytest.fixture
def trained(run, tmp_path):
    """A run, a reference of two lines and a stand-in for fairseq-generate that translates in another order."""
    run(*PATIENCE)
    generate = tmp_path / "bin/fairseq-generate"
    generate.write_text(f"#!{sys.executable}\nprint('D-1\\t-0.1\\tb\\nD-0\\t-0.2\\ta')\n")
    generate.chmod(0o755)
    (tmp_path / "test.en").write_text("a\nb\n")
    return tmp_path / "run"


def translate(folder, *flags, code=0):
    reference = folder.parent / "test.en"
    command = ["run-translate", str(folder), str(reference), "--", str(folder.parent / "data"), *flags]
    assert main(command) == code


def test_translations_are_kept_while_checkpoint_and_search_are_the_same(trained):
    translate(trained, "--beam", "2")
    assert (trained / "hypotheses.en").read_text() == "a\nb\n"
    made = (trained / "hypotheses.en").stat().st_mtime_ns
    translate(trained, "--beam", "2")
    assert (trained / "hypotheses.en").stat().st_mtime_ns == made
    translate(trained, "--beam", "3")
    assert (trained / "hypotheses.en").stat().st_mtime_ns > made


def test_another_checkpoint_is_translated_anew_even_if_it_is_older(trained):
    translate(trained)
    made = (trained / "hypotheses.en").stat().st_mtime_ns
    (trained / "checkpoint_best.pt").write_text("another")
    past = time.time() - 3600
    os.utime(trained / "checkpoint_best.pt", (past, past))
    translate(trained)
    assert (trained / "hypotheses.en").stat().st_mtime_ns > made


def test_a_translation_that_is_missing_is_an_error(trained, capsys):
    (trained.parent / "test.en").write_text("a\nb\nc\n")
    translate(trained, code=2)
    assert "generate.out: got 2 translations, expected the 3 of " in capsys.readouterr().err
    assert not (trained / "score.json").exists()


def test_the_report_leaves_out_the_score_of_another_checkpoint(trained, capsys):
    from fairseq_dsq.report.runs import read_run
    from fairseq_dsq.report.scores import scores, stale

    translate(trained)
    samples.write(trained.parent, trained.name, samples.record(samples.DSQ, [4.0]))
    assert scores(read_run(trained))["sacrebleu"] == json.loads((trained / "score.json").read_text())["score"]
    (trained / "checkpoint_best.pt").write_text("another")
    assert {path.name for path in stale(read_run(trained))} == {"score.json", "generate.out"}
    assert "sacrebleu" not in scores(read_run(trained))
    capsys.readouterr()
    assert main(["report", str(trained)]) == 0
    assert "score.json: scored another checkpoint than the run's checkpoint_best.pt" in capsys.readouterr().err
