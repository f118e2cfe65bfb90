"""What fits: the search for the largest batch against bytes that are counted one by one."""

import pytest

from fairseq_dsq.cost.memory import Held, largest_batch


def test_the_total_is_the_sum_of_all_parts():
    assert Held(weights=1, gradients=20, states=300, stash=4000, saved=50000).total == 54321


def boxes(batch, length=3, box=16):
    """A constant, a part for each token, and an exponent for each box along the tokens."""
    tokens = batch * length
    return 1000 + 7 * tokens + -(-tokens // box)


@pytest.mark.parametrize("limit", [0, 1021, 1022, 1100, 1336 + 21, 1_000_000, 10**15, *range(3000, 3060)])
def test_the_largest_batch_fits_and_one_more_does_not(limit):
    found = largest_batch(boxes, limit, 16)
    assert boxes(found + 1) > limit
    assert found == 0 or boxes(found) <= limit


def test_no_batch_of_more_than_two_periods_is_measured():
    measured = []
    assert largest_batch(lambda batch: measured.append(batch) or boxes(batch), 10**15, 16) > 10**13
    assert max(measured) == 32 and len(measured) == len(set(measured)) < 10
