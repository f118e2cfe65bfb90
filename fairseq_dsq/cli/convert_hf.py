"""Turn a Hugging Face encoder (BERT or RoBERTa family) into a folder that fairseq-train fine-tunes from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fairseq_dsq import artefact
from fairseq_dsq.glue import hf_encoder, hf_vocabulary
from fairseq_dsq.glue.encoder import ARCH, DICTIONARY, MODEL


def convert(source: Path, output: Path) -> tuple[list[str], list[str]]:
    """Write ``output``: model.pt, dict.txt, arch.args and the tokenizer's files.

    Returns:
        The flags in arch.args, and notes on what the source has beyond the converted model.

    Raises:
        ValueError, OSError: something is missing or cannot be mapped; ``output`` is then as it was.
    """
    if not (source / "config.json").is_file():
        raise OSError(f"{source}: expected a folder with config.json, weights and a vocabulary")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists already, expected a new or an empty folder")
    config = hf_encoder.read_config(source / "config.json")
    vocabulary = hf_vocabulary.read(source)
    path, tensors = hf_encoder.read_tensors(source)
    mapped, untied = hf_encoder.map_tensors(config, path, tensors, vocabulary.rows(config.vocabulary))
    flags = config.flags(untied)

    final = output.resolve()
    with artefact.atomic(final) as partial:
        partial.mkdir()
        files = {
            **vocabulary.files,
            DICTIONARY: vocabulary.dictionary(config.vocabulary),
            ARCH: " ".join(flags) + "\n",
        }
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        torch.save(hf_encoder.checkpoint(mapped, flags, partial / DICTIONARY, final), partial / MODEL)
        artefact.write(partial, {"SRC": artefact.content(source)})
    return flags, config.notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="folder with config.json, model.safetensors or pytorch_model.bin, and vocab.txt, vocab.json with "
        "merges.txt, or tokenizer.json",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")


def main(args: argparse.Namespace) -> int:
    flags, notes = convert(args.source, args.output)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {args.output}; fine-tune from {args.output / MODEL} with")
    print(" ".join(flags))
    return 0
