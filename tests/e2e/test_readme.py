"""Every command of the READMEs runs, on tiny data; which of them do not, and why, is written here.

The scripts train for minutes: here their steps have stand-ins, and fairseq's parser reads the commands that they give;
scripts/readme.sh runs them for real (pytest -m slow).
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_dsq.bench import BENCHES
from fairseq_dsq.cli import SUBCOMMANDS, main
from fairseq_dsq.cli.bench import EVERY
from fairseq_dsq.plugin.probe import training_config
from fairseq_dsq.precision import parse_levels
from tests.e2e import readme
from tests.report import samples

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    pytest.param(command, id=f"{path.relative_to(ROOT)}: {command}")
    for path in readme.files(ROOT)
    for command in readme.commands(path.read_text(encoding="utf-8"))
]
NOT_RUN = {
    r"pip3? install .*": "needs a package index",
    r"scripts/(test|readme|sanitize|soak|fuzz|distributed|avx512)\.sh.*": "runs tests, this one too, or for long",
    r"DSQ_ENV=.venv scripts/gpu\.sh": "checks for minutes; tests/cli/test_gpu_script.py runs it in small",
    r"python3? -m pytest.*": "runs tests",
    r"(torchrun|srun) .*": "needs GPUs",
    r"scripts/(study|formats)\.sh.*": "trains for hours; tests/recipes/test_recipes.py looks at its commands",
    r"fairseq-dsq bench \S+.*": "measures for minutes; tests/cli/test_bench.py runs it for one round",
}
TRAINS = re.compile(r"scripts/(quickstart|multi30k|iwslt1[47]|wmt14|glue|lm)\.sh.*")
SUBCOMMAND_NAMES = {name.replace("_", "-") for name in SUBCOMMANDS}
TINY = (
    "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 16 "
    "--decoder-ffn-embed-dim 16 --encoder-attention-heads 2 --decoder-attention-heads 2 --max-tokens 1000 --cpu"
)


def words(command):
    """The words of a command without the variables before it; of a|b the first."""
    found = shlex.split(command)
    while "=" in found[0]:
        found.pop(0)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme(command, request, tmp_path, monkeypatch):
    """Runs it; a command that nothing here knows fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSQ_DATA", raising=False)
    command = re.sub(r" \[[A-Z]+( \.\.\.)?\]", "", command)  # what may be left out
    if not any(re.fullmatch(pattern, command) for pattern in NOT_RUN):
        run = next((run for pattern, run in RUN.items() if re.fullmatch(pattern, command)), None)
        assert run is not None, f"the README gives a command that no test runs: {command}"
        run(words(command), request.getfixturevalue)
    if command.startswith("scripts/"):
        assert os.access(ROOT / command.split()[0], os.X_OK)
    if command.startswith("fairseq-dsq bench "):
        assert set(command.split()[2].split("|")) <= {*BENCHES, EVERY}


def its_help(argv, fixture):
    """A mention of subcommands: they exist and say what they do."""
    for name in argv[1].split("|") if len(argv) > 1 else [None]:
        assert name is None or name in SUBCOMMAND_NAMES
        with pytest.raises(SystemExit) as stop:
            main([*([name] if name else []), "--help"])
        assert stop.value.code == 0


def a_dsq_command(argv, fixture):
    for variant in variants(argv[1:]):
        assert main(variant) == 0


def variants(argv):
    """The commands that ``a|b`` in one stands for."""
    for index, word in enumerate(argv):
        if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word):
            return [
                rest for choice in word.split("|") for rest in variants([*argv[:index], choice, *argv[index + 1 :]])
            ]
    return [argv]


def a_recipe_s_help(argv, fixture):
    with pytest.raises(SystemExit) as stop:
        main(argv[1:])
    assert stop.value.code == 0


