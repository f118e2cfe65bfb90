"""Multi30k, task 1 (Elliott et al. 2016): captions of images, German to English."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

from fairseq_dsq.download import download
from fairseq_dsq.translation.corpus import Corpus

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


def pairs(split: str, downloads: Path) -> Iterator[tuple[str, str]]:
    """The pairs of a split, downloaded; errors as :func:`fairseq_dsq.download.download`."""
    names = [f"{CORPUS.files[split]}.{language}" for language in CORPUS.languages]
    source, target = (
        download(f"{URL}{name}.gz", downloads / f"{name}.gz", SHA256[name], CORPUS.hint) for name in names
    )
    with gzip.open(source, "rt", encoding="utf-8") as sources, gzip.open(target, "rt", encoding="utf-8") as targets:
        yield from zip(sources, targets, strict=True)


CORPUS = Corpus(
    name="multi30k",
    source="de",
    target="en",
    folder="multi30k",
    published={"train": 29_000, "valid": 1_014, "test": 1_000},
    pairs=pairs,
    files={"train": "train", "valid": "val", "test": "test_2016_flickr"},
)
