"""Runs as the report reads them: records, and the logs of plain fairseq."""

import json
import shutil

import pytest
from report import samples

from fairseq_dsq.report import runs
from fairseq_dsq.report.runs import read_run


def test_an_epoch_holds_what_was_recorded(tmp_path):
    path = samples.write(tmp_path, "run", samples.record(samples.DSQ, [7.0, 6.5], [0, 1], [samples.LOW, samples.HIGH]))
    run = read_run(path)
    assert run.epochs[1] == runs.Epoch(
        number=2, updates=20, ended=True, level=1, train_loss=7.0, valid_loss=6.5, arithmetic=1.048e8,
        arithmetic_baseline=1e9, dram_bytes=89215600.0, dram_baseline_bytes=2e8, arithmetic_relative=0.1048,
        dram_relative=0.446078, stash_bytes=2e6,
    )  # fmt: skip
    assert (run.name, run.incomplete, run.best) == ("run", "", {"loss": 6.5})
    assert {name: run.flags[name] for name in samples.DSQ} == samples.DSQ
    assert (run.flags["arch"], run.flags["criterion"]) == ("transformer_dsq", "dsq_cross_entropy")
    assert run.flags["dsq_cost_profile"] == "paper"


def test_a_record_stands_for_the_logs_beside_it_and_may_lie_elsewhere(tmp_path):
    folder = samples.write(tmp_path, "run", samples.record(samples.DSQ, [7.0]))
    samples.write(tmp_path, "run", samples.log([1.0, 2.0]), "train.log")
    assert read_run(folder).best == {"loss": 7.0}
    shutil.copy(folder / "dsq.jsonl", tmp_path / "mine.jsonl")
    copy = read_run(tmp_path / "mine.jsonl")
    assert (copy.name, copy.epochs, copy.flags) == ("mine", read_run(folder).epochs, read_run(folder).flags)
    assert read_run(folder / "dsq.jsonl").name == "run"


def test_the_last_validation_of_an_epoch_stands_and_the_best_of_all_is_kept(tmp_path):
    text = samples.start_line(1, valid_subset="valid,other")
    for update, loss, accuracy in ((4, 7.5, 60.1), (8, 6.5, 70.2), (10, 6.75, 69.9)):
        line = json.loads(samples.point_line(1, update, loss, ended=update == 10, accuracy=accuracy))
        line["valid"]["other"] = {"loss": 1.5, "accuracy": 99.9}
        text += json.dumps(line) + "\n"
    run = read_run(samples.write(tmp_path, "run", text))
    assert [epoch.valid_loss for epoch in run.epochs] == [6.75]
    assert run.best == {"loss": 6.5, "accuracy": 70.2}


def test_an_epoch_s_end_without_a_validation_has_its_costs(tmp_path):
    text = samples.start_line(2) + samples.point_line(1, 10, train=7.5) + samples.point_line(2, 20, 6.5)
    first, second = read_run(samples.write(tmp_path, "run", text)).epochs
    assert (first.valid_loss, first.train_loss, second.valid_loss) == (None, 7.5, 6.5)
    assert first.arithmetic == pytest.approx(3.18e7)


def test_a_valid_subset_called_train_is_no_training(tmp_path):
    text = samples.start_line(1, valid_subset="valid,train")
    line = json.loads(samples.point_line(1, 10, 6.0, 7.0))
    line["valid"]["train"] = {"loss": 1.5}
    (epoch,) = read_run(samples.write(tmp_path, "run", text + json.dumps(line) + "\n")).epochs
    assert (epoch.train_loss, epoch.valid_loss, epoch.stash_bytes) == (7.0, 6.0, 2e6)
    assert epoch.arithmetic == pytest.approx(3.18e7)
    for order in ("valid train", "train valid"):
        validations = {name: samples.valid_line(1, 10, loss, name) for name, loss in (("valid", 6.0), ("train", 1.5))}
        text = "".join(validations[name] for name in order.split()) + samples.train_line(1, 10, 7.0) + samples.DONE
        (epoch,) = read_run(samples.write(tmp_path, order, text, "train.log")).epochs
        assert (epoch.train_loss, epoch.valid_loss, epoch.ended) == (7.0, 6.0, True)
        # Within an epoch nothing of the training has been logged yet.
        text = "".join(validations[name] for name in order.split())
        (epoch,) = read_run(samples.write(tmp_path, f"{order} within", text, "train.log")).epochs
        assert (epoch.train_loss, epoch.valid_loss, epoch.ended) == (None, 6.0, False)


