"""Recipes: which commands they stand for, and what of them is refused."""

import io
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fairseq_dsq
from fairseq_dsq import cli
from fairseq_dsq.cli import main, run
from fairseq_dsq.recipes import fairseq_command, load_recipe, training
from fairseq_dsq.recipes.run import slug

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RECIPE_SCRIPTS = ("glue", "iwslt14", "iwslt17", "lm", "multi30k", "wmt14")  # whose --help is the recipe's


def commands(capsys, *arguments):
    assert main(["run", *arguments]) == 0
    return [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path, capsys):
    given = ("multi30k", "--runs", str(tmp_path), "--levels", "[4,4,4,16] [16,4,4,16]", "--dim", "64", "--dry-run")
    found = commands(capsys, *given, "--", "--lr", "1e-3")
    assert [command[0] for command in found] == ["translation-prepare", "run-train", "epochs", "run-translate"]
    assert found[1][1] == str(tmp_path / "multi30k/bfp-4-4-4-16_16-4-4-16-seed1")
    flags = found[1][3:]
    assert flags[flags.index("--encoder-embed-dim") + 1] == "64" and flags[-2:] == ["--lr", "1e-3"]
    assert not list(tmp_path.iterdir())


def test_a_table_has_a_run_a_method_and_then_the_report(tmp_path, capsys):
    found = commands(capsys, "wmt14", "--methods", "float32 dsq", "--out", str(tmp_path), "--seed", "3", "--dry-run")
    runs = [str(tmp_path / "float32-seed3"), str(tmp_path / "dsq-seed3")]
    assert [command[1] for command in found if command[0] == "run-train"] == runs
    assert found[-1] == ["report", *runs]


def test_a_table_of_language_models_has_one_too(tmp_path, capsys):
    given = ("a/text.txt", "--methods", "w8a8 direct-eco", "--runs", str(tmp_path), "--dry-run")
    found = commands(capsys, "neighbours-lm", *given)
    assert [command[0] for command in found] == ["lm-prepare", *["run-train", "epochs", "run-eval-lm"] * 2, "report"]
    home = tmp_path / "neighbours-lm/text"
    runs = [str(home / f"transformer_lm_dsq-{name}-seed1") for name in ("w8a8", "direct-eco")]
    assert found[-1] == ["report", *runs] and found[1][1] == runs[0]
    assert found[4][-2:] == ["--dsq-residual", "moment1"]


def test_glue_is_prepared_fine_tuned_and_scored(tmp_path, capsys):
    given = ("RTE", "--encoder", "an/encoder", "--group-by-length", "--runs", str(tmp_path), "--dry-run")
    found = commands(capsys, "glue", *given)
    names = ["glue-prepare", "glue-flags", "run-train", "epochs", "glue-evaluate"]
    assert [command[0] for command in found] == names
    assert found[0][:3] == ["glue-prepare", "RTE", str(tmp_path / "glue/RTE/encoder-bfp-default-seed1/data")]
    assert found[0][-3:] == ["--train-rows", "0", "--group-by-length"]


