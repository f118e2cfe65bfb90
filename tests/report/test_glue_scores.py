"""The scores that fairseq-dsq glue-evaluate leaves in a run's folder."""

import json

import pytest

from fairseq_dsq.report.runs import Run
from fairseq_dsq.report.scores import METRICS, judged_by, scores


def run_with(tmp_path, document, best=None):
    (tmp_path / "glue.json").write_text(json.dumps(document))
    return scores(Run("run", tmp_path, {}, (), best or {}, ""))


def test_a_run_is_judged_by_its_glue_scores(tmp_path):
    found = run_with(
        tmp_path,
        {"name": "GLUE", "task": "MNLI", "scores": {"accuracy": 84.25, "accuracy_mismatched": 83.5}},
        {"accuracy": 84.9, "loss": 0.5},
    )
    assert found == {
        "glue_accuracy": 84.25, "glue_accuracy_mismatched": 83.5, "valid_accuracy": 84.9, "valid_loss": 0.5,
    }  # fmt: skip
    assert judged_by(found) == ("glue_accuracy", "glue_accuracy_mismatched")
    assert METRICS["glue_accuracy_mismatched"].label == "accuracy mismatched (GLUE dev, %)"


def test_an_undefined_score_is_none(tmp_path):
    assert run_with(tmp_path, {"name": "GLUE", "scores": {"pearson": None, "spearman": 12.5}}) == {
        "glue_spearman": 12.5
    }


@pytest.mark.parametrize(
    "document",
    [{"name": "GLUE"}, {"name": "GLUE", "scores": [1]}, {"name": "other", "scores": {"accuracy": 1}, "x": "GLUE"}],
)
def test_other_files_are_passed_over(tmp_path, document):
    assert run_with(tmp_path, document) == {}
