"""IWSLT 2014's TED talks, German to English, as fairseq's examples/translation/prepare-iwslt14.sh makes them.

Moses-tokenised (by sacremoses) and lower-case; every 23rd training pair validates, and five of the evaluations' sets
test. What lies below $DSQ_DATA is so prepared already.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fairseq_dsq.download import download
from fairseq_dsq.translation.corpus import Corpus, aligned, extract, fits, segments
from fairseq_dsq.translation.pieces import missing_extra

URL = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
TEST = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
VALID_EVERY = 23
MOST_TOKENS, MOST_RATIO = 175, 1.5
_LEFT_OUT = ("<url>", "<talkid>", "<keywords>")
_TAGS = re.compile("</?(title|description)>")


def pairs(split: str, downloads: Path) -> Iterator[tuple[str, str]]:
    """The pairs of a split, downloaded; errors as :func:`download`, :func:`extract` and :func:`aligned`.

    Raises:
        ValueError: besides, sacremoses is not installed.
    """
    prepare = [tokenizer(language) for language in CORPUS.languages]
    archive = download(URL, downloads / "iwslt14.de-en.tgz", hint=CORPUS.hint)
    if split == "test":
        for name in TEST:
            members = [f"de-en/IWSLT14.{name}.de-en.{language}.xml" for language in CORPUS.languages]
            for source, target in aligned(*extract(archive, members, downloads), read=segments):
                yield prepare[0](source.replace("\u2019", "'")), prepare[1](target.replace("\u2019", "'"))
        return
    tagged = extract(archive, [f"de-en/train.tags.de-en.{language}" for language in CORPUS.languages], downloads)
    numbers = itertools.count(1)
    for pair in aligned(*tagged):
        if any(tag in pair[0] for tag in _LEFT_OUT):
            continue
        source, target = (cut(_TAGS.sub("", side)) for cut, side in zip(prepare, pair, strict=True))
        if not fits(len(source.split()), len(target.split()), MOST_TOKENS, MOST_RATIO):
            continue
        if (next(numbers) % VALID_EVERY == 0) == (split == "valid"):
            yield source, target


def tokenizer(language: str) -> Callable[[str], str]:
    """What makes lower-case Moses tokens of a line, escaped as Moses does.

    Raises:
        ValueError: sacremoses is not installed.
    """
    try:
        from sacremoses import MosesTokenizer
    except ImportError as error:
        raise missing_extra(error) from None
    moses = MosesTokenizer(lang=language)
    return lambda line: str(moses.tokenize(line, return_str=True)).lower()


CORPUS = Corpus(
    name="iwslt14",
    source="de",
    target="en",
    folder="iwslt14_de-en",
    published={"train": 160_239, "valid": 7_283, "test": 6_750},
    pairs=pairs,
)
