"""Run fairseq-train in a folder of its own; one that other settings trained in is refused, one that is done is kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.recipes import fairseq_command

LOG = "train.log"
# How long another node waits for the first to begin a run: that one scores the run before.
FIRST_NODE_S = 3600.0
_LOOK_S = 1.0
# What a flag's own name stands before; the first argument of fairseq-train is the data.
DATA = "DATA"
# They do not change what is trained. The data is known by its content, the package by its version.
_WITHOUT_EFFECT = frozenset({
    "--log-format", "--log-interval", "--log-file", "--no-progress-bar", "--tensorboard-logdir",
    "--wandb-project", "--num-workers", "--keep-interval-updates", "--keep-last-epochs", "--keep-best-checkpoints",
    "--distributed-rank", "--distributed-init-method", "--distributed-port",
})  # fmt: skip
# What is a path also where it does not look like one.
_PATHS = (DATA, fairseq_command.USER_DIR)
# A run may go on for longer than it was first asked to.
GROWING = ("--max-epoch",)


def train(folder: Path, flags: Sequence[str], node: int = 0) -> None:
    """Run fairseq-train with ``flags`` (the data first, no --save-dir) in ``folder``, unless it is done.

    Args:
        node: which of several computers that share the folder this is. Node 0 answers for it, and is waited for.

    Raises:
        ValueError: other settings trained in it; another command is at work there; or a flag that is given already.
        FailedError: fairseq-train failed; its output is in :func:`log_of` the node.
        TimeoutError: node 0 does not begin.
    """
    own = {"--save-dir": str(folder.resolve())}
    refuse_own(flags, own)
    artefact.check_path("RUN", folder)
    settings = identity(flags)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*fairseq_command.with_user_dir(flags), *itertools.chain(*own.items())]
    if node:
        _await_first_node(folder, settings)
        if not artefact.made_by(folder / LOG, settings):
            fairseq_command.call("fairseq-train", words, log_of(folder, node))
        return
    with artefact.locked(folder, wait=False) as lock:
        if claim(folder, settings):
            return
        # Whoever kills this command alone leaves fairseq-train at work, which then still holds the lock.
        fairseq_command.call("fairseq-train", words, folder / LOG, pass_fds=[lock])
        artefact.write(folder / LOG, settings)


def log_of(folder: Path, node: int) -> Path:
    """Where the output of fairseq-train on one of several computers is."""
    return folder / (f"node-{node}.log" if node else LOG)


def _await_first_node(folder: Path, settings: Mapping[str, str]) -> None:
    """Wait until node 0 has begun the run: the workers wait for each other for less time than a score may take."""
    until = time.monotonic() + FIRST_NODE_S
    while not artefact.made_by(folder, settings):
        if any(folder.glob("checkpoint*.pt")):
            artefact.check(folder, settings, GROWING)
        if time.monotonic() > until:
            raise TimeoutError(f"{folder}: got no run of node 0 in {FIRST_NODE_S:.0f} s, expected that it begins")
        time.sleep(_LOOK_S)


def refuse_own(flags: Iterable[str], own: Mapping[str, str]) -> None:
    """Refuse flags of fairseq that are given already: ``own``, by flag its value. The last of two would stand, unsaid.

    Raises:
        ValueError: names the flag.
    """
    for given in (word.partition("=")[0] for word in flags):
        if given in own:
            raise ValueError(f"{given}: is {own[given]}, expected none")


def identity(arguments: Sequence[str]) -> dict[str, str]:
    """What a command of fairseq makes depends on, by flag: values, and the checksums of the files that they name.

    Numbers are written alike (0.01 and 1e-2); of a flag that is given twice the last stands.

    Raises:
        ValueError: a path that fairseq cannot hold.
    """
    found: dict[str, list[str]] = {}
    name = DATA
    for argument in arguments:
        if argument.startswith("-") and not _is_number(argument):
            name, equals, value = argument.partition("=")
            found[name] = [value] if equals else []
        else:
            found.setdefault(name, []).append(argument)
    return {
        name: " ".join(_canonical(name, value) for value in values) or "given"
        for name, values in found.items()
        if name not in _WITHOUT_EFFECT
    }


def claim(folder: Path, settings: Mapping[str, str]) -> bool:
    """Take the folder for a run with these settings; returns whether the run is done already.

    A folder without checkpoints is begun anew: its log goes, and what was stamped in it.

    Raises:
        ValueError: other settings trained in it; names what differs.
    """
    log = folder / LOG
    if not any(folder.glob("checkpoint*.pt")):
        for old in folder.glob(f"*.{artefact.STAMP}"):
            old.with_name(old.name.removesuffix(f".{artefact.STAMP}")).unlink(missing_ok=True)
            old.unlink()
        log.unlink(missing_ok=True)
    else:
        artefact.check(folder, settings, GROWING)
        if artefact.made_by(log, settings) and artefact.made_by(folder, settings):
            return True
    artefact.stamp(log).unlink(missing_ok=True)
    artefact.write(folder, settings)
    return False


def _canonical(name: str, value: str) -> str:
    path, named = Path(value), name in _PATHS
    if _is_number(value) and not named:
        number = float(value)
        return str(int(number)) if number.is_integer() else repr(number)
    if (named or "/" in value or path.suffix) and path.exists():
        artefact.check_path(name, path)
        return artefact.content(path)
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