def of_runs(argv, fixture):
    """A command on runs, which are made here."""
    runs = [word for word in argv[2:] if "/" in word or word.startswith("RUN")]
    for number, name in enumerate(runs):
        Path(name).mkdir(parents=True)
        flags = samples.FLOAT32 if number else samples.DSQ
        (Path(name) / "dsq.jsonl").write_text(samples.record(flags, [4.0]))
    assert main(argv[1:]) == 0


def convert_hf(argv, fixture):
    from tests import hugging_face

    hugging_face.bert(Path(argv[2]))
    assert main(argv[1:]) == 0


def average(argv, fixture):
    folder = fixture("trained")
    assert main(["average", "averaged.pt", *[str(folder / "checkpoint_best.pt")] * 2]) == 0
    assert Path("averaged.pt").is_file()


def export_float(argv, fixture):
    Path(argv[2]).parent.mkdir(exist_ok=True)
    shutil.copy(fixture("trained") / "checkpoint_best.pt", argv[2])
    assert main(argv[1:]) == 0


def a_fairseq_command(argv, fixture):
    """``DATA`` is the tiny corpus; what the dots leave open is small."""
    cli = fixture("cli")
    argv = [str(cli.data) if word == "DATA" else word for word in argv if word != "..."]
    cli.run(*argv, *shlex.split(TINY), "--optimizer", "adam", "--max-epoch", "1", "--no-save")


def a_language_model(argv, fixture):
    """``LM_DATA`` is the tiny corpus of one language."""
    cli = fixture("cli")
    argv = [str(word).replace("LM_DATA", str(fixture("lm_data"))) for word in argv]
    if argv[0] == "fairseq-hydra-train":
        cli.run(*tiny_hydra(*argv))
    else:
        small = ("--gen-subset", "valid", "--max-tokens", 1024, "--cpu")
        out, err = cli.run(*argv, "--path", fixture("trained_lm"), *small)
        assert "Perplexity: " in out + err


def tiny_hydra(*argv):
    """fairseq-hydra-train in the clone's configs/, on a small model and a CPU."""
    shape = {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 2}
    argv = [str(ROOT / word) if word.startswith("configs/") else word for word in argv]
    tiny = [f"model.decoder_{name}={value}" for name, value in shape.items()]
    return [*argv, *tiny, "common.cpu=true", "optimization.max_epoch=1"]


@pytest.fixture(scope="module")
def trained_lm(cli, lm_data):
    where = ("--config-dir", "configs/hydra", "--config-name", "transformer_lm_dsq")
    cli.run(*tiny_hydra("fairseq-hydra-train", *where, f"task.data={lm_data}", "checkpoint.save_dir=readme_lm"))
    return cli.folder / "readme_lm/checkpoint_best.pt"


@pytest.fixture(scope="module")
def trained(cli):
    cli.train("readme", "--max-epoch", 1)
    return cli.folder / "readme"


def python(argv, fixture):
    fixture("cli").run(*argv)


