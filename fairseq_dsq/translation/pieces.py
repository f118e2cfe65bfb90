"""Pieces that words are cut into, learnt from both languages: of sentencepiece, or BPE as subword-nmt has it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from fairseq_dsq.translation.corpus import lines

DICTIONARY = "dict.txt"
# Sentences that sentence pieces are learnt from, at most, drawn from both languages.
PIECE_SENTENCES = 2_000_000
# fairseq's dictionary brings its own <unk>, <s> and </s>.
_SPECIAL_PIECES = 3

Cut = Callable[[str], list[str]]


def missing_extra(error: ImportError) -> ValueError:
    """The one line for a package of the extra ``translation`` that is not installed."""
    return ValueError(f"{error.name} is not installed: pip install '.[translation]' in the clone")


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
    (folder / DICTIONARY).write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    return processor


def learn_sentence_pieces(files: Sequence[Path], folder: Path, vocab_size: int) -> Cut:
    """What cuts a line into sentence pieces; files and errors as :func:`learn_pieces`."""
    processor = learn_pieces(files, folder, vocab_size)
    return lambda line: processor.encode(line, out_type=str)


def learn_bpe(files: Sequence[Path], folder: Path, merges: int) -> Cut:
    """What cuts the words of a line by the BPE of the files together, as fairseq's prepare-iwslt14.sh learns it.

    Writes bpe.codes, the merges, and dict.txt, the pieces of the files by frequency, to ``folder``.

    Args:
        merges: how many are learnt; with the characters they make the pieces.

    Raises:
        RuntimeError: the files have fewer merges.
    """
    from subword_nmt import apply_bpe
    from subword_nmt import learn_bpe as learning

    text = itertools.chain.from_iterable(map(lines, files))
    codes = folder / "bpe.codes"
    with open(codes, "w", encoding="utf-8") as file, contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        learning.learn_bpe(text, file, merges)
    with open(codes, encoding="utf-8") as file:
        found = sum(1 for _ in file) - 1
        if found < merges:
            raise RuntimeError(f"the text has {found} merges that occur twice, expected as many")
        file.seek(0)
        bpe = apply_bpe.BPE(file)

    def cut(line: str) -> list[str]:
        return str(bpe.segment(line)).split()

    counts = Counter(piece for file in files for line in lines(file) for piece in cut(line))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    (folder / DICTIONARY).write_text("".join(f"{piece} {count}\n" for piece, count in ranked), encoding="utf-8")
    return cut


SENTENCEPIECE, BPE = "sentencepiece", "bpe"
LEARN: dict[str, Callable[[Sequence[Path], Path, int], Cut]] = {SENTENCEPIECE: learn_sentence_pieces, BPE: learn_bpe}
# What fairseq-generate calls the pieces that it is to join (--remove-bpe).
JOINED_BY = {SENTENCEPIECE: "sentencepiece", BPE: "subword_nmt"}


def check_pieces(kind: str) -> None:
    """Refuse a kind of :data:`LEARN` that cannot be learnt here.

    Raises:
        ValueError: its package is not installed.
    """
    if kind == BPE and importlib.util.find_spec("subword_nmt") is None:
        raise missing_extra(ImportError(name="subword_nmt"))
