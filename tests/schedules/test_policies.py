"""Policies that go by updates and epochs: levels out, whatever stops in between."""

import math
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest

from fairseq_dsq import schedules
from fairseq_dsq.errors import DSQError
from fairseq_dsq.flags import boolean, flag, integer
from fairseq_dsq.plugin.config import DSQConfig, defaults
from fairseq_dsq.precision import parse_levels
from fairseq_dsq.schedules import Policy, State
from fairseq_dsq.schedules.callback import Callback, CallbackState
from fairseq_dsq.schedules.cyclic import Cyclic
from fairseq_dsq.schedules.updates import Updates


def levels(policy, updates, epoch_of=lambda update: 1 + update // 4):
    """The level of each update; epochs of four."""
    state, trail = policy.start(), []
    for update in range(updates):
        state = policy.on_update(state, update, epoch_of(update))
        trail.append(state.level)
    return trail


@pytest.mark.parametrize(
    ("raise_at", "expected"),
    [
        ("3,5", [0, 0, 0, 1, 1, 2, 2, 2, 2]),
        ("1, 2", [0, 1, 2, 2, 2, 2, 2, 2, 2]),
        ("epoch:2,epoch:3", [0, 0, 0, 0, 1, 1, 1, 1, 2]),
        ("epoch:1,epoch:9", [1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_next_level_begins_at_each_point(raise_at, expected):
    policy = Updates(3, raise_at)
    assert levels(policy, 9) == expected
    # From the state of another training, too: a level follows from the update alone.
    assert policy.on_update(State(2), 0, 1).level == expected[0]


def test_levels_come_in_turn():
    assert levels(Cyclic(3, 2), 14) == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 0, 0]
    Cyclic(2, 2).check(parse_levels("[16,4,4,16] [2,2,2,16]"))


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (Updates, (2,), "raise_at: got '', expected 1 point for the 2 levels of --dsq-levels"),
        (Updates, (2, "3,5"), "raise_at: got '3,5', expected 1 point for the 2 levels"),
        (Updates, (3, "5,3"), "raise_at: got '5,3', expected rising updates such as 1000,4000, or epochs"),
        (Updates, (3, "5,5"), "raise_at: got '5,5', expected rising"),
        (Updates, (2, "0"), "raise_at: got '0', expected rising"),
        (Updates, (3, "5,epoch:3"), "raise_at: got '5,epoch:3', expected rising"),
        (Updates, (2, "5;"), "raise_at: got '5;', expected rising"),
        (Cyclic, (2, 0), "cycle: got 0, expected an integer >= 1"),
        (Callback, (2, "rule"), "callback: got 'rule', expected module:function"),
        (Callback, (2, "..os:system"), "callback: got '..os:system', expected module:function"),
    ],
)
def test_flags_without_meaning_are_refused(policy, arguments, message):
    with pytest.raises(ValueError) as error:
        policy(*arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_points_may_be_numbers_and_lists_as_yaml_has_them():
    from fairseq_dsq.schedules.updates import points

    assert (points(3), points([3, 5]), points(["epoch:2"]), points("")) == ("3", "3,5", "epoch:2", "")
    with pytest.raises(ValueError, match="got True"):
        points(True)


@pytest.fixture
def rules(monkeypatch):
    module = types.ModuleType("rules")
    monkeypatch.setitem(sys.modules, "rules", module)
    return module


def test_a_function_is_asked_before_each_update(rules):
    asked = []

    def rule(level, updates, epoch, loss):
        asked.append((level, updates, epoch, loss))
        return int(loss < 5)

    rules.rule = rule
    policy = Callback(2, "rules:rule")
    policy.prepare()
    state = policy.on_update(policy.start(), 0, 1)
    state = policy.on_update(policy.on_validation(state, 4.5), 1, 2)
    assert state == CallbackState(1, 4.5)
    assert asked[1] == (0, 1, 2, 4.5) and math.isnan(asked[0][3])


@pytest.mark.parametrize("level", [2, -1, True, 1.0, None])
def test_what_is_no_level_is_refused(rules, level):
    rules.rule = lambda *_: level
    with pytest.raises(
        DSQError, match=r"argument --dsq-callback: rules:rule: returned .* after 7 updates, expected an in"
    ):
        Callback(2, "rules:rule").on_update(CallbackState(), 7, 1)


@pytest.mark.parametrize("name", ["rules:none", "no_such:rule", "rules:text", ""])
def test_a_function_that_is_none_is_refused_where_training_begins(rules, name):
    rules.text = "text"
    policy = Callback(2, name)  # an evaluation needs no function
    with pytest.raises(ValueError, match=r"^callback: got"):
        policy.prepare()


def test_every_policy_s_flags_are_fairseq_s():
    for name in schedules.names():
        assert {f"dsq_{own}" for own in schedules.own_flags(name)} <= defaults(DSQConfig, "schedule").keys()
    with pytest.raises(ValueError, match="schedule: got 'x', expected one of plateau, updates, cyclic, callback"):
        schedules.make("x", 2, None)


def test_a_policy_s_flags_are_its_fields(monkeypatch):
    @dataclass(frozen=True)
    class Own(Policy[State]):
        name: ClassVar[str] = "own"
        cycle: int = flag(3, integer("any", lambda _: True), "N", "x", "schedule")
        switch: bool = flag(False, boolean, "", "x", "schedule")
        other: int = 5

    monkeypatch.setitem(schedules.base._POLICIES, "own", Own)
    assert schedules.own_flags("own") == ["cycle", "switch"]
    policy = schedules.make("own", 2, types.SimpleNamespace(dsq_cycle=7))
    assert (policy.cycle, policy.switch, policy.other) == (7, False, 5)