def dsq_commands_of(script, *argv):
    """What a script gives fairseq-dsq, which a stand-in says."""
    stand_in = Path("stand-in/bin/fairseq-dsq").absolute()
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/bash\necho "${@@Q}"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "DSQ_ENV": str(stand_in.parents[1])}
    done = subprocess.run([script, *argv], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def script(argv, fixture):
    """The script, dry; what it would hand to fairseq-train is read by fairseq's own parser."""
    clone = copy(Path.cwd() / "a clone")
    given = [word for word in argv[1:] if word != "..."]
    at = given.index("--") if "--" in given else len(given)
    (line,) = dsq_commands_of(clone / argv[0], *given[:at], "--dry-run", *given[at:]).splitlines()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(shlex.split(line)) == 0
    calls = [shlex.split(line)[1:] for line in out.getvalue().splitlines()]
    trainings = [call for call in calls if call[0] == "run-train"]
    assert trainings
    for call in trainings:
        assert not set(Path(call[1]).relative_to(clone / "runs").as_posix()) & set(":,[]'\" "), call[1]
    for call in calls:
        flags = call[call.index("--") + 1 :] if "--" in call else []
        if call[0] == "run-train" and flags != ["[glue-flags]"]:
            training_config(flags)
        if call[0] == "glue-flags":
            own = ["--task", "sentence_prediction", "--arch", "roberta_dsq", "--total-num-update", "1"]
            training_config(["DATA", *own, *flags])


def quickstart(argv, fixture):
    """The script with a stand-in for fairseq-dsq; what it hands to fairseq-train is read by fairseq's own parser."""
    folder = Path.cwd()
    clone = copy(folder / "a clone")
    stand_in = folder / "bin/fairseq-dsq"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        f"with open({str(folder / 'calls')!r}, 'a') as file: print(json.dumps(sys.argv[1:]), file=file)\n"
        "if sys.argv[1] == 'run-translate':\n"
        "    pathlib.Path(sys.argv[4]).mkdir(parents=True, exist_ok=True)\n"
        "    (pathlib.Path(sys.argv[4]) / 'hypotheses.en').write_text('a line\\n' * 40_000)\n"
        "    print(1.0)\n"
        "if sys.argv[1] == 'corpus':\n"
        "    pathlib.Path(sys.argv[2]).mkdir(parents=True)\n"
        "    for name in ('test.de', 'test.en'):\n"
        "        (pathlib.Path(sys.argv[2]) / name).write_text('a line\\n' * 40_000)  # more than a pipe holds\n"
    )
    stand_in.chmod(0o755)
    environment = {**os.environ, "DSQ_ENV": str(folder)}
    done = subprocess.run([clone / argv[0], *argv[1:]], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    trainings = [call[call.index("--") + 1 :] for call in calls if call[0] == "run-train"]
    assert len(trainings) == 2
    for training in trainings:
        training_config(training)


def copy(clone):
    """The scripts and the package elsewhere, so that runs/ is there."""
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    (clone / "fairseq_dsq").symlink_to(ROOT / "fairseq_dsq")
    return clone


# The first that fits runs it.
RUN = {
    r"fairseq-dsq( [\w|-]+)?( --help)?": its_help,
    r"fairseq-dsq run \S+ --help": a_recipe_s_help,
    r"fairseq-dsq (report|epochs) .*": of_runs,
    r"fairseq-dsq convert-hf \S+ \S+": convert_hf,
    r"fairseq-dsq export-float \S+ \S+": export_float,
    r"fairseq-dsq average .*": average,
    r"fairseq-dsq (cost|roofline|formats)( .*)?": a_dsq_command,
    r"fairseq-(hydra-train|eval-lm) .*LM_DATA.*": a_language_model,
    r"fairseq-(train|hydra-train|generate|validate) .*": a_fairseq_command,
    r"python3? -c .*": python,
    r"scripts/quickstart\.sh.*": quickstart,
    TRAINS.pattern: script,
}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


READMES = pytest.mark.parametrize("path", readme.files(ROOT), ids=lambda path: str(path.relative_to(ROOT)))


@READMES
def test_the_levels_of_a_readme_are_levels(path):
    for code in re.findall("`'?([^`']+)'?`", path.read_text(encoding="utf-8")):
        if re.fullmatch(r"(\[[^\[\]]+,[^\[\]]+\] ?)+", code) and "q0" not in code:
            assert parse_levels(code), code


@READMES
def test_what_a_readme_links_to_is_there(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target.split("#")[0]).exists(), target


@READMES
def test_the_python_of_a_readme_runs(path):
    from torch import nn

    scope = {"model": nn.ModuleDict({"body": nn.Linear(32, 32), "head": nn.Linear(32, 4)})}
    for block in readme.python_blocks(path.read_text(encoding="utf-8")):
        exec(block, scope)


def test_commands_are_found_wherever_they_stand():
    text = """
Use `fairseq-dsq cost` or ``scripts/a.sh --levels '[2]' `` but no `fairseq` and no `--flag`; a span `fairseq-dsq
report RUN` may go on.

```
$ fairseq-train DATA \\
    --cpu            # says so
epoch 1
```

```python
fairseq-dsq none
```

| `scripts/b.sh --epochs 8 ...` | BLEU |
|---|---|
| `--format float32` | 1 |
| (defaults) | 2 |
"""
    assert readme.commands(text) == [
        "fairseq-train DATA --cpu", "fairseq-dsq cost", "scripts/a.sh --levels '[2]'", "fairseq-dsq report RUN",
        "scripts/b.sh --epochs 8 ...", "scripts/b.sh --epochs 8 --format float32", "scripts/b.sh --epochs 8",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["multi30k.sh", "iwslt14.sh", "glue.sh", "lm.sh", "quickstart.sh"])
def test_a_script_says_what_it_takes(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = dsq_commands_of(ROOT / "scripts" / name, "--help")
    if name != "quickstart.sh":  # which has no command of its own
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(said))
        assert stop.value.code == 0
        said = capsys.readouterr().out
    assert "--" in said


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A clone with tiny corpora and a tiny encoder in place of roberta.base."""
    from fairseq_dsq.glue import TASKS
    from fairseq_dsq.translation.toy import write
    from tests.e2e.test_glue import make_encoder, write_toy

    folder = tmp_path_factory.mktemp("readme")
    clone = copy(folder / "a clone")
    multi30k = ("val", "test_2016_flickr")
    corpora = {"multi30k": multi30k, "iwslt14_de-en": None, "iwslt17_de-en": None, "wmt14_en-de": None}
    for name, files in corpora.items():
        write(folder / "data" / name, train=200, valid=8, test=9)
        for split, file in zip(("valid", "test"), files or (), strict=False):
            for language in ("de", "en"):
                path = folder / "data" / name / f"{split}.{language}"
                path.rename(path.with_name(f"{file}.{language}"))
    (folder / "data/glue").mkdir()
    for task in TASKS.values():
        if "sentence1" in task.sentences and not task.header:
            files = ("train.tsv", *(name for name, _ in task.dev))
            write_toy(folder / "data/glue" / task.name, task, files, (40, 20, 20)[: len(files)])
    shutil.copy(folder / "data/wmt14_en-de/train.en", folder / "TEXT")
    make_encoder(folder / "DIR")
    shutil.copytree(folder / "DIR", clone / "runs/glue/downloads/roberta.base")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [case for case in COMMANDS if TRAINS.fullmatch(case.values[0])])
def test_a_script_of_the_readme_for_real(command, world, tmp_path):
    argv = [word for word in words(command) if word != "..."]
    name = Path(argv[0]).name
    if name == "lm.sh":
        argv += ["--vocab", "200", "--dim", "16", "--ffn", "16", "--layers", "1"]
    elif name != "quickstart.sh":
        argv = [*argv, *([] if "--" in argv else ["--"]), *([] if name == "glue.sh" else shlex.split(TINY))]
        before = ["--vocab", "200"] if name != "glue.sh" else []
        if name in ("iwslt14.sh", "iwslt17.sh", "wmt14.sh") and "--methods" not in argv:
            before += ["--methods", "float32 dsq"]
        before += [] if "--epochs" in argv else ["--epochs", "1"]
        before += ["--out", str(tmp_path / "out")]  # two commands may name one run, of other lengths
        at = 2 if name == "glue.sh" else 1
        argv = [*argv[:at], *before, *argv[at:]]
    environment = {
        **os.environ, "DSQ_ENV": sys.prefix, "DSQ_DATA": str(world / "data"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [world / "a clone" / argv[0], *argv[1:]], env=environment, cwd=world, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if name == "quickstart.sh":
        lines = done.stdout.splitlines()
        assert lines[2].split() == [
            "epoch",
            "level",
            "train",
            "loss",
            "valid",
            "loss",
            "arithmetic",
            "DRAM",
            "stash",
            "MB",
        ]
        assert re.fullmatch(r"test sacreBLEU: DSQ [\d.]+, float32 [\d.]+", lines[10])
        assert lines[12] == "five translations (source, DSQ, reference):"
