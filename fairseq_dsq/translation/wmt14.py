"""WMT 2014's news task, English to German: newstest2013 validates, newstest2014 tests (statmt.org/wmt14)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sacrebleu.utils import get_reference_files, get_source_file

from fairseq_dsq.download import download
from fairseq_dsq.translation.corpus import Corpus, aligned, extract

# The constrained task's parallel corpora: address of the archive, its files without the language.
TRAIN = (
    ("https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz", "training/europarl-v7.de-en"),
    ("https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz", "commoncrawl.de-en"),
    ("https://www.statmt.org/wmt14/training-parallel-nc-v9.tgz", "training/news-commentary-v9.de-en"),
)
# sacreBLEU's names.
SETS = {"valid": "wmt13", "test": "wmt14/full"}


def pairs(split: str, downloads: Path) -> Iterator[tuple[str, str]]:
    """The pairs of a split, downloaded; errors as :func:`download`, :func:`extract` and :func:`aligned`."""
    if split == "train":
        for url, prefix in TRAIN:
            archive = download(url, downloads / url.rpartition("/")[2], hint=CORPUS.hint)
            yield from aligned(*extract(archive, [f"{prefix}.{language}" for language in CORPUS.languages], downloads))
        return
    pair = "-".join(CORPUS.languages)
    (reference,) = get_reference_files(SETS[split], pair)
    yield from aligned(Path(get_source_file(SETS[split], pair)), Path(reference))


# Lengths as in fairseq's examples/translation/prepare-wmt14en2de.sh.
CORPUS = Corpus(
    name="wmt14",
    source="en",
    target="de",
    folder="wmt14_en-de",
    published={"valid": 3_000, "test": 3_003},
    pairs=pairs,
    max_pieces=250,
    max_ratio=1.5,
)
