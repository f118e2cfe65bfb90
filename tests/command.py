"""Console scripts of this environment, run as a user would, in processes forked from one that has imported fairseq.

Nothing else is shared: each command is its own entry point in a process of its own, with its own folder, environment
and output. To import torch and fairseq takes longer than most of the commands that the tests run.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from torch import multiprocessing

os.environ.setdefault("OMP_NUM_THREADS", "1")
_FORKS = multiprocessing.get_context("forkserver")
# Not fairseq_cli, which sets up logging, nor fairseq_dsq, which --user-dir imports. Every optimizer of torch imports
# torch._dynamo, which takes as long as a tiny training.
_FORKS.set_forkserver_preload(["fairseq", "fairseq.trainer", "sacrebleu", "torch._dynamo"])


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float = 300
) -> tuple[int, str, str]:
    """Run a console script, or ``python`` with ``-c CODE`` or a script; returns its exit code, stdout and stderr.

    Raises:
        TimeoutError: it did not end in time, and was killed.
    """
    with tempfile.TemporaryDirectory() as outputs:
        paths = [os.path.join(outputs, name) for name in ("out", "err")]
        process = _FORKS.Process(target=_become, args=(list(command), str(folder), dict(environment), paths))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{command[0]} did not end in {timeout:.0f} s: {Path(paths[1]).read_text()[-1000:]}")
        out, err = (Path(path).read_text() for path in paths)
        return process.exitcode, out, err


def together(function: Callable[..., None], arguments: tuple[object, ...], count: int, anew: bool = False) -> None:
    """Run ``function(rank, *arguments)`` in ``count`` processes at once; raises what one of them raises.

    They are forked as commands are; ``anew`` starts new ones, which read this environment when they import torch.
    """
    multiprocessing.start_processes(function, arguments, count, start_method="spawn" if anew else "forkserver")


def _become(command: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    logging.root.handlers.clear()  # of a warning while fairseq was imported
    gc.freeze()  # trainings collect garbage at each epoch: what was imported is none
    assert "fairseq_dsq" not in sys.modules, "imported before the command that is to import it"
    try:
        if command[:2] == ["python", "-c"]:
            sys.argv = ["-c", *command[3:]]
            sys.exit(exec(command[2], {"__name__": "__main__"}))
        if command[0] == "python":
            sys.argv = command[1:]
            sys.exit(runpy.run_path(command[1], run_name="__main__"))
        sys.argv = command
        (script,) = entry_points(group="console_scripts", name=command[0])
        sys.exit(script.load()())
    except Exception:  # as the interpreter ends with one
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
