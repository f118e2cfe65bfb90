"""The record's file: what is written is read, what was cut is left out, nothing is lost."""

import json
import math

import pytest
from report import samples

from fairseq_dsq import record
from fairseq_dsq.record import Point, Start

START = Start(1, 0, 1, "1.0", "transformer_dsq", "dsq_x", "paper", ("[a]", "[b]"), {"max_epoch": 3}, {"torch": "2"})


def point(update, epoch=1, ended=False, loss=5.0):
    return Point(update, epoch, ended, True, 0, "[a]", {"loss": loss}, {"valid": {"loss": loss, "bleu": 0.1}}, 1.5)


def written(path, *points, **start):
    record.begin(path, START)
    for each in points:
        record.append(path, each)
    return record.read(path)


def updates(path):
    return [line.update for line in record.read(path) if isinstance(line, Point)]


def test_what_is_written_is_read(tmp_path):
    values = (0.1 + 0.2, math.inf, -math.inf, 5e-324, 1e308, -0.0, 7)
    points = [point(update, loss=value) for update, value in enumerate(values)]
    assert written(tmp_path / "dsq.jsonl", *points) == [START, *points]
    record.append(tmp_path / "dsq.jsonl", point(9, loss=math.nan))
    last = record.read(tmp_path / "dsq.jsonl")[-1]
    assert math.isnan(last.train["loss"]) and math.isnan(last.valid["valid"]["loss"])
    for line in (tmp_path / "dsq.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_record_cut_anywhere_gives_its_whole_lines(tmp_path):
    path = tmp_path / "dsq.jsonl"
    lines = written(path, point(1), point(2))
    whole = path.read_bytes()
    seen = set()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        found = record.read(path)
        assert found == lines[: len(found)]
        seen.add(len(found))
    assert seen == {0, 1, 2}


def test_a_resumed_training_goes_on_where_its_checkpoint_is(tmp_path):
    path = tmp_path / "dsq.jsonl"
    written(path, point(2), point(4), point(6))
    with open(path, "ab") as file:
        file.write(b'{"update": 8, "epo')
    again = Start(**{**vars(START), "update": 4, "epoch": 2})
    assert record.begin(path, again, path) is None
    record.append(path, point(6, loss=4.0))
    assert record.read(path) == [START, point(2), point(4), again, point(6, loss=4.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["dsq.jsonl"]


def test_a_training_that_was_killed_before_its_first_line_leaves_none(tmp_path):
    path = tmp_path / "dsq.jsonl"
    for _ in range(3):
        assert record.begin(path, START, path) is None
    assert record.read(path) == [START]


def test_another_training_s_record_is_put_aside(tmp_path):
    path = tmp_path / "dsq.jsonl"
    written(path, point(2))
    assert record.begin(path, START) == f"{path}: has another training; it is dsq.1.jsonl now"
    record.append(path, point(3))
    record.begin(path, START)
    assert (updates(tmp_path / "dsq.1.jsonl"), updates(tmp_path / "dsq.2.jsonl"), updates(path)) == ([2], [3], [])


def test_a_training_from_another_folder_takes_its_record_over(tmp_path):
    source, path = tmp_path / "a.jsonl", tmp_path / "dsq.jsonl"
    written(source, point(2), point(4))
    written(path, point(7))
    record.begin(path, Start(**{**vars(START), "update": 2}), source)
    assert (updates(path), updates(source), updates(tmp_path / "dsq.1.jsonl")) == ([2], [2, 4], [7])


def test_a_training_that_goes_back_to_an_earlier_checkpoint_keeps_what_came_after_it(tmp_path):
    path = tmp_path / "dsq.jsonl"
    written(path, point(2), point(4))
    back = Start(**{**vars(START), "update": 2})
    assert "it is dsq.1.jsonl now" in record.begin(path, back, path, stopped=False)
    assert (updates(path), updates(tmp_path / "dsq.1.jsonl")) == ([2], [2, 4])


def test_a_damaged_record_is_put_aside_and_said(tmp_path):
    path = tmp_path / "dsq.jsonl"
    written(path, point(2))
    path.write_bytes(path.read_bytes().replace(b'"epoch"', b'"epoxh"'))
    assert record.begin(path, START, path) == f"{path}: line 1: epoch: missing; it is dsq.1.jsonl now"
    assert b"epoxh" in (tmp_path / "dsq.1.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{]\n", "line 1: Expecting property name enclosed in double quotes: line 1 column 2"),
        ("[1]\n", "line 1: got [1], expected a JSON object"),
        (samples.point_line(1, 10, 5.0), "line 1: schema: missing"),
        (samples.start_line().replace('"schema": 1', '"schema": 2'), "line 1: schema: got 2, expected 1: written by"),
        (samples.start_line() + samples.point_line(1, -1, 5.0), "line 2: update: got -1, expected int"),
        (samples.start_line() + samples.point_line(1, 1, "x"), "line 2: train: got {'loss': 'x'"),
        (samples.start_line() + "[" * 5000 + "\n", "line 2: "),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_refused_in_one_line(tmp_path, text, expected):
    path = tmp_path / "dsq.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        record.read(path)
    assert str(error.value).startswith(f"{path}: {expected}") and "\n" not in str(error.value)
