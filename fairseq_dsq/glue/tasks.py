"""The nine tasks: files, columns, labels and metrics of each, as GLUE defines them."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq_dsq.glue.metrics import ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN

TRAIN_FILES = ("train.tsv", "train_subset.tsv")  # the first that is there
_URL = "https://dl.fbaipublicfiles.com/glue/data/"


@dataclass(frozen=True)
class Archive:
    """A public file. Checksums are those that Hugging Face's ``datasets`` records for GLUE (its dataset_infos.json).

    Attributes:
        url: the address that GLUE's own download script uses.
        sha256: in hexadecimal digits.
    """

    url: str
    sha256: str


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: as GLUE spells it.
        sentences: names of the columns that hold the sentence, or the two sentences of a pair.
        label: name of the label's column.
        labels: the classes, in the order of their indices; empty for regression.
        metrics: names of :data:`fairseq_dsq.glue.metrics.METRICS`.
        archive: where it is published.
        header: the columns' names where the files have no header line.
        dev: file name of each development set, the first of which must be there, and what its scores' names end in.
        max_score: the largest score, of which 0 is the smallest; for regression.
        ships_broken_rows: whether GLUE's own files have rows that cannot be used.
    """

    name: str
    sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    archive: Archive
    header: tuple[str, ...] = ()
    dev: tuple[tuple[str, str], ...] = (("dev.tsv", ""),)
    max_score: float = 1.0
    ships_broken_rows: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def outputs(self) -> int:
        """Classes, or the one score of a regression: fairseq's ``--num-classes``."""
        return len(self.labels) or 1


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "CoLA", ("sentence",), "label", _BINARY, (MATTHEWS, ACCURACY),
            Archive(_URL + "CoLA.zip", "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
            header=("source", "label", "original_label", "sentence"),
        ),
        GlueTask(
            "SST-2", ("sentence",), "label", _BINARY, (ACCURACY,),
            Archive(_URL + "SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
        ),
        # GLUE may not host MRPC: its train and dev sets are cut from this file (see files.py).
        GlueTask(
            "MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, (F1, ACCURACY),
            Archive(
                "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt",
                "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
            ),
        ),
        GlueTask(
            "STS-B", _PAIR, "score", (), (PEARSON, SPEARMAN),
            Archive(_URL + "STS-B.zip", "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
            max_score=5.0,
        ),
        GlueTask(
            "QQP", ("question1", "question2"), "is_duplicate", _BINARY, (F1, ACCURACY),
            Archive(_URL + "QQP-clean.zip", "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
            ships_broken_rows=True,
        ),
        GlueTask(
            "MNLI", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"), (ACCURACY,),
            Archive(_URL + "MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
            dev=(("dev_matched.tsv", ""), ("dev_mismatched.tsv", "_mismatched")),
        ),
        GlueTask(
            "QNLI", ("question", "sentence"), "label", _ENTAILMENT, (ACCURACY,),
            Archive(_URL + "QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
        ),
        GlueTask(
            "RTE", _PAIR, "label", _ENTAILMENT, (ACCURACY,),
            Archive(_URL + "RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
        ),
        GlueTask(
            "WNLI", _PAIR, "label", _BINARY, (ACCURACY,),
            Archive(_URL + "WNLI.zip", "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
        ),
    )
}  # fmt: skip
# Which rows of MRPC's file make its dev set.
MRPC_DEV_IDS = Archive(
    _URL + "mrpc_dev_ids.tsv", "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"
)  # fmt: skip


def find_task(name: str) -> GlueTask:
    """The task of a name, in any case.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    for task in TASKS.values():
        if task.name.lower() == name.lower():
            return task
    raise ValueError(f"got {name!r}, expected one of {', '.join(TASKS)}")
