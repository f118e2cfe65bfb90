"""GLUE's metrics, by scikit-learn and scipy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN = "accuracy", "f1", "matthews", "pearson", "spearman"
RESULT = "GLUE"  # what a file of scores calls itself, as sacreBLEU's says BLEU
# Of targets and predictions: class indices, of which 1 is the positive one, or scores.
METRICS: Mapping[str, Callable[[Sequence[float], Sequence[float]], Any]] = {
    ACCURACY: accuracy_score,
    F1: lambda targets, predictions: f1_score(targets, predictions, zero_division=0),
    MATTHEWS: matthews_corrcoef,
    PEARSON: lambda targets, predictions: pearsonr(targets, predictions).statistic,
    SPEARMAN: lambda targets, predictions: spearmanr(targets, predictions).statistic,
}


def score(names: Sequence[str], targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float | None]:
    """Each metric of ``names``, in per cent; None where it is undefined (the correlation with a constant)."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        for name in names:
            value = float(METRICS[name](targets, predictions))
            found[name] = 100 * value if math.isfinite(value) else None
    return found
