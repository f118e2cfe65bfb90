"""Metrics against values worked out by hand."""

import pytest

from fairseq_dsq.glue.metrics import ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN, score

# 2 true positives, 1 false positive, 2 false negatives, 3 true negatives.
TARGETS, PREDICTIONS = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0, 0, 0]


def test_classification():
    found = score((ACCURACY, F1, MATTHEWS), TARGETS, PREDICTIONS)
    assert found[ACCURACY] == pytest.approx(100 * 5 / 8)
    assert found[F1] == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 2))
    assert found[MATTHEWS] == pytest.approx(100 * (2 * 3 - 1 * 2) / (3 * 4 * 4 * 5) ** 0.5)


def test_f1_is_of_class_1():
    assert score((F1,), [0, 0, 1], [0, 0, 0]) == {F1: 0}


def test_correlations():
    targets, predictions = [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 4.0, 9.0]
    found = score((PEARSON, SPEARMAN), targets, predictions)
    assert found[PEARSON] == pytest.approx(100 * 15 / (5 * 49) ** 0.5)
    assert found[SPEARMAN] == pytest.approx(100)


def test_the_correlation_with_a_constant_is_undefined(recwarn):
    assert score((PEARSON, SPEARMAN), [0.0, 1.0, 2.0], [0.5, 0.5, 0.5]) == {PEARSON: None, SPEARMAN: None}
    assert not recwarn


def test_matthews_of_one_class_alone_is_0():
    assert score((MATTHEWS,), [0, 1, 1], [1, 1, 1]) == {MATTHEWS: 0}
