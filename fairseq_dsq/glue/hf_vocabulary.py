"""The vocabulary of a Hugging Face tokenizer as a fairseq dictionary, and the files that a tokenizer needs of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_dsq.glue.encoder import SPECIAL_TOKENS
from fairseq_dsq.text import printable, quoted, shortened

# fairseq's own symbols: the first four are a dictionary's first, tasks put <mask> behind its last.
SPECIAL = {"<s>": "cls_token", "<pad>": "pad_token", "</s>": "sep_token", "<unk>": "unk_token", "<mask>": "mask_token"}
WORDPIECE_NAMES = {symbol: token for token, symbol in SPECIAL_TOKENS.items()}
BPE_NAMES = {symbol: symbol for symbol in SPECIAL}
CONTINUATION = "##"
BPE_HEADER = "#version: 0.2"


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as fairseq sees it.

    Attributes:
        words: the dictionary's words by the source's token id; ids may be left out.
        special: the source's token id of each of fairseq's own symbols.
        files: name and text of the files that the tokenizer needs.
        source: where it comes from, for messages.
    """

    words: Mapping[int, str]
    special: Mapping[str, int]
    files: Mapping[str, str]
    source: Path

    def rows(self, size: int) -> list[int]:
        """The source's token id of each entry of fairseq's dictionary, <mask> last.

        Raises:
            ValueError: a token whose id is not below ``size``, the rows of the embedding.
        """
        if (last := max(self.words)) >= size:
            raise ValueError(f"{self.source}: token {self.words[last]!r} has id {last}, expected less than {size}")
        first, mask = list(self.special.values())[:-1], self.special["<mask>"]
        taken = {*first, mask}
        return [*first, *(token for token in range(size) if token not in taken), mask]

    def dictionary(self, size: int) -> str:
        """fairseq's dict.txt for an embedding of ``size`` rows; one without a token is a word that no text has."""
        taken = set(self.words.values())
        fillers = (word for word in map("madeupword{:04d}".format, range(size + len(taken))) if word not in taken)
        lines = []
        for token in self.rows(size)[len(SPECIAL) - 1 : -1]:
            lines.append(f"{self.words[token]} 1\n" if token in self.words else f"{next(fillers)} 0\n")
        return "".join(lines)


def read(folder: Path) -> Vocabulary:
    """The vocabulary in a folder: vocab.txt, or vocab.json and merges.txt, or tokenizer.json.

    Raises:
        ValueError: none of them, or one that is not WordPiece or GPT-2's byte-pair encoding; names the file.
    """
    try:
        return _read(folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = shortened(printable(f"{type(error).__name__}: {error}"))
        raise ValueError(f"{folder}: its vocabulary is not as transformers writes one: {reason}") from None


def _read(folder: Path) -> Vocabulary:
    fast = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= read_json(folder / name)
    added = {entry["content"]: entry["id"] for entry in fast.get("added_tokens", ())}
    if (folder / "added_tokens.json").is_file():
        added |= read_json(folder / "added_tokens.json")
    model = fast.get("model", {})
    if (path := folder / "vocab.txt").is_file():
        return _wordpiece(path, _lines(path), added, config, fast)
    if (path := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = read_text(folder / "merges.txt").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return _bpe(path, read_json(path), merges, added, config)
    path = folder / "tokenizer.json"
    kind = model.get("type")
    if kind == "WordPiece":
        return _wordpiece(path, model.get("vocab", {}), added, config, fast)
    if kind == "BPE":
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
        return _bpe(path, model.get("vocab", {}), merges, added, config)
    if kind is not None:
        raise ValueError(f"{path}: model type: got {quoted(kind)}, expected WordPiece or BPE")
    raise ValueError(f"{folder}: found none of vocab.txt, vocab.json with merges.txt, tokenizer.json")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ValueError: it is not UTF-8; OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: not JSON, or not an object; OSError: it cannot be read.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a {type(value).__name__}, expected an object")
    return value


def _lines(path: Path) -> dict[str, int]:
    """Tokens and their ids: one a line, from 0. Not splitlines(), which knows more line ends than WordPiece does."""
    ids: dict[str, int] = {}
    for number, token in enumerate(read_text(path).removesuffix("\n").split("\n")):
        if token in ids:
            raise ValueError(f"{path}:{number + 1}: {token!r} stands in line {ids[token] + 1} already")
        ids[token] = number
    return ids


def _merge(path: Path, ids: Mapping[str, int], added: Mapping[str, int]) -> dict[str, int]:
    """The ids of a vocabulary's tokens and of those that were added to it."""
    merged, owner = {**ids, **added}, dict[int, str]()
    for token, number in merged.items():
        if not isinstance(number, int) or number < 0 or number in owner:
            raise ValueError(f"{path}: token {token!r}: got id {number!r}, expected an integer >= 0 of its own")
        owner[number] = token
    return merged


def _special(path: Path, ids: Mapping[str, int], config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    special = {}
    for symbol, key in SPECIAL.items():
        name = config.get(key) or names[symbol]
        token = name["content"] if isinstance(name, dict) else name
        if token not in ids:
            raise ValueError(f"{path}: lacks {key} {token!r}")
        special[symbol] = ids[token]
    if len(set(special.values())) < len(special):
        raise ValueError(f"{path}: special tokens {special}, expected five of different ids")
    return special


def _wordpiece(
    path: Path, ids: Mapping[str, int], added: Mapping[str, int], config: Mapping[str, Any], fast: Mapping[str, Any]
) -> Vocabulary:
    continuation = fast.get("model", {}).get("continuing_subword_prefix", CONTINUATION)
    if continuation != CONTINUATION:
        raise ValueError(f"{path}: continuing_subword_prefix: got {continuation!r}, expected {CONTINUATION!r}")
    ids = _merge(path, ids, added)
    special = _special(path, ids, config, WORDPIECE_NAMES)
    words = {token: word for word, token in ids.items()}
    for token, word in words.items():
        if word in SPECIAL and token not in special.values():
            raise ValueError(f"{path}: token {word!r} is a symbol of fairseq's dictionary")
    normalizer = fast.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        normalizer = {}
    settings = {
        "tokenizer_class": "BertTokenizer",
        # BertTokenizer's own defaults come last.
        "do_lower_case": config.get("do_lower_case", normalizer.get("lowercase", True)),
        "strip_accents": config.get("strip_accents", normalizer.get("strip_accents")),
        "tokenize_chinese_chars": config.get("tokenize_chinese_chars", normalizer.get("handle_chinese_chars", True)),
        **{key: words[special[symbol]] for symbol, key in SPECIAL.items()},
    }
    lines = (words.get(token, f"[unused-id-{token}]") for token in range(max(words) + 1))
    files = {"vocab.txt": _text(lines), "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    return Vocabulary(words, special, files, path)


def _bpe(
    path: Path, ids: Mapping[str, int], merges: Iterable[str], added: Mapping[str, int], config: Mapping[str, Any]
) -> Vocabulary:
    """GPT-2's byte-pair encoding: fairseq's words are the numbers that its encoder.json gives the tokens."""
    ids = _merge(path, ids, added)
    files = {"encoder.json": json.dumps(ids), "vocab.bpe": _text([BPE_HEADER, *merges])}
    return Vocabulary(
        {token: str(token) for token in ids.values()}, _special(path, ids, config, BPE_NAMES), files, path
    )


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
