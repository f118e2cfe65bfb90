"""Runs of a plan: how far they are, and several at a time."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from report import samples

from fairseq_dsq import artefact, record
from fairseq_dsq.recipes import side_by_side
from fairseq_dsq.recipes.plan import Plan, Progress, progress, step
from fairseq_dsq.recipes.side_by_side import SideBySide


def trained(folder, seconds, scored=0.0):
    """A run that trained for so long, in two pieces, and was then scored, if it was."""
    folder.mkdir()
    lines = [samples.start_line(2, **samples.DSQ), samples.point_line(1, 10, 5.0)]
    lines += [samples.start_line(2, update=10, epoch=2, **samples.DSQ), samples.point_line(2, 20, 4.0)]
    times = iter((seconds / 4, seconds * 3 / 4))
    lines = [
        json.dumps({**line, "wall_s": next(times)} if "wall_s" in line else line) for line in map(json.loads, lines)
    ]
    (folder / record.NAME).write_text("\n".join(lines) + "\n")
    if scored:
        for name in ("train.log", "score.json"):
            (folder / name).touch()
            artefact.write(folder / name, {})
        stamp = artefact.stamp(folder / "train.log")
        ended = artefact.stamp(folder / "score.json").stat().st_mtime - scored
        os.utime(stamp, (ended, ended))


def test_progress_counts_runs_and_tells_the_time_by_the_mean_of_those_that_are_done(tmp_path):
    names = ("a", "b", "c", "d", "e")
    plan = Plan("study", step("prepare"), {tmp_path / name: () for name in names}, "score.json")
    assert str(progress(plan, 2)) == "0 of 5 runs done, 0 running, 5 left"
    trained(tmp_path / "a", 1800, scored=60)
    trained(tmp_path / "b", 1200, scored=180)
    trained(tmp_path / "c", 600)  # was stopped
    (tmp_path / "d").mkdir()
    with artefact.locked(tmp_path / "d"):
        found = progress(plan, 2)
    mean = (1860 + 1380) / 2
    assert found == Progress(2, 1, 2, pytest.approx(mean, abs=1), pytest.approx((3 * mean - 600) / 2, abs=3))
    assert str(found) == "2 of 5 runs done, 1 running, 2 left; about 36 min (27 min a run)"
    assert progress(plan, 2, running=[tmp_path / "e"]).running == 1
    assert str(Progress(1, 1, 9, 1200.0, 9000.0)).endswith("about 2 h 30 min (20 min a run)")


PROGRAM = """
import os, sys, time, pathlib
word, argument = sys.argv[1:3]
if word == "sleep":
    pathlib.Path(sys.argv[3]).touch()
    time.sleep(float(argument))
elif word == "gpus":
    time.sleep(0.2)
    argument = os.environ["CUDA_VISIBLE_DEVICES"]
elif word == "fail":
    sys.exit(f"{argument} went wrong")
print(word, argument)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(side_by_side, "PROGRAM", (sys.executable, str(tmp_path / "program.py")))


def test_a_run_that_fails_leaves_the_others_alone(program, tmp_path):
    runs = {
        Path("good"): (step("say", "1"), step("say", "2", before="then: ")),
        Path("bad"): (step("say", "3"), step("fail", "x", failure="see log"), step("say", "4")),
    }
    pool = SideBySide(2)
    good, bad = sorted(pool.run(runs), key=lambda outcome: outcome.code)
    assert (good.folder.name, good.output, good.code) == ("good", "say 1\nthen: say 2\n", 0)
    assert (bad.output, bad.code, bad.errors) == ("say 3\n", 1, "x went wrong\nsee log\n")
    assert not pool.running


def test_runs_that_are_at_work_together_see_other_gpus(program):
    runs = {Path(str(number)): (step("gpus", ""), step("gpus", "")) for number in range(5)}
    found = [outcome.output.split("\n") for outcome in SideBySide(2, ["0,1", "2,3"]).run(runs)]
    assert all(first == second for first, second, _ in found)
    assert {first for first, _, _ in found} == {"gpus 0,1", "gpus 2,3"}


def test_runs_at_work_are_ended_with_what_waits_for_them(program, tmp_path):
    marks = [tmp_path / f"mark{number}" for number in range(3)]
    runs = {mark: (step("sleep", "60", mark),) for mark in marks} | {Path("quick"): (step("say", "1"),)}
    pool = SideBySide(3)
    outcomes = pool.run({Path("quick"): runs[Path("quick")], **runs})
    begun = time.monotonic()
    assert next(outcomes).folder == Path("quick")
    while not any(mark.exists() for mark in marks):
        time.sleep(0.02)
    outcomes.close()
    assert time.monotonic() - begun < 30


def test_a_look_does_not_keep_a_command_out(tmp_path):
    assert not artefact.is_locked(tmp_path) and not artefact.is_locked(tmp_path / "none")
    with artefact.locked(tmp_path, wait=False):
        assert artefact.is_locked(tmp_path)
        with pytest.raises(ValueError, match="another command is at work there"), artefact.locked(tmp_path, wait=False):
            pass
    assert not artefact.is_locked(tmp_path)
