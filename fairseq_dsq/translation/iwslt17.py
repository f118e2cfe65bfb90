"""IWSLT 2017's TED talks, German to English: dev2010 validates, tst2010 to tst2015 test.

The splits and their sizes are those of the Hugging Face dataset ``iwslt2017-de-en``, which the public counts are of.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fairseq_dsq.download import download
from fairseq_dsq.translation.corpus import Corpus, aligned, extract, segments

URL = "https://raw.githubusercontent.com/hlt-mt/WIT3/master/archive/2017-01-trnted/texts/de/en/de-en.tgz"
SETS = {"valid": ("dev2010",), "test": ("tst2010", "tst2011", "tst2012", "tst2013", "tst2014", "tst2015")}


def pairs(split: str, downloads: Path) -> Iterator[tuple[str, str]]:
    """The pairs of a split, downloaded; errors as :func:`download`, :func:`extract` and :func:`aligned`."""
    archive = download(URL, downloads / "iwslt17.de-en.tgz", hint=CORPUS.hint)
    if split == "train":
        tagged = extract(archive, [f"de-en/train.tags.de-en.{language}" for language in CORPUS.languages], downloads)
        for source, target in aligned(*tagged):
            if not source.startswith("<"):  # a talk's title, speaker, keywords, ...
                yield source, target
        return
    for name in SETS[split]:
        members = [f"de-en/IWSLT17.TED.{name}.de-en.{language}.xml" for language in CORPUS.languages]
        yield from aligned(*extract(archive, members, downloads), read=segments)


# Lengths as in fairseq's examples/translation/prepare-iwslt17-multilingual.sh.
CORPUS = Corpus(
    name="iwslt17",
    source="de",
    target="en",
    folder="iwslt17_de-en",
    published={"train": 206_112, "valid": 888, "test": 8_079},
    pairs=pairs,
    max_pieces=250,
)
