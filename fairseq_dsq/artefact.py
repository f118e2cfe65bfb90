"""Artefacts: what commands make is whole or not there, and says what made it.

A stamp is a JSON object that holds the settings, the checksums of the inputs and the version of this package. It lies
inside a folder as made.json and beside a file as FILE.made.json. What is found is used again only if its stamp says
what is asked for now; else it is refused, in one line that names what differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

STAMP = "made.json"
VERSION = "fairseq_dsq"
# What a run's best checkpoint is called, by fairseq.
BEST = "checkpoint_best.pt"
# What a stamp calls the checksum of the checkpoint that was scored.
CHECKPOINT = "checkpoint"
# fairseq and Hydra take these for marks of their own in a path: lists are split at : and , and ${} is looked up.
_UNSAFE = re.compile(r"[:,\\\n\r]|\$\{")
_NO_CONTENT = (".log", ".pyc")
_CHUNK_BYTES = 1 << 20
_SHOWN = 3
# is_locked() holds a lock for less.
_LOOK_S = 0.05


def version() -> str:
    """The version of this package; without its metadata, ``unknown``."""
    try:
        return importlib.metadata.version("fairseq_dsq")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def checksum(*paths: Path) -> str:
    """sha256 of the files, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def content(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files.

    Left out are logs, which hold paths and times, and what Python compiled.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_dir():
        return checksum(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix not in _NO_CONTENT)
    listing = "".join(f"{checksum(file)} {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def stamp(path: Path) -> Path:
    """Where the stamp of a file or folder is."""
    return path / STAMP if path.is_dir() else path.with_name(f"{path.name}.{STAMP}")


def read(path: Path) -> dict[str, str] | None:
    """What made ``path``; None where it has no stamp.

    Raises:
        ValueError: the stamp is damaged; names it.
    """
    file = stamp(path)
    if not file.is_file():
        return None
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in made.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}, expected a JSON object") from None


def write(path: Path, settings: Mapping[str, str]) -> None:
    """Stamp ``path`` with its settings and the version of this package."""
    with atomic(stamp(path)) as partial:
        partial.write_text(json.dumps({**settings, VERSION: version()}, indent=1) + "\n", encoding="utf-8")


def differences(made: Mapping[str, str], asked: Mapping[str, str], growing: Collection[str] = ()) -> list[str]:
    """What differs, a line each; a setting named in ``growing``, a number, may be larger than it was."""
    found = []
    for name in sorted({*made, *asked}):
        before, now = made.get(name, "nothing"), asked.get(name, "nothing")
        if before == now or (name in growing and _at_most(before, now)):
            continue
        found.append(f"{name} {_short(before)}, asked for {_short(now)}")
    return found


def check(path: Path, settings: Mapping[str, str], growing: Collection[str] = ()) -> bool:
    """Whether ``path`` is there (an empty folder is not), made of ``settings`` by this version of the package.

    Raises:
        ValueError: it was made of something else, or does not say of what; names it and what differs.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    made = read(path)
    if made is None:
        raise ValueError(f"{path}: does not say what made it (no {stamp(path).name}); remove it or name another")
    if found := differences(made, {**settings, VERSION: version()}, growing):
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(f"{path}: made with {'; '.join(found[:_SHOWN])}{more}; remove it or name another")
    return True


def made_by(path: Path, settings: Mapping[str, str]) -> bool:
    """Whether ``path`` is there and its stamp says just these settings and this version of the package."""
    return path.exists() and read(path) == {**settings, VERSION: version()}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file or folder whole or not at all.

    Yields a path beside ``path`` to write to, which takes its place when the block ends, and is removed if that fails.

    A command that is killed leaves a NAME.part-* that nothing reads; two at once do not write to the same one.

    Raises:
        OSError: it cannot be written, or ``path`` is a folder that holds something.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.part-") as folder:
        partial = Path(folder, path.name)
        yield partial
        partial.replace(path)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[int]:
    """Keep other commands out of a folder; the descriptor that holds the lock, for processes that are to hold it too.

    Nothing is left on the disk, and the end of the last process that holds the lock frees it.

    Raises:
        ValueError: another command is at work there and ``wait`` is false.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for last in (wait, True):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if last:
                    raise ValueError(f"{folder}: another command is at work there") from None
                time.sleep(_LOOK_S)
            except OSError:
                break  # a file system without locks
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a command is at work in a folder; on a file system without locks none is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def check_path(name: str, path: Path | str) -> None:
    """Refuse a path that fairseq's options cannot hold.

    Raises:
        ValueError: it cannot; names the flag or argument.
    """
    if match := _UNSAFE.search(os.path.abspath(path)):
        raise ValueError(f"{name}: got {str(path)!r}, expected a path without {match[0]!r}: fairseq would split it")


def _at_most(before: str, now: str) -> bool:
    try:
        return float(before) <= float(now)
    except ValueError:
        return False


def _short(value: str) -> str:
    return f"{value[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", value) else value
