"""What a parallel corpus is, and how its archives are read."""

from __future__ import annotations

import itertools
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from fairseq_dsq.artefact import atomic
from fairseq_dsq.download import data_root

SPLITS = ("train", "valid", "test")

Pairs = Iterable[tuple[str, str]]

_SEGMENT = re.compile(r"<seg [^>]*>(.*)</seg>")


@dataclass(frozen=True)
class Corpus:
    """A parallel corpus.

    Attributes:
        name: what commands call it.
        source: its source language.
        target: its target language.
        folder: its folder below $DSQ_DATA.
        published: per split, the number of pairs that was published of it, which a download must have.
        pairs: ``(split, downloads) -> pairs``: the text from the public source, fetched below ``downloads``.
        files: per split, the name of its plain-text files below $DSQ_DATA, ``FILE.LANGUAGE``.
        max_pieces: longer training pairs (on either side, in sentence pieces) are left out; None: none are.
        max_ratio: training pairs with so unlike lengths are left out; None: none are.
    """

    name: str
    source: str
    target: str
    folder: str
    published: Mapping[str, int]
    pairs: Callable[[str, Path], Pairs]
    files: Mapping[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    max_pieces: int | None = None
    max_ratio: float | None = None

    @property
    def languages(self) -> tuple[str, str]:
        return self.source, self.target

    @property
    def hint(self) -> str:
        """What to do where its source cannot be reached."""
        return f"set DSQ_DATA to a folder that holds {self.folder}/{self.files['train']}.{self.source} and the others"

    def read(self, split: str, downloads: Path) -> Pairs:
        """The pairs of a split: from $DSQ_DATA where that is set, else from the public source.

        Raises (also while the pairs are taken):
            OSError: a file cannot be read or fetched.
            ValueError: a download is not what was published, or the two sides differ in length.
        """
        paths = self.own_files([split])
        return aligned(*paths.values()) if paths else self._verified(split, downloads)

    def own_files(self, splits: Sequence[str] = SPLITS) -> dict[str, Path]:
        """The files of these splits by their names below $DSQ_DATA, source before target; none where it is not set.

        Raises:
            OSError: one does not exist.
        """
        names = (f"{self.files[split]}.{language}" for split, language in itertools.product(splits, self.languages))
        found = {name: data_root(f"{self.folder}/{name}", f"{self.name}'s text") for name in names}
        return {name: path for name, path in found.items() if path}

    def _verified(self, split: str, downloads: Path) -> Iterator[tuple[str, str]]:
        count = 0
        for pair in self.pairs(split, downloads):
            count += 1
            yield pair
        if count != self.published.get(split, count):
            raise ValueError(f"{self.name}: got {count} {split} pairs, expected {self.published[split]}")


def lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, each without whitespace around it; only a line feed ends one.

    Raises:
        ValueError: not UTF-8; names the file.
    """
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            for line in file:
                yield line.strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error.reason}") from None


def segments(path: Path) -> Iterator[str]:
    """The text of the ``<seg>`` elements, one a line, of a NIST XML file, which need not be well-formed XML."""
    for line in lines(path):
        if match := _SEGMENT.match(line):
            yield match[1].strip()


def aligned(*files: Path, read: Callable[[Path], Iterator[str]] = lines) -> Iterator[tuple[str, str]]:
    """The pairs of two files, source and target, that correspond line by line.

    Raises:
        ValueError: one is longer than the other; names both.
    """
    source, target = files
    for first, second in itertools.zip_longest(read(source), read(target)):
        if first is None or second is None:
            raise ValueError(f"{source}, {target}: got unlike numbers of lines, expected as many in both")
        yield first, second


def fits(source: int, target: int, longest: int | None, ratio: float | None) -> bool:
    """Whether a training pair of these lengths is kept, as Moses' clean-corpus-n.perl keeps it; None sets no limit."""
    shorter, longer = sorted((source, target))
    if shorter < 1 or (longest is not None and longer > longest):
        return False
    return ratio is None or longer <= ratio * shorter


def extract(archive: Path, members: Iterable[str], folder: Path) -> list[Path]:
    """Members of a compressed tar archive below ``folder``, unless they are there already.

    Raises:
        OSError: one cannot be written.
        ValueError: the archive is broken or has no such member; names both.
    """
    paths = {member: folder / member for member in members}
    if not all(path.is_file() for path in paths.values()):
        try:
            with tarfile.open(archive) as content:
                for entry in content:
                    if entry.name in paths and entry.isfile():  # a link could lead to another file
                        with atomic(paths[entry.name]) as partial, open(partial, "wb") as file:
                            shutil.copyfileobj(cast(IO[bytes], content.extractfile(entry)), file)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise ValueError(f"{archive}: a broken archive: {error}") from None
        for member, path in paths.items():
            if not path.is_file():
                raise ValueError(f"{archive}: has no {member}")
    return list(paths.values())
