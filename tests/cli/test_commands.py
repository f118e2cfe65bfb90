"""What the command line imports before it does anything."""

import json
import os

import pytest
from command import run

# fairseq imports some of them itself, where they are installed.
HEAVY = {
    "jinja2", "matplotlib", "scipy", "sentencepiece", "sklearn", "tensorboard", "tensorboardX", "tokenizers",
    "transformers",
}  # fmt: skip
IMPORTED = """
import contextlib, json, sys
import fairseq
before = set(sys.modules)
import fairseq_dsq
package = set(sys.modules)
from fairseq_dsq.cli import main
with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(json.dumps([sorted(package - before), sorted(set(sys.modules) - package)]))
"""


def imported(folder, *argv):
    """Modules that the package imports beside fairseq's, and that the command line imports beside these."""
    code, out, err = run(["python", "-c", IMPORTED, *argv], folder, os.environ)
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), err


def test_the_help_of_a_command_imports_what_the_package_does(tmp_path):
    (package, command), text = imported(tmp_path, "epochs", "--help")
    assert "a run's folder, its dsq.jsonl" in text
    assert not HEAVY & {name.partition(".")[0] for name in package + command}
    ours = {name for name in command if name.startswith("fairseq_dsq.")}
    assert ours == {"fairseq_dsq.cli", "fairseq_dsq.cli.epochs"}


def test_the_version_is_the_package_s(capsys):
    from fairseq_dsq import artefact
    from fairseq_dsq.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fairseq_dsq {artefact.version()}\n"


def test_the_list_of_commands_imports_none(tmp_path):
    (_, command), text = imported(tmp_path, "--help")
    assert "translation-prepare" in text and "Quantize" not in text
    assert {name for name in command if name.startswith("fairseq_dsq.")} == {"fairseq_dsq.cli"}