def test_a_language_model_is_prepared_trained_and_evaluated_as_it_was_trained(tmp_path, capsys):
    given = ("a/text.v2.txt", "--length", "64", "--held-out", "0.1", "--runs", str(tmp_path), "--dry-run")
    for arch, own in (("transformer_lm_dsq", "--decoder-learned-pos"), ("llama_dsq", "{dim}"), ("other", "{dim}")):
        prepare, train, epochs, evaluate = commands(capsys, "lm", *given, "--arch", arch, "--", "--lr", "1")
        home = tmp_path / "lm/text.v2"
        assert prepare == [
            "lm-prepare",
            "a/text.v2.txt",
            str(home / "data-4000"),
            "--vocab",
            "4000",
            "--held-out",
            "0.1",
        ]
        assert train[:2] == ["run-train", str(home / f"{arch}-bfp-default-seed1")] and train[-2:] == ["--lr", "1"]
        assert (own in train) == (own != "{dim}") and ("--decoder-layers" in train) == (arch != "other")
        assert epochs == ["epochs", train[1]] and evaluate[:2] == ["run-eval-lm", train[1]]
        for command in (train, evaluate):
            assert command[command.index("--tokens-per-sample") + 1] == "64"
    assert main(["run", "lm", *given, "--", "--tokens-per-sample", "32"]) == 2
    assert "--tokens-per-sample: got it after --, expected --length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: speech\n", "kind: got 'speech', expected one of translation, glue, language_model"),
        ("kind: translation\nabout: a\ntrain: b\nepochs: 1\n", "corpus: missing"),
        ("kind: glue\nabout: a\ntrain: b\nepochs: soon\n", "epochs"),
        (
            "kind: translation\nabout: a\ntrain: b\nepochs: 1\ncorpus: latin\n",
            "got 'latin', expected iwslt14, iwslt17, multi30k",
        ),
        ("kind: translation\nabout: a\ntrain: b\nepochs: 1\ncorpus: {source: la}\n", "target"),
        ("kind: translation\nabout: a\ntrain: --x {size}\nepochs: 1\ncorpus: wmt14\n", "{size}"),
        ("kind: language_model\nabout: a\ntrain: b\nepochs: 1\nevaluate: '--x {size}'\n", "evaluate: got {size}"),
        ("kind: language_model\nabout: a\ntrain: b\nepochs: 1\narchitectures: {gpt: '{size}'}\n", "gpt: got {size}"),
        ("kind: translation\nabout: a\ntrain: --x 'y\nepochs: 1\ncorpus: wmt14\n", "train: No closing quotation"),
    ],
)
def test_a_recipe_that_is_none_is_refused_in_one_line(tmp_path, capsys, text, expected):
    (tmp_path / "own.yaml").write_text(text)
    assert main(["run", str(tmp_path / "own.yaml"), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fairseq-dsq run: error: ") and expected in line


def test_a_folder_of_code_goes_to_every_command_that_meets_a_model(tmp_path, capsys):
    own = ("--dry-run", "--runs", str(tmp_path), "--", "--user-dir", fairseq_dsq.__path__[0])
    no_model = {"translation-prepare", "lm-prepare", "glue-prepare", "epochs"}
    for recipe, others in (("iwslt17", "run-translate report"), ("lm", "run-eval-lm"), ("glue", "glue-evaluate")):
        words = {"lm": ("text.txt",), "glue": ("RTE",)}.get(recipe, ("--methods", "float32"))
        told = [command for command in commands(capsys, recipe, *words, *own) if command[0] not in no_model]
        assert {*others.split(), "run-train"} <= {command[0] for command in told}
        for command in told:  # run-train of GLUE has what glue-flags prints
            assert own[-2:] == tuple(command[-2:]) or command[-1] == "[glue-flags]"


def test_what_a_recipe_leaves_open_of_the_schedule_is_the_flags_affair(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("kind: translation\nabout: a\ntrain: b\nepochs: 1\ncorpus: wmt14\n")
    given = (str(tmp_path / "own.yaml"), "--dry-run", "--runs", str(tmp_path))
    train = commands(capsys, *given)[1]
    assert not any(word.startswith(("--dsq-patience", "--dsq-min-delta", "--dsq-levels")) for word in train)
    train = commands(capsys, *given, "--patience", "3", "--min-delta", "0.1")[1]
    assert [train[train.index(name) + 1] for name in ("--dsq-patience", "--dsq-min-delta")] == ["3", "0.1"]


def test_no_such_recipe(capsys):
    assert main(["run", "latin"]) == 2
    expected = (
        "expected formats, glue, iwslt14, iwslt17, lm, multi30k, neighbours-lm, neighbours-mt, study-iwslt14, "
        "study-multi30k, wmt14"
    )
    assert f"RECIPE: got 'latin', {expected} or the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--levels", "[2]"), "--levels: level 0: got '[2]', expected four integers"),
        (("--levels", "[4,4,4,16] [2,4,4,16]"), "--levels: level 1 [2,4,4,16]: q0 falls from 4 to 2"),
        (("--levels", "[2,2,2,40]"), "--levels: level 0: q3: got 40, expected 2 to 32"),
        (("--format", "nope"), "--format: got 'nope', expected one of bfp, fixed, float32"),
        (
            ("--format", "mxfp4"),
            "--levels: level 0: q3 = 16: bits: got 16, expected 4 for mxfp4, or name formats: [mxfp4,",
        ),
        (("--min-delta", "-1"), "--min-delta: got '-1', expected a finite number >= 0"),
        (("--", "--dsq-level", "[2,2,2,16]"), "--dsq-level: no such flag, expected --dsq-levels"),
        (("--", "--dsq-rotate"), "argument --dsq-rotate: expected one argument"),
        (("--", "--dsq-schedule", "updates"), "argument --dsq-raise-at: got '', expected 1 point for the 2 levels"),
    ],
)
def test_a_precision_that_training_would_refuse_is_refused_before_anything_is_fetched(
    tmp_path, capsys, arguments, said
):
    assert main(["run", "multi30k", "--runs", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fairseq-dsq run: error: ") and said in line
    assert not list(tmp_path.iterdir())


def test_what_follows_the_dashes_decides_what_levels_may_be(tmp_path, capsys):
    given = ("--runs", str(tmp_path), "--format", "mxfp4", "--levels", "[3,3,3,mxfp8e5m2]", "--dry-run")
    assert "3-3-3" in commands(capsys, "multi30k", *given, "--", "--dsq-sign-bit", "extra")[1][1]
    assert main(["run", "multi30k", *given]) == 2
    assert commands(capsys, "glue", "RTE", "--runs", str(tmp_path), "--dry-run", "--", "--dsq-schedule", "cyclic")


def test_flags_of_fairseq_may_follow_the_recipe_s_name_at_once(capsys):
    with pytest.raises(SystemExit, match="argument --dsq-rounding: got 'up', expected one of nearest, stochastic"):
        main(["run", "multi30k", "--", "--dsq-rounding", "up"])


def test_a_slug_has_nothing_that_an_option_of_fairseq_takes_for_a_list():
    assert slug("bfp-[2,2,2,16] [16,4,4,16]-seed1") == "bfp-2-2-2-16_16-4-4-16-seed1"


@pytest.mark.parametrize(
    "name", sorted({path.stem for path in SCRIPTS.glob("*.sh")} - {"env", "table", *RECIPE_SCRIPTS})
)
def test_a_script_says_what_it_does_before_anything_is_installed(name, tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    (tmp_path / "setup.py").touch()
    environment = {key: value for key, value in os.environ.items() if key not in ("DSQ_ENV", "DSQ_DATA", "WHEELS")}
    environment["PYTHON"] = sys.executable
    script = tmp_path / "scripts" / f"{name}.sh"
    done = subprocess.run([script, "--help"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    first = script.read_text().splitlines()[1].removeprefix("# ")
    assert first in done.stdout or f"usage: {name}.sh" in done.stdout
    assert "set -euo" not in done.stdout and not (tmp_path / ".venv").exists()


def sourced(folder, command, **environment):
    """What a line of bash says after env.sh, in a copy of what that reads."""
    if not (folder / "scripts").exists():
        shutil.copytree(SCRIPTS, folder / "scripts")
        (folder / "fairseq_dsq/kernels/native").mkdir(parents=True)
        for name in ("setup.py", "fairseq_dsq/kernels/native/a.cpp", "fairseq_dsq/kernels/native/a.h"):
            (folder / name).touch()
    environment = {**{key: value for key, value in os.environ.items() if key != "DSQ_ENV"}, **environment}
    line = f"set -euo pipefail; . scripts/env.sh; {command}"
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)


def test_an_environment_or_an_interpreter_that_is_named_is_the_one_used(tmp_path):
    probe = tmp_path / "my env/bin/probe"
    probe.parent.mkdir(parents=True)
    probe.touch(0o755)
    done = sourced(tmp_path, "use_env dev; cd /; type -P probe", DSQ_ENV="my env")
    assert done.stdout == f"{probe}\n", done.stderr
    done = sourced(tmp_path, "use_env dev", DSQ_ENV="none")
    assert (done.returncode, done.stderr) == (
        1, "bash: error: DSQ_ENV: got none, expected the folder of an environment, with bin/\n"
    )  # fmt: skip
    (tmp_path / "my env/bin/py thon").symlink_to(sys.executable)
    done = sourced(tmp_path, "find_python", PYTHON="my env/bin/py thon")
    assert done.stdout == "my env/bin/py thon\n"
    done = sourced(tmp_path, "python=$(find_python)", PYTHON="/no/python")
    assert done.returncode == 1 and "PYTHON: got /no/python, and no Python 3.11 or 3.12 by it" in done.stderr


def test_the_package_is_installed_again_where_its_kernels_changed(tmp_path):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$@" >> calls\n')
    python.chmod(0o755)
    (tmp_path / ".venv/bin/activate").touch()
    counts = []
    for changed in ("", "", "setup.py", "fairseq_dsq/kernels/native/a.h", "fairseq_dsq/kernels/native/a.cpp", ""):
        if changed:
            with open(tmp_path / changed, "a") as file:
                file.write("more\n")
        done = sourced(tmp_path, 'use_env ""')
        assert done.returncode == 0, done.stderr
        counts.append((tmp_path / "calls").read_text().count(f"-e {tmp_path}"))
    assert counts == [1, 1, 2, 3, 4, 4]


def command_that_says(folder, body):
    """An environment whose fairseq-dsq is a line of bash; a script that is run in it."""
    command = folder / "bin/fairseq-dsq"
    command.parent.mkdir()
    command.write_text(f"#!/bin/bash\n{body}\n")
    command.chmod(0o755)

    def script(name, *arguments, data=folder, **more):
        environment = {**os.environ, "DSQ_ENV": str(folder), "DSQ_DATA": str(data), **more}
        return subprocess.run([SCRIPTS / name, *arguments], env=environment, capture_output=True, text=True)

    return script


@pytest.mark.parametrize(
    ("name", "recipes", "twice"),
    [("neighbours.sh", ("neighbours-lm", "neighbours-mt"), 5), ("formats.sh", ("formats",), 0)],
)
def test_a_table_s_script_trains_every_row_and_some_with_a_second_seed(tmp_path, capsys, name, recipes, twice):
    corpora(tmp_path)
    done = command_that_says(tmp_path, "echo ${*@Q}")(name, "--dry-run")
    assert done.returncode == 0, done.stderr
    called = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(command == "run" and arguments[-1] == "--dry-run" for command, *arguments in called)
    found = itertools.chain(*(commands(capsys, *arguments) for _, *arguments in called))
    trained = [command[1] for command in found if command[0] == "run-train"]
    rows = load_recipe(recipes[0]).rows()
    assert len(set(trained)) == len(trained) == len(recipes) * (len(rows) + twice)
    assert {row for row in rows for run in trained if run.endswith(f"{row}-seed1")} == set(rows)


def corpora(folder):
    for name in ("multi30k", "iwslt14_de-en", "wmt"):
        (folder / name).mkdir()


def test_a_table_s_script_refuses_what_it_does_not_know(tmp_path):
    corpora(tmp_path)
    script = command_that_says(tmp_path, "echo not reached")
    for arguments, data, said in (
        (("--fast",), tmp_path, "got '--fast', expected --status, --dry-run or nothing"),
        (("--dry-run",), tmp_path / "none", f"DSQ_DATA: got '{tmp_path}/none', expected the folder"),
    ):
        done = script("neighbours.sh", *arguments, data=data)
        assert done.returncode and said in done.stderr and done.stderr.count("\n") == 1


def test_rows_of_several_tables_are_trained_once_each_with_every_seed_of_theirs(tmp_path, capsys):
    found = commands(capsys, "study-multi30k", "--runs", str(tmp_path), "--dry-run")
    trained = [Path(command[1]).name for command in found if command[0] == "run-train"]
    recipe = load_recipe("study-multi30k")
    table1 = [f"{name}-seed{seed}" for seed in (1, 2, 3) for name in recipe.tables()["table1"]]
    assert trained[:24] == table1 and len(trained) == len(set(trained)) == 24 + len(recipe.rows()) - 8
    assert {name.rpartition("-seed")[2] for name in trained[24:]} == {"1"}
    assert [Path(path).name for path in found[-1][1:50]] == trained
    assert found[-1][50:] == ["--profile", "paper", "--profile", "operands"]
    # Asked for by table, by name, with other seeds.
    for asked, seeds, expected in (
        ("table5", (), ["fixed-8-8-8-32-seed1", "fixed-8-8-8-16-seed1", "fixed-8-8-8-8-seed1"]),
        ("dsq patience-5", (), ["dsq-seed1", "dsq-seed2", "dsq-seed3", "patience-5-seed1"]),
        ("dsq", ("--seed", "7 9"), ["dsq-seed7", "dsq-seed9"]),
    ):
        given = ("--methods", asked, *seeds, "--runs", str(tmp_path), "--dry-run")
        found = commands(capsys, "study-multi30k", *given)
        assert [Path(command[1]).name for command in found if command[0] == "run-train"] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("multi30k", "--seed", "1 2"), "--seed: got '1 2', expected an integer >= 0"),
        (("wmt14", "--seed", "1 x"), "--seed: got '1 x', expected an integer >= 0, or several"),
        (("wmt14", "--jobs", "0"), "--jobs: got '0', expected an integer >= 1"),
        (("study-multi30k", "--methods", "table9"), "or of the tables table1 table4 table5 ablations"),
        (("study-multi30k", "--methods", " "), "--methods: got none, expected some of float32 fixed32"),
        (("study-multi30k", "--", "--seed", "7"), "--seed: is run's --seed, expected none"),
        (("multi30k", "--", "--max-epoch=7"), "--max-epoch: is run's --epochs, expected none"),
        (("study-multi30k", "--", "--dsq-levels", "[4,4,4,16]"), "--dsq-levels: is each row's own, expected none"),
        (("wmt14", "--", "--dsq-min-delta", "1"), "--dsq-min-delta: is each row's own, expected none"),
        (("multi30k", "--", "--dsq-levels=[4,4,4,16]"), "--dsq-levels: is run's --levels, expected none"),
        (("wmt14", "--format", "bfp", "--", "--dsq-patience", "1"), "--dsq-patience: is run's --patience, expected"),
        (("lm", "x.txt", "--", "--arch", "llama_dsq"), "--arch: is run's --arch, expected none"),
        (("glue", "RTE", "--", "--lr", "1"), "--lr: is run's --lr, expected none"),
    ],
)
def test_seeds_jobs_and_tables_are_checked(capsys, arguments, said):
    recipe, *flags = arguments
    assert main(["run", recipe, "--dry-run", *flags]) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_ends_a_table_not_a_row(tmp_path, monkeypatch):
    trained = []

    def interrupted(arguments):
        if arguments[0] == "run-train":
            trained.append(arguments[1])
            return cli.INTERRUPTED
        return 0

    monkeypatch.setattr(cli, "main", interrupted)
    assert main(["run", "study-multi30k", "--methods", "float32 dsq", "--seed", "1", "--runs", str(tmp_path)]) == 130
    assert len(trained) == 1


def test_a_closed_output_ends_what_works_with_an_error_and_what_prints_without(tmp_path, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            if text:
                raise BrokenPipeError
            return 0

    monkeypatch.setattr("fairseq_dsq.cli.translation_prepare.main", lambda args: print("prepared") or 0)
    for flags, code in (((), 2), (("--dry-run",), 0)):
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["run", "study-multi30k", "--methods", "float32", "--runs", str(tmp_path), *flags]) == code
        said = "fairseq-dsq run: error: standard output was closed, and no more was done\n"
        assert capsys.readouterr().err == said * (code == 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: table1\nseeds: {table4: 1 2}\n", "seeds: got table4, expected some of the methods: table1"),
        ("methods: table1\nseeds: {table1: one}\n", "seeds: table1: got 'one', expected integers >= 0 such as '1 2 3'"),
        ("methods: table1 {path}\n", "dsq: got Method(format='fixed'"),
        ("methods: table1\nprofiles: papre\n", "RECIPE: profiles: got 'papre', expected operands, paper or the path"),
    ],
)
def test_seeds_of_no_table_and_a_name_for_two_methods_are_refused(tmp_path, capsys, text, said):
    (tmp_path / "rows.yaml").write_text("dsq: {format: fixed}\n")
    recipe = "kind: translation\nabout: a\ntrain: b\nepochs: 1\ncorpus: wmt14\n" + text
    (tmp_path / "own.yaml").write_text(recipe.replace("{path}", str(tmp_path / "rows.yaml")))
    assert main(["run", str(tmp_path / "own.yaml"), "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_the_study_runs_table_1_first_and_all_of_it_and_says_how_far_it_is(tmp_path):
    # It fails once.
    script = command_that_says(
        tmp_path, 'echo "$1 $2 | ${*:5}"\n[ "$2 $6" != "study-iwslt14 table1" ] || exit "${CODE:-3}"'
    )
    for name in ("multi30k", "iwslt14_de-en"):
        (tmp_path / name).mkdir()

    everything = "table1 table4 table5 ablations"
    done = script("study.sh", "--", "--lr", "1", JOBS="3")
    assert done.stdout.splitlines() == [
        "run study-multi30k | --methods table1 --jobs 3 -- --lr 1",
        "run study-iwslt14 | --methods table1 --jobs 3 -- --lr 1",
        f"run study-multi30k | --methods {everything} --jobs 3 -- --lr 1",
    ]
    assert done.returncode == 3
    killed = script("study.sh", CODE="143")
    assert killed.returncode == 143 and killed.stdout.count("\n") == 2
    for mode in ("--status", "--dry-run"):
        assert script("study.sh", mode).stdout.splitlines() == [
            f"run study-multi30k | --methods {everything} --jobs 2 {mode}",
            f"run study-iwslt14 | --methods table1 --jobs 2 {mode}",
        ]
    for arguments, data, said in (
        (("--fast",), tmp_path, "got '--fast', expected --status, --dry-run or nothing"),
        (("--status", "x"), tmp_path, "got 'x', expected -- FLAGS"),
        ((), tmp_path / "none", f"DSQ_DATA: got '{tmp_path}/none', expected the folder that multi30k lies in"),
    ):
        done = script("study.sh", *arguments, data=data)
        assert done.returncode and said in done.stderr and done.stderr.count("\n") == 1


def test_the_size_of_the_study_and_how_far_it_is(tmp_path, capsys):
    assert main(["run", "study-multi30k", "--runs", str(tmp_path), "--status"]) == 0
    assert main(["run", "study-iwslt14", "--runs", str(tmp_path), "--status"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "study-multi30k: 0 of 49 runs done, 0 running, 49 left",
        "study-iwslt14: 0 of 8 runs done, 0 running, 8 left",
    ]


def flag(command, name):
    return command[command.index(name) + 1]


def test_gpus_and_nodes_share_the_batches_of_an_update(tmp_path, capsys):
    given = ("wmt14", "--methods", "dsq", "--runs", str(tmp_path), "--dry-run")
    one = commands(capsys, *given)
    assert flag(one[1], "--update-freq") == "8" and "--distributed-world-size" not in one[1]
    four = commands(capsys, *given, "--gpus", "4")
    assert (flag(four[1], "--update-freq"), flag(four[1], "--distributed-world-size")) == ("2", "4")
    two_nodes = ("--gpus", "4", "--nodes", "2", "--master", "first:29500")
    for node in ("0", "1"):
        found = commands(capsys, *given, *two_nodes, "--node-rank", node)
        train = found[1]
        assert flag(train, "--update-freq") == "1" and flag(train, "--distributed-world-size") == "8"
        assert flag(train, "--distributed-init-method") == "tcp://first:29500"
        assert flag(train, "--distributed-rank") == str(4 * int(node))
        # The first node answers for the run; the others only train in it.
        names = [command[0] for command in found]
        if node == "0":
            assert names == ["translation-prepare", "run-train", "epochs", "run-translate", "report"]
        else:
            assert names == ["translation-prepare", "run-train"] and train[1:3] == ["--node", "1"]
    mine = commands(capsys, *given, "--gpus", "3", "--", "--update-freq", "2")
    assert [word for word in mine[1] if word == "--update-freq"] == ["--update-freq"]


@pytest.mark.parametrize(
    ("recipe", "gpus", "nodes", "each", "tokens"),
    [("iwslt17", 8, 1, 1, 512), ("iwslt14", 3, 1, 1, 1365), ("wmt14", 8, 2, 1, 1792), ("wmt14", 3, 1, 3, 3185)],
)
def test_gpus_that_do_not_divide_an_update_have_smaller_batches(capsys, recipe, gpus, nodes, each, tokens):
    given = (recipe, "--methods", "dsq", "--dry-run", "--gpus", str(gpus))
    given += ("--nodes", str(nodes), "--master", "first:29500") * (nodes > 1)
    train = commands(capsys, *given)[1]
    sizes = [int(after) for flag, after in itertools.pairwise(train) if flag == "--max-tokens"]
    freq = int(flag(train, "--update-freq")) if "--update-freq" in train else 1
    assert (freq, sizes[-1]) == (each, tokens)
    # An update of the recipe's tokens, but for what divides no further.
    whole = sizes[0] * load_recipe(recipe).update_freq
    assert whole - each * gpus * nodes < each * gpus * nodes * tokens <= whole


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--gpus", "3", "--", "--max-tokens", "99"),
            "--max-tokens: got it after --, expected --update-freq too: 3 workers cannot share the 8 batches of an",
        ),
        (
            ("--gpus", "99999"),
            "--gpus: 99999 workers cannot share the 8 batches of an update evenly, expected a recipe",
        ),
        (("--gpus", "4", "--nodes", "2", "--master", "a:1", "--jobs", "2"), "--jobs: got 2, expected 1 beside --nodes"),
        (("--gpus", "none"), "--gpus: got 'none', expected an integer >= 1"),
        (("--nodes", "2", "--master", "a:1"), "--gpus: got none beside --nodes"),
        (("--nodes", "2", "--gpus", "4"), "--master: got '', expected HOST:PORT of the node with --node-rank 0"),
        (("--nodes", "2", "--gpus", "4", "--node-rank", "2", "--master", "a:1"), "--node-rank: got 2, expected 0 to 1"),
        (("--master", "a:1"), "--master: got 'a:1', expected none without --nodes"),
        (("--pieces", "words"), "--pieces: got 'words', expected sentencepiece or bpe"),
    ],
)
def test_gpus_nodes_and_pieces_are_checked(capsys, arguments, said):
    assert main(["run", "wmt14", "--dry-run", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seen", "arguments", "said"),
    [
        (8, (), "--gpus: got none, expected how many of the 8 GPUs here are to train"),
        (1, ("--gpus", "2"), "--gpus: got 2, expected the number of GPUs that are seen here, 1"),
        (8, ("--gpus", "4", "--nodes", "2", "--master", "a:1"), "--gpus: got 4, expected the number of GPUs"),
        (8, ("--gpus", "4", "--jobs", "3"), "--jobs: got 3 with --gpus 4 each, expected at most 2, for 8 GPUs are"),
    ],
)
def test_fairseq_does_not_take_more_gpus_than_it_is_given(monkeypatch, capsys, tmp_path, seen, arguments, said):
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    assert main(["run", "wmt14", "--runs", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_iwslt14_is_cut_and_joined_by_subword_nmt_or_sentencepiece(tmp_path, capsys):
    given = ("iwslt14", "--methods", "dsq", "--runs", str(tmp_path), "--dry-run")
    for pieces, prepared, joined in (
        ((), "data-bpe-10000", "subword_nmt"),
        (("--pieces", "sentencepiece"), "data-10000", "sentencepiece"),
    ):
        prepare, train, _, translate, _ = commands(capsys, *given, *pieces)
        assert prepare[2] == str(tmp_path / "iwslt14" / prepared) and ("--pieces" in prepare) == (not pieces)
        assert train[3] == f"{prepare[2]}/bin" and flag(translate, "--remove-bpe") == joined
        assert flag(translate, "--tokenize") == "none"


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0,1", "2,3"]), ("4,5,6,7", ["4,5", "6,7"])])
def test_runs_side_by_side_have_gpus_of_their_own(monkeypatch, visible, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run._gpus_of_jobs(2, "2") == expected
    assert run._gpus_of_jobs(1, "2") == run._gpus_of_jobs(2, "") == []


def test_a_package_that_is_missing_is_said_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "subword_nmt", None)
    said = "subword_nmt is not installed: pip install '.[translation]'"
    given = ("multi30k", "--runs", str(tmp_path), "--pieces", "bpe")
    assert main(["run", *given]) == 2 and f"--pieces: {said}" in capsys.readouterr().err
    assert main(["translation-prepare", "multi30k", str(tmp_path / "data"), "--pieces", "bpe"]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_tables_help_says_which_defaults_are_a_single_runs(capsys):
    with pytest.raises(SystemExit):
        main(["run", "wmt14", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "precision levels, or one, beside --format (default: [4,4,4,16] [16,4,4,16])" in said
    assert "lower than the best by more than this (default: 0.0)" in said


def test_another_node_begins_a_run_when_the_first_has(tmp_path, monkeypatch):
    data, folder = tmp_path / "none", tmp_path / "run"
    flags = [str(data), "--arch", "transformer"]
    monkeypatch.setattr(training, "FIRST_NODE_S", 0.1)
    with pytest.raises(TimeoutError, match="got no run of node 0 in 0 s"):
        training.train(folder, flags, node=1)
    assert not training.log_of(folder, 1).exists()
    monkeypatch.setattr(training, "FIRST_NODE_S", 600.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(training.train, folder, flags, 1)
        time.sleep(1.5)
        assert not waiting.done() and not training.log_of(folder, 1).exists()
        training.claim(folder, training.identity(flags))
        with pytest.raises(fairseq_command.FailedError):  # there is no data
            waiting.result()
    assert (folder / "node-1.log").exists() and not (folder / "train.log").exists()
    (folder / "checkpoint_last.pt").touch()
    with pytest.raises(ValueError, match="--arch"):
        training.train(folder, [str(data), "--arch", "transformer_lm"], node=1)


@pytest.mark.parametrize("arguments", [(), ("--jobs", "1")])
def test_a_run_that_is_terminated_takes_its_training_along(tmp_path, arguments):
    (tmp_path / "text.txt").write_text("".join(f"a line of number {number}\n" for number in range(200)))
    program, mark = tmp_path / "fairseq-train", tmp_path / "mark"
    program.write_text(f"#!/bin/sh\necho $$ > {mark}.part && mv {mark}.part {mark}\nexec sleep 600\n")
    program.chmod(0o755)
    recipe = ("neighbours-lm", "--methods", "float32", *arguments) if arguments else ("lm",)
    command = [sys.executable, "-m", "fairseq_dsq.cli", "run", recipe[0], str(tmp_path / "text.txt"), *recipe[1:]]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen([*command, "--vocab", "40", "--runs", str(tmp_path / "runs")], env=environment) as running:
        until = time.monotonic() + 120
        while not mark.exists() and running.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        training_pid = int(mark.read_text())
        running.terminate()
        assert running.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(training_pid, 0)


def test_how_far_a_recipe_is_needs_no_package_of_its_pieces(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "subword_nmt", None)
    assert main(["run", "iwslt14", "--runs", str(tmp_path), "--status"]) == 0
    assert capsys.readouterr().out == "iwslt14: 0 of 8 runs done, 0 running, 8 left\n"
