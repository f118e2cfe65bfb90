"""The nine tasks' files, made up in the form in which GLUE ships them."""

import os
from pathlib import Path

import pytest

from fairseq_dsq.glue import TASKS
from fairseq_dsq.glue.tsv import Row, read

MNLI_COLUMNS = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    "sentence1\tsentence2"
)
MNLI_VALUES = "0\t1\t1n\tslate\t( x )\t( x )\t(ROOT)\t(ROOT)\tIt is new\tIt is old"
PAIR = ("It is new", "It is old")
# Task, file, and what is read.
FILES = {
    "CoLA": ("gj04\t1\t\tThey left.\ngj04\t0\t*\tLeft they.\n", [(("They left.",), "1"), (("Left they.",), "0")]),
    "SST-2": ("sentence\tlabel\nhide new secretions \t0\n", [(("hide new secretions",), "0")]),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tIt is new\tIt is old\r\n",
        [(PAIR, "1")],
    ),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tnews\tMSR\t2012\t1\tnone\tnone\tIt is new\tIt is old\t3.800\n",
        [(PAIR, "3.800")],
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n3\t4\t5\tIt is new\tIt is old\t0\n", [(PAIR, "0")]),
    "MNLI": (f"{MNLI_COLUMNS}\tlabel1\tgold_label\n{MNLI_VALUES}\tentailment\tneutral\n", [(PAIR, "neutral")]),
    "QNLI": ("index\tquestion\tsentence\tlabel\n0\tIt is new\tIt is old\tnot_entailment\n", [(PAIR, "not_entailment")]),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n0\tIt is new\tIt is old\tentailment\n", [(PAIR, "entailment")]),
    "WNLI": ("index\tsentence1\tsentence2\tlabel\n0\tIt is new\tIt is old\t1\n", [(PAIR, "1")]),
}
RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
QQP_HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
# Rows of GLUE's development sets (arXiv 1804.07461, Table 1, and its data).
DEV_ROWS = {"RTE": 277, "QNLI": 5463, "MNLI": 9815}


def table(tmp_path, task, text):
    path = tmp_path / "train.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(TASKS[task], path)


def test_every_task_has_a_file_here():
    assert FILES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", FILES)
def test_the_columns_of_each_task_are_found(tmp_path, task):
    text, expected = FILES[task]
    assert table(tmp_path, task, text).rows == tuple(Row(*row) for row in expected)


def test_mnli_s_development_sets_have_more_columns_and_a_subset_may_have_others(tmp_path):
    labels = "\t".join(f"label{number}" for number in range(1, 6))
    votes = "\t".join(["entailment"] * 5)
    for text in (
        f"{MNLI_COLUMNS}\t{labels}\tgold_label\n{MNLI_VALUES}\t{votes}\tcontradiction\n",
        "index\tsentence1\tsentence2\tgold_label\tsource\n0\tIt is new\tIt is old\tcontradiction\tpart\n",
    ):
        assert table(tmp_path, "MNLI", text).rows == (Row(PAIR, "contradiction"),)


def test_quotes_and_odd_line_separators_are_text(tmp_path):
    first, second = 'He said: "so', "a\u2028b\x0cc\x85d\re"
    rows = table(tmp_path, "RTE", f"{RTE_HEADER}0\t{first}\t{second}\tentailment\n").rows
    assert rows == (Row((first, second), "entailment"),)


BAD = [
    (
        "RTE",
        "index\tsentence1\tlabel\n",
        ":1: got the columns index, sentence1, label, expected 'sentence2' among them",
    ),
    ("RTE", "", ": an empty file, expected a header with sentence1, sentence2, label"),
    ("RTE", RTE_HEADER, ": no rows, expected some"),
    ("CoLA", "", ": no rows, expected some"),
    (
        "RTE",
        RTE_HEADER + "0\ta\tb\tentailment\n1\ta\tentailment\n",
        ":3: got 3 fields (1 | a | entailment), expected 4",
    ),
    ("RTE", RTE_HEADER + "0\ta\tb\tentailment\tmore\n", ":2: got 5 fields (0 | a | b | entailment | more), expected 4"),
    ("RTE", RTE_HEADER + "\n", ":2: got 1 fields (), expected 4"),
    (
        "RTE",
        RTE_HEADER + "0\ta\tb\tneutral\n",
        ":2: column 'label': got 'neutral', expected one of entailment, not_ent",
    ),
    ("RTE", RTE_HEADER + "0\ta\t \tentailment\n", ":2: column 'sentence2': got an empty sentence, expected text"),
    ("CoLA", "gj04\t1\t\t\n", ":1: column 'sentence': got an empty sentence, expected text"),
    ("CoLA", "gj04\t*\t\tText\n", ":1: column 'label': got '*', expected one of 0, 1"),
    ("MNLI", "sentence1\tsentence2\tgold_label\na\tb\t-\n", ":2: column 'gold_label': got '-', expected one of entail"),
    (
        "STS-B",
        "sentence1\tsentence2\tscore\na\tb\tgood\n",
        ":2: column 'score': got 'good', expected a number from 0 to 5",
    ),
    (
        "STS-B",
        "sentence1\tsentence2\tscore\na\tb\t5.1\n",
        ":2: column 'score': got '5.1', expected a number from 0 to 5",
    ),
    (
        "STS-B",
        "sentence1\tsentence2\tscore\na\tb\tnan\n",
        ":2: column 'score': got 'nan', expected a number from 0 to 5",
    ),
    ("STS-B", "sentence1\tsentence2\tscore\na\tb\t\n", ":2: column 'score': got '', expected a number from 0 to 5"),
    ("RTE", RTE_HEADER.encode() + b"0\ta\xff\tb\tentailment\n", ":2: got byte 0xff, expected UTF-8"),
    ("QQP", QQP_HEADER + "3\t4\t5\ta\tb\tyes\n", ":2: column 'is_duplicate': got 'yes', expected one of 0, 1"),
    ("QQP", QQP_HEADER + "a broken row\n", ": no rows, expected some"),
]


@pytest.mark.parametrize(("task", "text", "expected"), BAD)
def test_a_malformed_file_is_named_with_line_and_value(tmp_path, task, text, expected):
    with pytest.raises(ValueError) as stop:
        table(tmp_path, task, text)
    assert str(stop.value).startswith(f"{tmp_path / 'train.tsv'}{expected}")
    assert "\n" not in str(stop.value)


def test_qqp_s_broken_rows_are_skipped_and_counted(tmp_path):
    # A question with a line break in it is two broken rows; two of QQP's questions are empty.
    rows = "1\t2\t3\ta\tb\t0\n2\t3\t4\tIs \n it\tWas it\t0\n3\t4\t5\tApp?\t\t0\n4\t5\t6\tc\td\t1\n"
    found = table(tmp_path, "QQP", QQP_HEADER + rows)
    assert found.rows == (Row(("a", "b"), "0"), Row(("c", "d"), "1"))
    assert found.skipped == (3, 4, 5)


@pytest.mark.parametrize("task", DEV_ROWS)
def test_the_real_development_sets_are_read_whole(task):
    if "DSQ_DATA" not in os.environ:
        pytest.skip("DSQ_DATA is not set: no GLUE data")
    found = read(TASKS[task], Path(os.environ["DSQ_DATA"], "glue", task, TASKS[task].dev[0][0]))
    assert len(found.rows) == DEV_ROWS[task]
    assert not found.skipped
