"""Encoder folders: a pretrained checkpoint with its dictionary, architecture flags and tokenizer.

model.pt   a fairseq checkpoint
dict.txt   its dictionary
arch.args  one line of fairseq-train flags; without it, ``--arch roberta_dsq``
vocab.txt  WordPiece (BERT), with an optional tokenizer_config.json; without it GPT-2 BPE (RoBERTa): encoder.json and
           vocab.bpe from the folder, from $DSQ_DATA/gpt2_bpe, or downloaded
"""

from __future__ import annotations

import json
import shlex
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_dsq.artefact import atomic
from fairseq_dsq.download import data_root, download

MODEL, DICTIONARY, ARCH = "model.pt", "dict.txt", "arch.args"
DEFAULT_ARCH = ("--arch", "roberta_dsq")
_MODELS_URL = "https://dl.fbaipublicfiles.com/fairseq/models/"
DOWNLOADABLE = {"roberta.base": DEFAULT_ARCH, "roberta.large": ("--arch", "roberta_dsq_large")}
DEFAULT_ENCODER = "roberta.base"

_VOCAB, _TOKENIZER_CONFIG = "vocab.txt", "tokenizer_config.json"
_BPE_FILES = ("encoder.json", "vocab.bpe")
_BPE_FOLDER, _BPE_URL = "gpt2_bpe", "https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/"
UNKNOWN = "<unk>"
# BERT's special tokens, as fairseq calls them.
SPECIAL_TOKENS = {"[CLS]": "<s>", "[PAD]": "<pad>", "[SEP]": "</s>", "[UNK]": UNKNOWN, "[MASK]": "<mask>"}


@dataclass(frozen=True)
class Tokenizer:
    """Text to the symbols of a fairseq dictionary.

    Attributes:
        name: wordpiece or gpt2.
        files: what it was read from.
        doubles_separator: whether a pair is ``<s> a </s></s> b </s>``, as RoBERTa was pretrained, or BERT's
            ``<s> a </s> b </s>``.
        encode: the symbols of each text, without <s> and </s>.
    """

    name: str
    files: tuple[Path, ...]
    doubles_separator: bool
    encode: Callable[[Sequence[str]], list[list[str]]]


@dataclass(frozen=True)
class Encoder:
    """A folder with a pretrained encoder; the files that every one has are there.

    Attributes:
        folder: where it is.
        default_arch: flags of fairseq-train where the folder has no arch.args.
    """

    folder: Path
    default_arch: tuple[str, ...] = DEFAULT_ARCH

    def __post_init__(self) -> None:
        for name in (MODEL, DICTIONARY):
            if not (self.folder / name).is_file():
                raise OSError(f"{self.folder}: has no {name}, expected an encoder folder with {MODEL} and {DICTIONARY}")

    def arch_flags(self) -> list[str]:
        """The flags of fairseq-train that build the model.

        Raises:
            ValueError: arch.args is not one line of flags.
        """
        path = self.folder / ARCH
        if not path.exists():
            return list(self.default_arch)
        text = path.read_text(encoding="utf-8").strip()
        if not text.startswith("--") or "\n" in text:
            raise ValueError(f"{path}: got {text[:60]!r}, expected one line of flags that begins with --")
        return shlex.split(text)


def find(name: str, downloads: Path) -> Encoder:
    """The encoder in the folder ``name``, or a published one of that name, downloaded below ``downloads``.

    Raises:
        OSError: no such folder, a file of it is missing, or it cannot be fetched.
        ValueError: a download that is no archive.
    """
    folder = Path(name)
    if folder.is_dir():
        return Encoder(folder)
    if name not in DOWNLOADABLE:
        raise OSError(f"got {name!r}, expected an encoder folder or one of {', '.join(DOWNLOADABLE)}")
    folder = downloads / name
    if not folder.is_dir():
        archive = downloads / f"{name}.tar.gz"
        download(f"{_MODELS_URL}{archive.name}", archive, hint="give a folder with an encoder")
        try:
            with atomic(folder) as partial, tarfile.open(archive, "r:gz") as content:
                content.extractall(partial.parent, filter="data")  # which holds a folder of this name
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"{archive}: {error}, expected a .tar.gz archive of the folder {name}") from None
        finally:
            archive.unlink(missing_ok=True)
    return Encoder(folder, DOWNLOADABLE[name])


def tokenizer(encoder: Encoder, downloads: Path) -> Tokenizer:
    """The tokenizer that belongs to an encoder.

    Raises:
        OSError: a file cannot be read or fetched.
        ValueError: a file that is no vocabulary, or the package ``tokenizers`` is missing.
    """
    if (encoder.folder / _VOCAB).is_file():
        return _wordpiece(encoder.folder)
    folder = encoder.folder
    if not all((folder / name).is_file() for name in _BPE_FILES):
        own = data_root(_BPE_FOLDER, f"GPT-2's {' and '.join(_BPE_FILES)}")
        folder = own or downloads / _BPE_FOLDER
        if own is None:
            hint = f"or put {' and '.join(_BPE_FILES)} (GPT-2 BPE) or {_VOCAB} (WordPiece) into {encoder.folder}"
            for name in _BPE_FILES:
                download(_BPE_URL + name, folder / name, hint=hint)
    return _gpt2(folder)


def _wordpiece(folder: Path) -> Tokenizer:
    implementations = _implementations()
    vocab, config = folder / _VOCAB, folder / _TOKENIZER_CONFIG
    known = set(vocab.read_text(encoding="utf-8").split("\n"))
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    if missing:
        raise ValueError(f"{vocab}: lacks {', '.join(missing)}, expected a WordPiece vocabulary, one entry a line")
    settings = _settings(config) if config.is_file() else {}
    wordpiece = implementations.BertWordPieceTokenizer(
        str(vocab),
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )

    def encode(texts: Sequence[str]) -> list[list[str]]:
        encodings = wordpiece.encode_batch(list(texts), add_special_tokens=False)
        return [[SPECIAL_TOKENS.get(token, token) for token in encoding.tokens] for encoding in encodings]

    return Tokenizer("wordpiece", (vocab, *([config] if config.is_file() else [])), False, encode)


def _settings(config: Path) -> dict[str, bool | None]:
    """The three settings of BERT's tokenizer that matter."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        settings = {name: values.get(name) for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{config}: expected a JSON object ({error})") from None
    for name, value in settings.items():
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{config}: {name}: got {value!r}, expected true or false")
    return {name: value for name, value in settings.items() if value is not None}


def _gpt2(folder: Path) -> Tokenizer:
    implementations = _implementations()
    vocab, merges = (folder / name for name in _BPE_FILES)
    try:
        bpe = implementations.ByteLevelBPETokenizer(str(vocab), str(merges))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(
            f"{folder}: {' '.join(str(error).split())}, expected GPT-2's {' and '.join(_BPE_FILES)}"
        ) from None

    def encode(texts: Sequence[str]) -> list[list[str]]:
        return [[str(index) for index in encoding.ids] for encoding in bpe.encode_batch(list(texts))]

    return Tokenizer("gpt2", (vocab, merges), True, encode)


def _implementations() -> Any:
    try:
        from tokenizers import implementations
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install '.[glue]' in the clone") from None
    return implementations
