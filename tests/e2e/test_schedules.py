"""Policies through fairseq-train: levels at the right updates, stopped, resumed, and on two workers."""

import pytest
from e2e.states import assert_equal_states, load_model
from e2e.test_distributed import train as train_ranks
from fairseq import checkpoint_utils

from fairseq_dsq import record
from fairseq_dsq.errors import DSQError
from fairseq_dsq.report.runs import read_run

THREE = ("--dsq-levels", "[2,2,2,16] [4,4,4,16] [16,4,4,16]")
EXACT_RESUME = ("--update-epoch-batch-itr", "True")
EVERY_UPDATE = ("--validate-interval-updates", 1)
RULE = "def rule(level, updates, epoch, loss):\n    return (level + (updates % 3 == 2) + (loss < 6.9)) % 3\n"
# Flags, and the level of an update by its number from 0 and its epoch's from 1.
POLICIES = {
    "updates": (
        ("--dsq-schedule", "updates", "--dsq-raise-at", "4,7"),
        lambda update, epoch: (update >= 4) + (update >= 7),
    ),
    "epochs": (("--dsq-schedule", "updates", "--dsq-raise-at", "epoch:1,epoch:2"), lambda update, epoch: epoch),
    "cyclic": (("--dsq-schedule", "cyclic", "--dsq-cycle", 2), lambda update, epoch: update // 2 % 3),
    "callback": (("--dsq-schedule", "callback", "--dsq-callback", "dsq_rule:rule"), None),
}


@pytest.fixture(autouse=True)
def rule(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/dsq_rule.py").write_text(RULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")


def levels(folder):
    """Of each update."""
    lines = [line for line in record.read(folder / record.NAME) if isinstance(line, record.Point)]
    return [line.level for line in lines if line.valid]


@pytest.mark.parametrize("name", POLICIES)
def test_levels_come_at_their_updates_whatever_stops_a_training(train, tmp_path, name):
    flags, expected = POLICIES[name]
    flags = (*THREE, *EXACT_RESUME, *EVERY_UPDATE, *flags)
    log = train(tmp_path / "whole", *flags, "--max-epoch", 2)
    whole = levels(tmp_path / "whole")
    per_epoch = len(whole) // 2
    assert len(set(whole)) > 1 and per_epoch > 4
    if expected:
        assert whole == [expected(update, 1 + update // per_epoch) for update in range(len(whole))]
    if name == "updates":
        assert log.index("precision rises from [2,2,2,16] to [4,4,4,16] after 4 updates") < log.index("after 7 updates")
    for stop in (4, per_epoch):
        train(tmp_path / "parts", *flags, "--max-epoch", 2, "--max-update", stop, "--save-interval-updates", 2)
    train(tmp_path / "parts", *flags, "--max-epoch", 2)
    assert levels(tmp_path / "parts") == whole
    assert_equal_states(load_model(tmp_path / "parts"), load_model(tmp_path / "whole"))
    # What was scored at an update is what its checkpoint loads at: the next level begins with the next update.
    models, _ = checkpoint_utils.load_model_ensemble([str(tmp_path / "parts/checkpoint_1_4.pt")])
    assert models[0].dsq.level_in_force == whole[3]


def test_a_training_without_validations_resumes_to_the_same_levels(train, tmp_path):
    flags = (*THREE, *EXACT_RESUME, *POLICIES["callback"][0], "--disable-validation")
    log = train(tmp_path / "whole", *flags, "--max-epoch", 2)
    for epoch in (1, 2):
        train(tmp_path / "parts", *flags, "--max-epoch", epoch)
    assert_equal_states(load_model(tmp_path / "parts"), load_model(tmp_path / "whole"))
    assert "precision rises" in log


def test_fine_tuning_counts_its_own_updates(train, tmp_path):
    train(tmp_path / "first", *THREE, *POLICIES["updates"][0], "--max-update", 9)
    tuned = ("--finetune-from-model", tmp_path / "first/checkpoint_last.pt", "--max-update", 6)
    log = train(tmp_path / "second", *THREE, *POLICIES["updates"][0], *EVERY_UPDATE, *tuned)
    assert "after 4 updates" in log and "after 9 updates" not in log  # fairseq says the checkpoint's before it loads
    assert levels(tmp_path / "second") == [0, 0, 0, 0, 1, 1]


def test_two_workers_are_at_one_level(cli, tmp_path):
    flags = (*THREE, *EXACT_RESUME, "--dropout", 0, "--dsq-schedule", "cyclic", "--dsq-cycle", 1, "--max-epoch", 2)
    train_ranks(cli, 2, tmp_path / "two", *flags, *EVERY_UPDATE)
    cli.train(tmp_path / "one", *flags, *EVERY_UPDATE, "--update-freq", 2)
    whole = levels(tmp_path / "two")
    assert whole == levels(tmp_path / "one") == [update % 3 for update in range(len(whole))] and len(whole) > 4
    assert_equal_states(load_model(tmp_path / "two"), load_model(tmp_path / "one"))


def test_a_training_that_diverges_rises_early_and_resumes(train, tmp_path):
    flags = (*THREE, *EXACT_RESUME, "--lr", 0, "--dropout", 0, "--dsq-patience", 5, "--dsq-raise-on-divergence")
    log = train(tmp_path, *flags, "--max-epoch", 2)
    assert load_model(tmp_path)["dsq.only_first"] == 1
    log = train(tmp_path, *flags, "--max-epoch", 4)
    assert "precision rises from [2,2,2,16] to [4,4,4,16] where training diverges (best loss " in log
    assert "validations will count" not in log
    assert levels(tmp_path) == [0, 0, 0, 1]


def test_another_policy_goes_on_from_a_checkpoint_s_level(train, tmp_path):
    train(tmp_path, *THREE, *POLICIES["cyclic"][0], "--max-update", 5)
    assert load_model(tmp_path)["dsq.level"] == 2
    assert read_run(tmp_path).levels == ((0, 2), (1, 2), (2, 1))  # of which one validation tells the last alone
    log = train(tmp_path, *THREE, "--dsq-patience", 9, "--max-epoch", 2)
    assert "precision level in force: 2, [16,4,4,16]" in log
    assert list(load_model(tmp_path))[-5:-1] == [
        f"dsq.{n}" for n in ("level", "best_loss", "bad_validations", "counted_update")
    ]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--dsq-schedule", "updates"), "argument --dsq-raise-at: got '', expected 2 points for the 3 levels"),
        (("--dsq-schedule", "updates", "--dsq-raise-at", "9"), "argument --dsq-raise-at: got '9', expected 2 points"),
        (("--dsq-schedule", "callback"), "argument --dsq-callback: got '', expected module:function"),
        (
            ("--dsq-schedule", "callback", "--dsq-callback", "no_such:rule"),
            "argument --dsq-callback: got 'no_such:rule', expected module:function (No module named 'no_such')",
        ),
        (
            ("--dsq-levels", "[4,4,4,16] [2,4,4,16]"),
            "argument --dsq-levels: level 1 [2,4,4,16]: q0 falls from 4 to 2, expected no q to decrease",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(train, tmp_path, flags, line):
    with pytest.raises(DSQError) as error:
        train(tmp_path, *THREE, *flags, "--max-epoch", 1)
    assert str(error.value).startswith(line)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--dsq-raise-at", "5"), "--dsq-raise-at 5: has no effect with --dsq-schedule plateau"),
        ((*POLICIES["cyclic"][0], "--dsq-patience", 9), "--dsq-patience 9: has no effect with --dsq-schedule cyclic"),
        (
            (*POLICIES["updates"][0], "--max-update", 7),
            "--dsq-raise-at 4,7: --max-update 7 ends training before 7",
        ),
        (
            (*POLICIES["epochs"][0], "--dsq-raise-at", "epoch:1,epoch:3"),
            "--dsq-raise-at epoch:1,epoch:3: --max-epoch 1 ends training before 3",
        ),
    ],
)
def test_flags_of_other_policies_and_points_out_of_reach_are_said(train, tmp_path, flags, line):
    log = train(tmp_path, *THREE, "--max-epoch", 1, *flags)
    assert log.count(line) == 1
