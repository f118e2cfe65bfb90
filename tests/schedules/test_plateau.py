"""The schedule: validation losses in, levels out."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_dsq.precision import parse_levels
from fairseq_dsq.schedules.plateau import DivergenceState, Plateau, PlateauState

INF, NAN = math.inf, math.nan


def states(schedule, losses, state=None):
    """The state after each loss."""
    state = schedule.start() if state is None else state
    trail = []
    for loss in losses:
        state = schedule.on_validation(state, loss)
        trail.append(state)
    return trail


def levels(schedule, losses):
    return [state.level for state in states(schedule, losses)]


@pytest.mark.parametrize(
    ("patience", "losses", "expected"),
    [
        # Every loss is a new best.
        (2, [5, 4, 3, 2, 1], [0, 0, 0, 0, 0]),
        # The second and third validation bring nothing new.
        (2, [5, 5, 5], [0, 0, 1]),
        (2, [5, 6, 7], [0, 0, 1]),
        # Only validations in a row count.
        (2, [5, 6, 4, 5, 3, 4], [0, 0, 0, 0, 0, 0]),
        (2, [5, 6, 4, 5, 5], [0, 0, 0, 0, 1]),
        # Patience 1 rises at once; patience 3 waits for three.
        (1, [5, 5, 5], [0, 1, 2]),
        (3, [5, 6, 6, 6, 6, 6, 6], [0, 0, 0, 1, 1, 1, 2]),
        # The count starts anew at a new level.
        (2, [5, 6, 6, 6, 4, 6, 6], [0, 0, 1, 1, 1, 1, 2]),
        # A first validation without a number is a bad one.
        (2, [NAN, NAN, 5], [0, 1, 1]),
        (2, [INF, INF], [0, 1]),
        (2, [5, NAN, NAN, NAN, NAN], [0, 0, 1, 1, 2]),
        # A number after NaN is a new best.
        (2, [NAN, 5, NAN, 4, NAN], [0, 0, 0, 0, 0]),
        # A loss below zero is as good as any.
        (2, [-1, -2, -1.5, -1.5], [0, 0, 0, 1]),
    ],
)
def test_the_level_rises_after_patience_validations_without_a_new_best(patience, losses, expected):
    schedule = Plateau(num_levels=3, patience=patience)
    assert levels(schedule, losses) == expected


@pytest.mark.parametrize(
    ("min_delta", "losses", "best", "bad"),
    [
        (0.0, [5.0, 4.999], 4.999, 0),
        (0.0, [5.0, 5.0], 5.0, 1),
        (0.5, [5.0, 4.75], 5.0, 1),
        (0.5, [5.0, 4.5], 5.0, 1),  # by more than min_delta
        (0.5, [5.0, 4.25], 4.25, 0),
        # Small steps add up against the same best.
        (0.5, [5.0, 4.75, 4.5, 4.25], 4.25, 0),
        (0.5, [5.0, 4.75, 4.5], 5.0, 2),
    ],
)
def test_a_new_best_is_lower_by_more_than_min_delta(min_delta, losses, best, bad):
    state = states(Plateau(2, patience=9, min_delta=min_delta), losses)[-1]
    assert state == PlateauState(level=0, best_loss=best, bad_validations=bad)


def test_the_best_survives_a_rise():
    schedule = Plateau(num_levels=3, patience=2)
    before, *_, risen, after = states(schedule, [3.0, 4.0, 4.0, 3.5])
    assert before == PlateauState(0, 3.0, 0)
    assert risen == PlateauState(1, 3.0, 0)
    # Better than all but the best: at the new level this is no new best either.
    assert after == PlateauState(1, 3.0, 1)


def test_nan_is_never_a_best():
    state = states(Plateau(2, patience=9), [NAN, 3.0, NAN])[-1]
    assert state == PlateauState(0, 3.0, 1)


def test_at_the_last_level_only_the_count_goes_on():
    schedule = Plateau(num_levels=2, patience=2)
    trail = states(schedule, [3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 2.0])
    assert [(state.level, state.bad_validations) for state in trail] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 0),
    ]
    assert trail[-1].best_loss == 2.0


def test_one_level_never_rises():
    assert levels(Plateau(num_levels=1, patience=1), [1.0] * 5) == [0] * 5


def test_one_validation_without_a_new_best_raises_by_default():
    schedule = Plateau(num_levels=2)
    assert schedule.min_delta == 0.0
    assert levels(schedule, [3.0, 2.9, 2.9, 2.8]) == [0, 0, 1, 1]
    assert levels(Plateau(num_levels=2, patience=5), [3.0] * 7) == [0, 0, 0, 0, 0, 1, 1]


def test_a_schedule_goes_on_from_a_saved_state():
    schedule = Plateau(num_levels=3, patience=2)
    losses = [5.0, 6.0, 6.0, 4.0, 6.0, 6.0, 6.0]
    whole = states(schedule, losses)
    for stop in range(1, len(losses)):
        assert states(schedule, losses[stop:], whole[stop - 1]) == whole[stop:]


def test_a_fresh_state_has_seen_nothing():
    assert PlateauState() == PlateauState(level=0, best_loss=INF, bad_validations=0)


def test_a_validation_leaves_the_state_it_was_given():
    state = PlateauState(0, 3.0, 1)
    Plateau(2, patience=2).on_validation(state, 4.0)
    assert state == PlateauState(0, 3.0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.level = 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_levels": 0}, "num_levels: got 0, expected >= 1"),
        ({"num_levels": -1}, "num_levels: got -1, expected >= 1"),
        ({"num_levels": 2, "patience": 0}, "patience: got 0, expected an integer >= 1"),
        ({"num_levels": 2, "patience": -5}, "patience: got -5, expected an integer >= 1"),
        ({"num_levels": 2, "min_delta": -0.1}, "min_delta: got -0.1, expected a finite number"),
        ({"num_levels": 2, "min_delta": NAN}, "min_delta: got nan, expected a finite number"),
        ({"num_levels": 2, "min_delta": INF}, "min_delta: got inf, expected a finite number"),
    ],
    ids=str,
)
def test_arguments_without_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plateau(**arguments)


@pytest.mark.parametrize("index", range(4))
def test_a_q_that_decreases_is_named_by_level_and_index(index):
    q = [8, 8, 8, 8]
    q[index] = 7
    last = ",".join(str(value) for value in q)
    with pytest.raises(ValueError, match=rf"level 2 .*q{index} falls from 8 to 7"):
        Plateau(3).check(parse_levels(f"[4,4,4,4] [8,8,8,8] [{last}]"))


def test_levels_are_compared_with_the_one_before_not_the_first():
    with pytest.raises(ValueError, match=r"level 2 .*q1 falls from 8 to 4"):
        Plateau(3).check(parse_levels("[2,2,2,2] [2,8,2,2] [2,4,2,2]"))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # Without a number, at once.
        ([NAN, 5], [1, 1]),
        ([5, 4, INF, 3], [0, 0, 1, 1]),
        # Two in a row while none was below the first.
        ([5, 6, 7, 8, 9], [0, 0, 1, 1, 2]),
        ([5, 6, 4, 7, 8, 9], [0, 0, 0, 0, 0, 0]),
        ([5, 5, 5], [0, 0, 1]),
        # One better one, and the patience counts again.
        ([5, 6, 4, 6, 6, 6, 6, 6], [0, 0, 0, 0, 0, 0, 0, 1]),
        # At the last level nothing is left to raise.
        ([NAN, NAN, NAN], [1, 2, 2]),
    ],
)
def test_a_training_that_diverges_does_not_wait_for_the_patience(losses, expected):
    schedule = Plateau(3, patience=5, raise_on_divergence=True)
    assert levels(schedule, losses) == expected
    assert levels(Plateau(3, patience=5), losses[:5]) == [0] * len(losses[:5])


def test_a_training_that_had_improved_before_the_switch_has_not_diverged():
    """Its checkpoints do not say of which validation the best loss is."""
    schedule = Plateau(2, patience=5, raise_on_divergence=True)
    assert schedule.on_validation(DivergenceState(0, 3.0, 1), 4.0).level == 0


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(
    num_levels=st.integers(1, 5),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.25, 1.0]),
    losses=st.lists(st.integers(0, 6).map(float) | st.floats(), max_size=40),
)
def test_the_level_never_falls_and_never_leaves_the_list(num_levels, patience, min_delta, losses):
    schedule = Plateau(num_levels, patience, min_delta)
    before = PlateauState()
    since_rise = 0
    for loss in losses:
        after = schedule.on_validation(before, loss)
        since_rise += 1
        assert after.level - before.level in (0, 1)
        assert 0 <= after.level < num_levels
        assert after.best_loss <= before.best_loss
        assert not math.isnan(after.best_loss)
        if after.level > before.level:
            assert since_rise >= patience
            since_rise = 0
        if after.level + 1 < num_levels:
            assert after.bad_validations < patience
        before = after
