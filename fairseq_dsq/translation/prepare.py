"""A parallel corpus in sentence pieces, ready for fairseq-preprocess."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from fairseq_dsq import artefact
from fairseq_dsq.translation.corpus import SPLITS, Corpus, aligned

# Sentences that the pieces are learnt from, at most, drawn from both languages.
PIECE_SENTENCES = 2_000_000
# fairseq's dictionary brings its own <unk>, <s> and </s>.
_SPECIAL_PIECES = 3


def settings(corpus: Corpus, vocab_size: int) -> dict[str, str]:
    """What a prepared folder depends on: the corpus, its text and the number of sentence pieces.

    Raises:
        OSError: a file below $DSQ_DATA is missing.
    """
    sources = {path.name: artefact.checksum(path) for path in corpus.own_files()}
    return {"corpus": corpus.name, "--vocab": str(vocab_size), **(sources or {"text": "as published"})}


def prepare(
    corpus: Corpus,
    folder: Path,
    vocab_size: int,
    downloads: Path | None = None,
    binarise: Callable[[Path], None] = lambda folder: None,
) -> dict[str, tuple[int, int]]:
    """Write, for every split and language, raw.SPLIT.LANGUAGE and SPLIT.LANGUAGE, spm.model and fairseq's dict.txt.

    Args:
        folder: to write to, new or empty; made whole or not at all.
        vocab_size: sentence pieces (BPE) of both languages together.
        downloads: where archives are kept (default: beside ``folder``).
        binarise: is given the folder when these files are in it.

    Returns:
        per split, the pairs that were written in pieces and those that were left out (of the training split alone).

    Raises:
        OSError, ValueError: as :meth:`Corpus.read`, or ``folder`` holds something.
        RuntimeError: sentencepiece refuses ``vocab_size``.
    """
    made_of = settings(corpus, vocab_size)
    with artefact.atomic(folder) as partial:
        partial.mkdir()
        counts = _write(corpus, partial, vocab_size, downloads or folder.parent / "downloads")
        binarise(partial)
        artefact.write(partial, made_of)
    return counts


def _write(corpus: Corpus, folder: Path, vocab_size: int, downloads: Path) -> dict[str, tuple[int, int]]:
    for split in SPLITS:
        sides = [folder / f"raw.{split}.{language}" for language in corpus.languages]
        with open(sides[0], "w", encoding="utf-8") as source, open(sides[1], "w", encoding="utf-8") as target:
            for pair in corpus.read(split, downloads):
                # fairseq and sentencepiece disagree on what ends a line, so that none may be left within one.
                source.write(" ".join(pair[0].split()) + "\n")
                target.write(" ".join(pair[1].split()) + "\n")
    processor = learn_pieces([folder / f"raw.train.{language}" for language in corpus.languages], folder, vocab_size)
    return {split: _encode(corpus, folder, split, processor) for split in SPLITS}


def learn_pieces(files: Sequence[Path], folder: Path, vocab_size: int, **options: Any) -> Any:
    """Learn ``vocab_size`` sentence pieces (BPE) of the files together: spm.model and fairseq's dict.txt in ``folder``.

    Args:
        options: more of sentencepiece's.

    Returns:
        The processor, whose ``encode`` cuts a line into pieces.

    Raises:
        RuntimeError: sentencepiece refuses ``vocab_size``.
    """
    sentencepiece.SentencePieceTrainer.train(
        input=[str(file) for file in files],
        model_prefix=str(folder / "spm"),
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        input_sentence_size=PIECE_SENTENCES,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [processor.id_to_piece(index) for index in range(_SPECIAL_PIECES, processor.get_piece_size())]
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    return processor


def _encode(
    corpus: Corpus, folder: Path, split: str, processor: sentencepiece.SentencePieceProcessor
) -> tuple[int, int]:
    kept = left_out = 0
    raw = [folder / f"raw.{split}.{language}" for language in corpus.languages]
    sides = [folder / f"{split}.{language}" for language in corpus.languages]
    with open(sides[0], "w", encoding="utf-8") as source, open(sides[1], "w", encoding="utf-8") as target:
        for pair in aligned(*raw):
            encoded = [processor.encode(line, out_type=str) for line in pair]
            if split == "train" and not _fits(corpus, *map(len, encoded)):
                left_out += 1
                continue
            kept += 1
            source.write(" ".join(encoded[0]) + "\n")
            target.write(" ".join(encoded[1]) + "\n")
    return kept, left_out


def _fits(corpus: Corpus, source: int, target: int) -> bool:
    """Whether a training pair of these lengths is kept, as Moses' clean-corpus-n.perl keeps it."""
    shorter, longer = sorted((source, target))
    if shorter < 1 or (corpus.max_pieces is not None and longer > corpus.max_pieces):
        return False
    return corpus.max_ratio is None or longer <= corpus.max_ratio * shorter
