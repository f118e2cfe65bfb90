"""What the command line imports before it does anything."""

import json
import subprocess
import sys

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


def imported(*argv):
    """Modules that the package imports beside fairseq's, and that the command line imports beside these."""
    run = subprocess.run([sys.executable, "-c", IMPORTED, *argv], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


def test_the_help_of_a_command_imports_what_the_package_does():
    (package, command), text = imported("epochs", "--help")
    assert "a run's folder, its dsq.jsonl" in text
    assert not HEAVY & {name.partition(".")[0] for name in package + command}
    ours = {name for name in command if name.startswith("fairseq_dsq.")}
    assert ours == {"fairseq_dsq.cli", "fairseq_dsq.cli.epochs"}


def test_the_list_of_commands_imports_none():
    (_, command), text = imported("--help")
    assert "translation-prepare" in text and "Quantize" not in text
    assert {name for name in command if name.startswith("fairseq_dsq.")} == {"fairseq_dsq.cli"}
