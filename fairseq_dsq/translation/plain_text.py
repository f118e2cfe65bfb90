"""A corpus of one's own: plain text below $DSQ_DATA, described by a recipe's ``corpus``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from fairseq_dsq import data_files
from fairseq_dsq.translation.corpus import Corpus, Pairs


@dataclass
class PlainText:
    """Aligned files, a sentence a line: ``FILE.LANGUAGE`` of each split.

    Attributes:
        source, target: languages.
        folder: below $DSQ_DATA.
        train, valid, test: FILE of each split.
        max_pieces: longer training pairs (on either side, in sentence pieces) are left out.
        max_ratio: training pairs with so unlike lengths are left out.
    """

    source: str
    target: str
    folder: str
    train: str = "train"
    valid: str = "valid"
    test: str = "test"
    max_pieces: int | None = None
    max_ratio: float | None = None


def load_plain_text(name: str, known: Iterable[str]) -> Corpus:
    """The corpus that the mapping ``corpus`` of a YAML file describes, by the file's name.

    Raises:
        ValueError: no such file, or no such mapping in it; ``known`` are names that would have done.
    """
    path = Path(name)
    if path.suffix != data_files.SUFFIX or not path.is_file():
        raise ValueError(f"got {name!r}, expected {', '.join(known)} or the path of a {data_files.SUFFIX} file")
    described = data_files.read(path).get("corpus")
    if not isinstance(described, DictConfig):
        raise ValueError(f"{path}: corpus: got {described!r}, expected a mapping with source, target and folder")
    text = data_files.build(PlainText, described, path)
    corpus = Corpus(
        name=path.stem, source=text.source, target=text.target, folder=text.folder, published={},
        pairs=lambda split, downloads: _not_published(corpus),
        files=cast(Mapping[str, Any], {"train": text.train, "valid": text.valid, "test": text.test}),
        max_pieces=text.max_pieces, max_ratio=text.max_ratio,
    )  # fmt: skip
    return corpus


def _not_published(corpus: Corpus) -> Pairs:
    raise OSError(f"{corpus.name}: {corpus.hint}")
