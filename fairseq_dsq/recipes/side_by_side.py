"""Several runs at a time, each command a process of its own, which ends with this one unless that is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from fairseq_dsq.recipes.plan import Step

VISIBLE = "CUDA_VISIBLE_DEVICES"
PROGRAM = (sys.executable, "-m", "fairseq_dsq.cli")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: of the run.
        output: of its commands.
        code: exit code of the last command.
        errors: what that said of a failure, and :attr:`Step.failure`.
    """

    folder: Path
    output: str
    code: int = 0
    errors: str = ""


class SideBySide:
    """Runs of a plan, ``jobs`` at a time.

    Args:
        gpus: what CUDA_VISIBLE_DEVICES is for each of those at work at a time; empty: what it is here, for all.

    Attributes:
        running: the folders of those that are at work.
    """

    def __init__(self, jobs: int, gpus: Sequence[str] = ()) -> None:
        self.running: set[Path] = set()
        self._jobs = jobs
        self._environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in [{**os.environ, VISIBLE: visible} for visible in gpus] or [dict(os.environ)] * jobs:
            self._environments.put(environment)
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(self, runs: Mapping[Path, Sequence[Step]]) -> Iterator[Outcome]:
        """Run them; gives what each came to when it ends. A run ends with its first command that fails."""
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = [pool.submit(self._run, folder, steps) for folder, steps in runs.items()]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._end()

    def _run(self, folder: Path, steps: Sequence[Step]) -> Outcome:
        self.running.add(folder)
        environment = self._environments.get()
        output = ""
        try:
            for step in steps:
                code, said, errors = self._call(step, environment)
                output += step.before + said
                if code:
                    return Outcome(folder, output, code, errors + (f"{step.failure}\n" if code == 1 else ""))
            return Outcome(folder, output)
        finally:
            self._environments.put(environment)
            self.running.discard(folder)

    def _call(self, step: Step, environment: dict[str, str]) -> tuple[int, str, str]:
        with self._lock:
            if self._ended:
                return 1, "", ""
            process = subprocess.Popen(
                [*PROGRAM, *step.arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                text=True, start_new_session=True, env=environment,
            )  # fmt: skip
            self._processes.add(process)
        output, errors = process.communicate()
        with self._lock:
            self._processes.discard(process)
        return process.returncode, output, errors

    def _end(self) -> None:
        """End what is at work, and what that started."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
