"""Parallel corpora: fetched, cut into sentence pieces. A corpus is a file of this room, named here."""

from fairseq_dsq.translation import iwslt17, multi30k, wmt14
from fairseq_dsq.translation.corpus import Corpus
from fairseq_dsq.translation.prepare import prepare, settings

CORPORA: dict[str, Corpus] = {module.CORPUS.name: module.CORPUS for module in (iwslt17, multi30k, wmt14)}

__all__ = ["CORPORA", "Corpus", "prepare", "settings"]
