"""A text for language modelling: split into train, valid and test, cut into sentence pieces."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from fairseq_dsq import artefact
from fairseq_dsq.translation.corpus import SPLITS, lines
from fairseq_dsq.translation.pieces import learn_pieces

# Which lines are held out, whatever seed trains: perplexities of other seeds are of the same lines.
_SPLIT_SEED = 1
# Bytes of the longest line that pieces are learnt from. sentencepiece's own 4,192 would leave documents out.
_LONGEST_LINE = 1 << 24


def settings(text: Path, vocab_size: int, held_out: float) -> dict[str, str]:
    """What a prepared folder depends on.

    Raises:
        OSError: the text cannot be read.
    """
    return {"text": artefact.checksum(text), "--vocab": str(vocab_size), "--held-out": str(held_out)}


def split(count: int, held_out: float) -> list[str]:
    """The split of each of ``count`` lines: valid and test have a share ``held_out`` each, drawn at random, at least 1.

    Raises:
        ValueError: too few lines for three splits.
    """
    each = max(1, round(count * held_out))
    if count <= 2 * each:
        raise ValueError(f"got {count} lines that are not empty, expected more than {2 * each}, for valid and test")
    found = ["train"] * count
    for number, line in enumerate(random.Random(_SPLIT_SEED).sample(range(count), 2 * each)):
        found[line] = "valid" if number < each else "test"
    return found


def prepare(
    text: Path,
    folder: Path,
    vocab_size: int,
    held_out: float,
    binarise: Callable[[Path], None] = lambda folder: None,
) -> dict[str, int]:
    """Write raw.SPLIT and, in sentence pieces, SPLIT of train, valid and test, spm.model and fairseq's dict.txt.

    Pieces are learnt from train alone. Empty lines are left out; of the others the order is kept.

    Args:
        text: UTF-8, a document or a sentence a line.
        folder: to write to, new or empty; made whole or not at all.
        vocab_size: sentence pieces (BPE).
        held_out: share of the lines that valid and test have, each.
        binarise: is given the folder when these files are in it.

    Returns:
        The lines of each split.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the text is not UTF-8, or too short.
        RuntimeError: sentencepiece refuses ``vocab_size``.
    """
    made_of = settings(text, vocab_size, held_out)
    try:
        splits = split(sum(1 for line in lines(text) if line), held_out)
    except ValueError as error:
        raise error if str(error).startswith(str(text)) else ValueError(f"{text}: {error}") from None
    with artefact.atomic(folder) as partial:
        partial.mkdir()
        raw = {name: open(partial / f"raw.{name}", "w", encoding="utf-8") for name in SPLITS}  # noqa: SIM115
        try:
            for name, line in zip(splits, (line for line in lines(text) if line), strict=True):
                # fairseq and sentencepiece disagree on what ends a line, so that none may be left within one.
                raw[name].write(" ".join(line.split()) + "\n")
        finally:
            for file in raw.values():
                file.close()
        processor = learn_pieces([partial / "raw.train"], partial, vocab_size, max_sentence_length=_LONGEST_LINE)
        for name in SPLITS:
            with open(partial / name, "w", encoding="utf-8") as output:
                for line in lines(partial / f"raw.{name}"):
                    output.write(" ".join(processor.encode(line, out_type=str)) + "\n")
        binarise(partial)
        artefact.write(partial, made_of)
    return {name: splits.count(name) for name in SPLITS}
