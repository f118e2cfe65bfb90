"""Run the command lines of fairseq as a user would, their output kept in a log; what went wrong, in one line."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

USER_DIR = "--user-dir"
_PACKAGE = Path(__file__).resolve().parents[1]
BIN = "bin"
_ERROR = re.compile(r"error:|^\S*(Error|Exception)\b")
_TRACEBACK = "Traceback (most recent call last):"


class FailedError(OSError):
    """A command of fairseq failed; the message is what it said."""


def call(command: str, flags: Sequence[str], log: Path, pass_fds: Sequence[int] = ()) -> None:
    """Run a command with its output added to ``log``.

    Raises:
        FailedError: it failed; the message is its last error, never an earlier run's.
    """
    program = shutil.which(command) or str(Path(sys.executable).with_name(command))
    with open(log, "ab") as output:
        begin = output.tell()
        code = subprocess.run([program, *flags], stdout=output, stderr=subprocess.STDOUT, pass_fds=pass_fds).returncode
    if code:
        with open(log, encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            said = last_error(file.read())
        raise FailedError(said or f"{command} ended with code {code}")


def value_of(flags: Sequence[str], name: str) -> str | None:
    """What flags give for the flag of a name, the last of several; None: nothing."""
    found = None
    for flag, following in itertools.pairwise([*flags, ""]):
        given, equals, value = flag.partition("=")
        if given == name:
            found = value if equals else following
    return found


def user_dir(flags: Sequence[str]) -> str | None:
    """The folder of one's own that flags of fairseq name, which imports this package."""
    return value_of(flags, USER_DIR)


def user_dir_flags(flags: Sequence[str]) -> list[str]:
    """``--user-dir DIR`` where the flags name one: for other commands on the same run."""
    folder = user_dir(flags)
    return [] if folder is None else [USER_DIR, folder]


def with_user_dir(flags: Sequence[str]) -> list[str]:
    """The flags, in which ``--user-dir`` is this package unless it is one's own."""
    return [*flags] if user_dir(flags) is not None else [*flags, USER_DIR, str(_PACKAGE)]


def preprocess(folder: Path, source: str, target: str, dictionary: Path | None = None) -> None:
    """Binarise SPLIT.LANGUAGE (train, valid, test) into the folder's bin/, its dictionaries the languages' own or one.

    Raises:
        FailedError: as :func:`call`.
    """
    flags = ["--source-lang", source, "--target-lang", target, *_splits(folder)]
    if dictionary is not None:
        flags += ["--joined-dictionary", "--srcdict", str(dictionary)]
    call("fairseq-preprocess", flags, folder / "preprocess.log")


def preprocess_text(folder: Path) -> None:
    """Binarise the text of one language, SPLIT (train, valid, test) by dict.txt, into the folder's bin/.

    Raises:
        FailedError: as :func:`call`.
    """
    flags = ["--only-source", "--srcdict", str(folder / "dict.txt"), *_splits(folder)]
    call("fairseq-preprocess", flags, folder / "preprocess.log")


def _splits(folder: Path) -> list[str]:
    found = [part for split in ("train", "valid", "test") for part in (f"--{split}pref", str(folder / split))]
    return [*found, "--destdir", str(folder / BIN)]


def last_error(output: str) -> str:
    """What the last traceback in an output of a command ends with, else its last line that tells of an error."""
    lines = output.splitlines()
    last = max((number for number, line in enumerate(lines) if line.strip() == _TRACEBACK), default=len(lines))
    indent = len(lines[last]) - len(lines[last].lstrip()) if last < len(lines) else 0
    for line in lines[last + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return line.strip()
    return next((line.strip() for line in reversed(lines) if _ERROR.search(line)), "")
