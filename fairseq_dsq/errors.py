"""Bad input, said in one line: an exception to those who import the package, a command's last line to its user."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from omegaconf.errors import ConfigKeyError


class DSQError(ValueError):
    """What the user gave cannot be used; the message is one line that names the flag or the file."""


def flag_error(flag: str, message: str) -> NoReturn:
    """Refuse the value of a flag.

    Raises:
        DSQError: always; one line that names the flag.
    """
    raise DSQError(f"argument {flag}: {message}")


def line_of(error: BaseException | None) -> str | None:
    """The message of a DSQError that led to ``error``, as its cause or in a process that it started."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, DSQError):
            return str(error)
        # torch.multiprocessing.spawn hands on the traceback of a worker as text.
        told = re.search(rf"^{DSQError.__module__}\.{DSQError.__name__}: (.*)$", str(error), re.MULTILINE)
        if told:
            return told[1]
        # fairseq's own answer to --path, before it opens the file.
        if isinstance(error, OSError) and str(error).startswith("Model file not found: "):
            return str(error)
        # OmegaConf's, to a name that the criterion's part of a YAML file has and the criterion has not.
        if isinstance(error, ConfigKeyError) and str(error.key).startswith("dsq"):
            return f"{error.key}: no such flag: {str(error).splitlines()[0]}"
        error = error.__cause__ or error.__context__
    return None


def runs_a_command() -> bool:
    """Whether this process is one of fairseq's commands: fairseq-train, ``python -m fairseq_cli.train``, a worker."""
    path = Path(sys.argv[0] if sys.argv else "")
    return path.name.startswith("fairseq-") or path.parent.name == "fairseq_cli"


def end_commands_in_one_line() -> None:
    """Have a DSQError that nobody catches end one of fairseq's commands with its message; the exit code stays 1.

    fairseq has no hook for its commands' errors; Python's hook is left alone in any other process.
    """
    if not runs_a_command():
        return
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        line = line_of(error)
        if line is None:
            previous(kind, error, traceback)
        else:
            print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)

    sys.excepthook = hook
    # Else Hydra's commands print a traceback of their own and exit.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