UNFINISHED = [
    (samples.point_line(2, 15, 6.0, ended=False), {}, "epoch 2 of 4 begun and not ended"),
    (samples.point_line(2, 20, 6.0), {}, "ended after epoch 2 of 4"),
    (samples.point_line(4, 40, 6.0), {}, ""),
    (samples.point_line(2, 15, 6.0, ended=False), {"max_update": 15}, ""),
    (samples.point_line(2, 15, 6.0, ended=False), {"max_update": 16}, "epoch 2 of 4 begun and not ended"),
    (samples.point_line(2, 20, 6.0), {"max_update": 30, "max_epoch": 0}, "ended after 20 of 30 updates"),
    (samples.point_line(2, 20, 6.0), {"max_update": 20, "max_epoch": 0}, ""),
    (samples.point_line(4, 40, 6.0), {"max_update": 50}, ""),
    (samples.point_line(2, 20, 6.0, lr=1e-9), {"stop_min_lr": 1e-8}, ""),
    (samples.point_line(2, 20, 6.0, lr=1e-7), {"stop_min_lr": 1e-8}, "ended after epoch 2 of 4"),
    (samples.point_line(2, 20, 6.0, lr=0.0), {"stop_min_lr": -1.0}, "ended after epoch 2 of 4"),
    # fairseq's patience judges losses of three digits.
    (samples.point_line(2, 15, 6.9999, ended=False), {"patience": 1}, ""),
    (samples.point_line(2, 15, 6.0, ended=False), {"stop_time_hours": 1.0}, ""),
    (samples.point_line(2, 15, 7.5, ended=False), {"patience": 1}, ""),
    (samples.point_line(2, 15, 6.0, ended=False), {"patience": 1}, "epoch 2 of 4 begun and not ended"),
    (samples.point_line(2, 15, 7.5, ended=False), {"patience": 2}, "epoch 2 of 4 begun and not ended"),
    (
        samples.point_line(2, 15, 7.5, ended=False, bleu=3.0),
        {"patience": 1, "best_checkpoint_metric": "bleu", "maximize_best_checkpoint_metric": True},
        "epoch 2 of 4 begun and not ended",
    ),
]


@pytest.mark.parametrize(("line", "flags", "expected"), UNFINISHED)
def test_a_run_that_did_not_end_says_so(tmp_path, line, flags, expected):
    text = samples.start_line(**{"max_epoch": 4, **flags}) + samples.point_line(1, 10, 7.0, bleu=2.0) + line
    assert read_run(samples.write(tmp_path, "run", text)).incomplete == expected


def test_early_stopping_counts_from_where_the_training_went_on(tmp_path):
    text = samples.start_line(9, patience=2) + samples.point_line(1, 10, 6.0) + samples.point_line(2, 20, 7.0)
    text += samples.start_line(9, 20, 3, patience=2) + samples.point_line(3, 30, 7.0)
    assert read_run(samples.write(tmp_path, "run", text)).incomplete == "ended after epoch 3 of 9"


def test_only_updates_since_a_record_begins_or_goes_on_are_charged_to_a_level(tmp_path):
    """A float training's 14 updates, then 7, then 9 that have no line, then 5."""
    text = samples.start_line(9, 14, 3, **samples.DSQ) + samples.point_line(3, 21, 6.0)
    text += samples.start_line(9, 30, 4, **samples.DSQ) + samples.point_line(5, 35, 5.0, level=1)
    run = read_run(samples.write(tmp_path, "run", text))
    assert (run.trained, run.levels) == ((("[2,2,2,16]", 7), ("[16,4,4,16]", 5)), ((0, 7), (1, 5)))
    assert run.notes == ("begins at update 14; what earlier updates cost is not in it",)


def test_a_record_that_begins_anew_within_the_first_epoch_says_so(tmp_path):
    """As after --reset-dataloader."""
    text = samples.start_line(1, 7, 1, **samples.DSQ) + samples.point_line(1, 14, 6.0)
    assert read_run(samples.write(tmp_path, "run", text)).notes == (
        "begins at update 7; what earlier updates cost is not in it",
    )


def test_flags_that_a_resume_changed_are_named_with_their_values_in_turn(tmp_path):
    text = ""
    for epoch, skip, rounding in ((1, "", "nearest"), (2, "decoder.*", "nearest"), (3, "", "stochastic")):
        flags = {**samples.DSQ, "dsq_skip": skip, "dsq_rounding": rounding, "seed": epoch}
        text += samples.start_line(epoch, 10 * epoch - 10, epoch, **flags) + samples.point_line(epoch, 10 * epoch, 6.0)
    assert read_run(samples.write(tmp_path, "run", text)).notes == (
        "trained with other flags in turn: --dsq-skip '' then 'decoder.*' then '', "
        "--dsq-rounding 'nearest' then 'stochastic'",
    )
    assert read_run(samples.write(tmp_path, "one", samples.record(samples.DSQ, [7.0]))).notes == ()


def test_losses_that_are_no_number_are_no_best(tmp_path):
    run = read_run(samples.write(tmp_path, "run", samples.record(samples.DSQ, [7.0, float("nan")])))
    assert run.best == {"loss": 7.0}
    assert run.epochs[1].valid_loss != run.epochs[1].valid_loss


