"""Parallel corpora: fetched, cut into pieces. A published corpus is a file of this room, named here."""

from fairseq_dsq.translation import iwslt14, iwslt17, multi30k, wmt14
from fairseq_dsq.translation.corpus import Corpus
from fairseq_dsq.translation.plain_text import load_plain_text
from fairseq_dsq.translation.prepare import prepare, settings

CORPORA: dict[str, Corpus] = {module.CORPUS.name: module.CORPUS for module in (iwslt14, iwslt17, multi30k, wmt14)}


def find_corpus(name: str) -> Corpus:
    """The published corpus of a name, or the one of one's own that a recipe's file describes.

    Raises:
        ValueError: neither; the message lists the names.
    """
    return CORPORA[name] if name in CORPORA else load_plain_text(name, sorted(CORPORA))


__all__ = ["CORPORA", "Corpus", "find_corpus", "prepare", "settings"]
