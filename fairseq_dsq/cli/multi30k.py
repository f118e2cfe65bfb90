"""Fetch Multi30k task 1 (German-English) and cut it into sentence pieces."""

from __future__ import annotations

import argparse
import gzip
import os
import sys
from pathlib import Path

import sentencepiece

from fairseq_dsq.download import download

URL = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d/data/task1/raw/"
# sha256 of the compressed files at that commit.
SHA256 = {
    "train.de": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
}
FOLDER = "multi30k"


def fetch(name: str, folder: Path) -> Path:
    """The plain-text file ``name``: from $DSQ_DATA/multi30k where that is set, else downloaded and verified.

    Raises:
        OSError: it cannot be read or downloaded; ValueError: its checksum differs.
    """
    if data := os.environ.get("DSQ_DATA"):
        path = Path(data) / FOLDER / name
        if not path.is_file():
            raise OSError(f"DSQ_DATA: {path} does not exist, expected Multi30k's {name}")
        return path
    path = folder / name
    if not path.exists():
        hint = f"set DSQ_DATA to a folder that holds {FOLDER}/{name}"
        compressed = download(f"{URL}{name}.gz", folder / f"{name}.gz", SHA256[name], hint)
        partial = path.with_suffix(path.suffix + ".part")
        partial.write_bytes(gzip.decompress(compressed.read_bytes()))
        partial.rename(path)
        compressed.unlink()
    return path


def prepare(folder: Path, vocab_size: int) -> None:
    """Write raw.* and spm-encoded train, valid and test files, spm.model and fairseq's dict.txt into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {name: fetch(name, folder) for name in SHA256}
    sentencepiece.SentencePieceTrainer.train(
        input=[str(raw["train.de"]), str(raw["train.en"])],
        model_prefix=str(folder / "spm"),
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    # fairseq has its own <unk>, <s> and </s>.
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test_2016_flickr")):
        for language in ("de", "en"):
            text = raw[f"{name}.{language}"].read_text(encoding="utf-8")
            (folder / f"raw.{split}.{language}").write_text(text, encoding="utf-8")
            lines = (" ".join(processor.encode(line, out_type=str)) for line in text.splitlines())
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--vocab", type=int, default=4000, help="joint sentence pieces (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    try:
        prepare(args.folder, args.vocab)
    except RuntimeError as error:  # sentencepiece's own checks
        print(f"fairseq-dsq multi30k: error: argument --vocab: got {args.vocab}: {error}", file=sys.stderr)
        return 2
    print(f"wrote train, valid and test in {args.vocab} sentence pieces to {args.folder}")
    return 0