def test_a_plain_log_has_losses_alone(tmp_path):
    run = read_run(samples.write(tmp_path, "plain", samples.log([6.0, 5.5]), "train.log"))
    assert [(epoch.number, epoch.updates, epoch.valid_loss, epoch.train_loss) for epoch in run.epochs] == [
        (1, 10, 6.0, 6.5), (2, 20, 5.5, 6.0),
    ]  # fmt: skip
    assert run.epochs[0].arithmetic is None and run.flags == {}
    assert (run.name, run.incomplete) == ("plain", "")


def test_abbreviated_numbers_and_raw_lines_of_log_file_are_read(tmp_path):
    text = samples.valid_line(1, 1234570, 6.5) + samples.train_line(1, 1234570, 7, dsq_stash_bytes="1.2e+07")
    assert '"1.23457e+06"' in text
    (epoch,) = read_run(samples.write(tmp_path, "a", text, "train.log")).epochs
    assert (epoch.updates, epoch.stash_bytes) == (1234570, 1.2e7)
    # --log-file: no time, no logger, each line of epoch n written n times.
    raw = "".join(line.split(" | ", 3)[3] * 3 for line in text.splitlines(keepends=True))
    assert read_run(samples.write(tmp_path, "b", raw, "train.log")).epochs == (epoch,)


BEGINS = "2026-11-22 02:04:28 | INFO | fairseq.trainer | "


def test_what_a_resumed_run_logs_again_replaces_all_from_there_on(tmp_path):
    again = samples.valid_line(3, 30, 5.5) + samples.train_line(3, 30, 5.75)
    run = read_run(samples.write(tmp_path, "run", samples.log([7, 6, 5, 4]) + BEGINS + "begin\n" + again, "train.log"))
    assert [(epoch.number, epoch.valid_loss) for epoch in run.epochs] == [(1, 7), (2, 6), (3, 5.5)]
    assert run.best == {"loss": 5.5}


def test_a_log_that_goes_on_from_a_checkpoint_forgets_what_came_after_it(tmp_path):
    text = samples.log([5, 4, 3]) + BEGINS + "Loaded checkpoint a run/checkpoint_last.pt (epoch 3 @ 20 updates)\n"
    run = read_run(samples.write(tmp_path, "run", text, "train.log"))
    assert [epoch.number for epoch in run.epochs] == [1, 2]
    assert run.incomplete == "epoch 2 is the last in a log without 'done training in'"
    text += BEGINS + "No existing checkpoint found a run/checkpoint_last.pt\n" + samples.valid_line(1, 10, 6)
    run = read_run(samples.write(tmp_path, "run", text, "train.log"))
    assert [(epoch.number, epoch.valid_loss) for epoch in run.epochs] == [(1, 6)]


def test_logs_of_one_folder_are_read_in_the_order_in_which_they_were_begun(tmp_path):
    late = samples.valid_line(4, 40, 4) + samples.train_line(4, 40, 4.5)
    samples.write(tmp_path, "run", samples.log([7, 6, 5], done=False), "slurm-9.out")
    samples.write(tmp_path, "run", late.replace("2026-11-22", "2026-11-23"), "slurm-10.out")
    samples.write(tmp_path, "run", "nothing of the kind\n", "preprocess.log")
    run = read_run(tmp_path / "run")
    assert [epoch.valid_loss for epoch in run.epochs] == [7, 6, 5, 4]
    assert run.name == "run"


def test_names_leave_out_what_says_nothing(tmp_path):
    text = samples.log([7])
    assert read_run(samples.write(tmp_path, "bfp", text, "train.log") / "train.log").name == "bfp"
    assert read_run(samples.write(tmp_path, "bfp", text, "seed1.log") / "seed1.log").name == "seed1"
    assert read_run(samples.write(tmp_path, "a\x1b[31mb", text, "train.log")).name == "a?[31mb"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04\0\0\0\0", "binary data"),
        (b"Lorem ipsum\n", "text without an epoch in it (it begins 'Lorem ipsum')"),
        (b'{"epoch": 3, "loss": 1.5}\n', "text without an epoch in it"),
        (b"epoch 001 | loss 5 | num_updates 4 | lr 1\n", "text without an epoch in it"),
        (b'{"epoch": "x", "train_loss": "1", "train_num_updates": "4"}\n', "text without an epoch in it"),
    ],
)
def test_a_foreign_file_is_refused_in_one_line(tmp_path, content, found):
    path = tmp_path / "some.log"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_run(path)
    message = str(error.value)
    assert message.startswith(f"{path}: {found}") and "expected the folder of a run with dsq.jsonl" in message
    assert "\n" not in message


def test_a_folder_without_a_run_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a folder without an epoch in it \(empty\), expected the folder of a run"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder, expected the folder of a run"):
        read_run(tmp_path / "missing")
    samples.write(tmp_path, "begun", samples.start_line(3))
    with pytest.raises(ValueError, match=r"dsq\.jsonl: a record that ends before the first validation"):
        read_run(tmp_path / "begun")
