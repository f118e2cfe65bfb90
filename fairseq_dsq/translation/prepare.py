"""A parallel corpus in pieces, ready for fairseq-preprocess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.translation.corpus import SPLITS, Corpus, aligned, fits
from fairseq_dsq.translation.pieces import LEARN, SENTENCEPIECE, Cut, check_pieces


def settings(corpus: Corpus, vocab_size: int, pieces: str = SENTENCEPIECE) -> dict[str, str]:
    """What a prepared folder depends on: the corpus, its text, which pairs are left out, and the pieces.

    Raises:
        OSError: a file below $DSQ_DATA is missing.
    """
    sources = {name: artefact.checksum(path) for name, path in corpus.own_files().items()}
    limits = {name: str(value) for name in ("max_pieces", "max_ratio") if (value := getattr(corpus, name)) is not None}
    kind = {} if pieces == SENTENCEPIECE else {"--pieces": pieces}
    own = {"corpus": corpus.name, "--vocab": str(vocab_size), **kind, **limits}
    return own | (sources or {"text": "as published"})


def prepare(
    corpus: Corpus,
    folder: Path,
    vocab_size: int,
    downloads: Path | None = None,
    binarise: Callable[[Path], None] = lambda folder: None,
    pieces: str = SENTENCEPIECE,
) -> dict[str, tuple[int, int]]:
    """Write, for every split and language, raw.SPLIT.LANGUAGE and SPLIT.LANGUAGE, what the pieces are (spm.model or
    bpe.codes) and fairseq's dict.txt, one for both languages.

    Args:
        folder: to write to, new or empty; made whole or not at all.
        vocab_size: sentence pieces (BPE) of both languages together, or merges of subword-nmt's BPE.
        downloads: where archives are kept (default: beside ``folder``).
        binarise: is given the folder when these files are in it.
        pieces: a name in :data:`fairseq_dsq.translation.pieces.LEARN`.

    Returns:
        per split, the pairs that were written in pieces and those that were left out (of the training split alone).

    Raises:
        OSError, ValueError: as :meth:`Corpus.read` and :func:`check_pieces`, or ``folder`` holds something.
        RuntimeError: sentencepiece or subword-nmt refuses ``vocab_size``.
    """
    check_pieces(pieces)
    made_of = settings(corpus, vocab_size, pieces)
    with artefact.atomic(folder) as partial:
        partial.mkdir()
        counts = _write(corpus, partial, vocab_size, downloads or folder.parent / "downloads", pieces)
        binarise(partial)
        artefact.write(partial, made_of)
    return counts


def _write(corpus: Corpus, folder: Path, vocab_size: int, downloads: Path, pieces: str) -> dict[str, tuple[int, int]]:
    for split in SPLITS:
        sides = [folder / f"raw.{split}.{language}" for language in corpus.languages]
        with open(sides[0], "w", encoding="utf-8") as source, open(sides[1], "w", encoding="utf-8") as target:
            for pair in corpus.read(split, downloads):
                # fairseq and sentencepiece disagree on what ends a line, so that none may be left within one.
                source.write(" ".join(pair[0].split()) + "\n")
                target.write(" ".join(pair[1].split()) + "\n")
    cut = LEARN[pieces]([folder / f"raw.train.{language}" for language in corpus.languages], folder, vocab_size)
    return {split: _encode(corpus, folder, split, cut) for split in SPLITS}


def _encode(corpus: Corpus, folder: Path, split: str, cut: Cut) -> tuple[int, int]:
    kept = left_out = 0
    raw = [folder / f"raw.{split}.{language}" for language in corpus.languages]
    sides = [folder / f"{split}.{language}" for language in corpus.languages]
    with open(sides[0], "w", encoding="utf-8") as source, open(sides[1], "w", encoding="utf-8") as target:
        for pair in aligned(*raw):
            encoded = [cut(line) for line in pair]
            lengths = len(encoded[0]), len(encoded[1])
            if split == "train" and not fits(*lengths, corpus.max_pieces, corpus.max_ratio):
                left_out += 1
                continue
            kept += 1
            source.write(" ".join(encoded[0]) + "\n")
            target.write(" ".join(encoded[1]) + "\n")
    return kept, left_out
