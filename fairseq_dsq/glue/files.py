"""Where a task's files are: in a folder that is given, below $DSQ_DATA, or downloaded."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fairseq_dsq.artefact import atomic
from fairseq_dsq.download import data_root, download
from fairseq_dsq.glue.tasks import MRPC_DEV_IDS, TRAIN_FILES, GlueTask

FOLDER = "glue"


@dataclass(frozen=True)
class Files:
    """A task's TSV files.

    Attributes:
        train: the training set.
        dev: the development sets that are there, in the task's order, by what their scores' names end in.
    """

    train: Path
    dev: dict[str, Path]


def find(task: GlueTask, folder: Path | None, downloads: Path) -> Files:
    """The files in ``folder``; if that is None, in $DSQ_DATA/glue/TASK, or else downloaded below ``downloads``.

    Raises:
        OSError: a file is missing, or cannot be fetched; the message names it.
        ValueError: a download is not what was published.
    """
    if folder is None:
        folder = data_root(f"{FOLDER}/{task.name}", f"{task.name}'s TSV files") or fetch(task, downloads)
    train = next((folder / name for name in TRAIN_FILES if (folder / name).is_file()), None)
    if train is None:
        raise OSError(f"{folder}: has no {' or '.join(TRAIN_FILES)}, expected {task.name}'s training set")
    dev = {suffix: folder / name for name, suffix in task.dev if (folder / name).is_file()}
    name, suffix = task.dev[0]
    if suffix not in dev:
        raise OSError(f"{folder}: has no {name}, expected {task.name}'s development set")
    return Files(train, dev)


def fetch(task: GlueTask, downloads: Path) -> Path:
    """Download a task; returns the folder of its files.

    Raises:
        OSError: it cannot be fetched or written.
        ValueError: it is not what was published.
    """
    folder = downloads / task.name
    if folder.is_dir():
        return folder
    hint = f"give its folder by --data, or set DSQ_DATA to a folder that holds {FOLDER}/{task.name}"
    url = task.archive.url
    archive = download(url, downloads / url.rpartition("/")[2], task.archive.sha256, hint)
    with atomic(folder) as partial:
        partial.mkdir()
        if archive.suffix == ".zip":
            _unzip(
                archive, {f"{task.name}/{name}" for name in (TRAIN_FILES[0], *(name for name, _ in task.dev))}, partial
            )
        else:
            ids = download(MRPC_DEV_IDS.url, downloads / "mrpc_dev_ids.tsv", MRPC_DEV_IDS.sha256, hint)
            _split_mrpc(archive, ids, partial)
    archive.unlink(missing_ok=True)
    return folder


def _unzip(archive: Path, names: set[str], folder: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        for name in names.intersection(content.namelist()):
            with content.open(name) as source, open(folder / Path(name).name, "wb") as target:
                shutil.copyfileobj(source, target)


def _split_mrpc(corpus: Path, ids: Path, folder: Path) -> None:
    """As GLUE's download script does: rows whose two ids are listed are the dev set, all others the training set."""
    with open(ids, "rb") as file:
        dev_ids = {tuple(line.rstrip().split(b"\t")) for line in file}
    with open(corpus, "rb") as rows, open(folder / "train.tsv", "wb") as train, open(folder / "dev.tsv", "wb") as dev:
        header = next(rows)
        train.write(header)
        dev.write(header)
        for row in rows:
            (dev if tuple(row.split(b"\t")[1:3]) in dev_ids else train).write(row)
