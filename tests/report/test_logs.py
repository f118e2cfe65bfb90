"""Parsing of training logs, on small texts in fairseq's own words."""

import json

import pytest
from report import samples

from fairseq_dsq.report import logs
from fairseq_dsq.report.logs import read_run


@pytest.fixture
def write(tmp_path):
    def _write(text, name="run.log"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def simple(line):
    """A line of ``--log-format json`` as ``simple`` has it."""
    head, _, body = line.partition("{")
    record = json.loads("{" + body)
    split = head.split(" | ")[2]
    epoch = record.pop("epoch")
    stats = " | ".join(f"{name.removeprefix(split + '_')} {value}" for name, value in record.items())
    subset = "" if split == "train" else f"valid on '{split}' subset | "
    return f"{head}epoch {epoch:03d} | {subset}{stats}\n"


def test_an_epoch_holds_what_was_logged(write):
    run = read_run(write(samples.log(samples.DSQ, [7.0, 6.5], [0, 1], [samples.LOW, samples.HIGH])))
    assert run.epochs[1] == logs.Epoch(
        number=2, updates=20, level=1, train_loss=7.0, valid_loss=6.5, arithmetic=1.048e8, arithmetic_baseline=1e9,
        dram_bytes=8.92156e7, dram_baseline_bytes=2e8, arithmetic_relative=0.1048, dram_relative=0.446078,
        stash_bytes=2e6,
    )  # fmt: skip
    assert (run.name, run.incomplete, run.best) == ("run", "", {"loss": 6.5})
    assert {name: run.flags[name] for name in samples.DSQ} == samples.DSQ
    assert (run.flags["arch"], run.flags["criterion"]) == ("transformer_dsq", "dsq_cross_entropy")


def test_simple_lines_and_raw_lines_of_log_file_give_the_same(write):
    text = samples.log(samples.DSQ, [7.0, 6.5, 6.25], [0, 0, 1], [samples.LOW, samples.LOW, samples.HIGH])
    lines = [simple(line) if '{"epoch"' in line else line for line in text.splitlines(keepends=True)]
    expected = read_run(write(text)).epochs
    assert read_run(write("".join(lines))).epochs == expected
    # --log-file: no time, no logger, each line of epoch n written n times, and no "begin training epoch".
    raw = [line.split(" | ", 3)[3] * 3 for line in lines if "fairseq.trainer" not in line]
    assert read_run(write("".join(raw))).epochs == expected
    # A terminal: bars, carriage returns, cursor movements.
    bar = "epoch 002:  50%|#####     | 3/6 [00:01<00:01, loss=6.96, wps=5194.8]\r\x1b[A"
    assert read_run(write("".join(bar + line.replace("\n", "\r\n") for line in lines))).epochs == expected


def test_the_last_validation_of_an_epoch_stands_and_the_best_of_all_is_kept(write):
    text = (
        samples.valid_line(1, 4, 7.5, accuracy="60.1")
        + samples.valid_line(1, 8, 6.5, accuracy="70.2")
        + samples.valid_line(1, 8, 1.5, subset="valid1", accuracy="99.9")
        + samples.valid_line(1, 10, 6.75, accuracy="69.9")
        + samples.valid_line(1, 10, 1.25, subset="valid1", accuracy="99.9")
        + samples.train_line(1, 10, 7)
    )
    run = read_run(write(text))
    assert [epoch.valid_loss for epoch in run.epochs] == [6.75]
    assert run.best == {"loss": 6.5, "accuracy": 70.2}


def test_the_first_valid_subset_is_the_one_that_the_command_names(write):
    text = samples.config_line(1).replace("'valid_subset': 'valid'", "'valid_subset': 'dev,valid'")
    text += samples.valid_line(1, 5, 3, subset="dev") + samples.valid_line(1, 5, 4) + samples.train_line(1, 5, 7)
    assert read_run(write(text)).epochs[0].valid_loss == 3


def test_abbreviated_numbers_are_read(write):
    text = samples.valid_line(1, 1234570, 6.5) + samples.train_line(1, 1234570, 7, 0, samples.LOW, stash=1.2e7)
    assert '"1.23457e+06"' in text and '"1.2e+07"' in text
    (epoch,) = read_run(write(text)).epochs
    assert (epoch.updates, epoch.stash_bytes) == (1234570, 1.2e7)


def test_what_a_resumed_run_logs_again_replaces_all_from_there_on(write):
    first = samples.log(samples.DSQ, [7, 6, 5, 4])
    again = samples.config_line(6, **samples.DSQ) + samples.begin_line(3)
    again += samples.valid_line(3, 30, 5.5) + samples.train_line(3, 30, 5.75)
    run = read_run(write(first + again))
    assert [(epoch.number, epoch.valid_loss) for epoch in run.epochs] == [(1, 7), (2, 6), (3, 5.5)]
    assert run.best == {"loss": 5.5}
    assert run.incomplete == "ended after epoch 3 of 6"


BEGINS = "2026-11-22 02:04:28 | INFO | fairseq.trainer | "


def test_what_a_run_from_the_start_follows_is_another_run(write):
    first = samples.log(samples.FLOAT32, [5, 4, 3])
    again = (
        samples.config_line(2, **samples.STATIC) + BEGINS + "No existing checkpoint found a run/checkpoint_last.pt\n"
    )
    with pytest.raises(ValueError, match="a log that ends before its first epoch"):
        read_run(write(first + again))
    run = read_run(write(first + again + samples.begin_line(1) + samples.valid_line(1, 10, 6)))
    assert [(epoch.number, epoch.valid_loss) for epoch in run.epochs] == [(1, 6)]
    assert run.best["loss"] == 6
    assert run.flags["dsq_levels"] == "[16,4,4,16]" and run.flags["dsq_format"] == "bfp"


def test_a_run_that_goes_on_from_its_checkpoint_forgets_what_came_after_it(write):
    text = samples.log(samples.STATIC, [5, 4, 3], max_epoch=4, done=False)
    text += BEGINS + "Loaded checkpoint a run/checkpoint_last.pt (epoch 3 @ 20 updates)\n"
    run = read_run(write(text))
    assert [epoch.number for epoch in run.epochs] == [1, 2]
    assert run.best["loss"] == 4


def test_the_configuration_of_a_generation_is_not_the_run_s(write):
    text = samples.log(samples.STATIC, [5, 4])
    other = samples.config_line(0, **samples.FLOAT32).replace(
        "'dataset'", "'common_eval': {'path': 'a/b.pt'}, 'dataset'"
    )
    run = read_run(write(text + other))
    assert run.flags["dsq_format"] == "bfp" and run.flags["max_epoch"] == "2"


@pytest.mark.parametrize("convert", [lambda line: line, simple], ids=["json", "simple"])
def test_a_log_cut_anywhere_gives_a_part_of_the_whole(write, convert):
    text = samples.log(samples.DSQ, [7.125, 6.125], [0, 1], [samples.LOW, samples.HIGH])
    text = "".join(convert(line) if '{"epoch"' in line else line for line in text.splitlines(keepends=True))
    whole = read_run(write(text)).epochs
    seen = set()
    for end in range(len(samples.config_line(2, **samples.DSQ)), len(text)):
        path = write(text[:end])
        try:
            epochs = read_run(path).epochs
        except ValueError as error:
            assert "log that ends" in str(error)
            seen.add(0)
            continue
        for epoch, full in zip(epochs, whole, strict=False):
            assert epoch.updates == full.updates, end
            for field in ("level", "train_loss", "valid_loss", "arithmetic", "dram_bytes", "stash_bytes"):
                assert getattr(epoch, field) in (None, getattr(full, field)), (end, field)
        seen.add(len(epochs))
    assert seen == {0, 1, 2}


def test_a_run_killed_in_its_second_epoch_says_so(write):
    text = samples.log(samples.DSQ, [7, 6], max_epoch=5, done=False) + samples.begin_line(3)
    assert read_run(write(text)).incomplete == "epoch 3 of 5 begun and not ended"
    assert read_run(write(text + samples.valid_line(3, 25, 5.5))).epochs[-1].valid_loss == 5.5
    raw = "".join(line.split(" | ", 3)[3] for line in text.splitlines(keepends=True)[:-1])
    assert read_run(write(raw)).incomplete == "ended after epoch 2 of 5"
    raw += "Start iterating over samples\n"
    assert read_run(write(raw)).incomplete == "epoch 3 of 5 begun and not ended"
    assert read_run(write(raw + "done training in 1.4 seconds\n")).incomplete == ""


def test_logs_of_one_folder_are_read_in_the_order_in_which_they_were_begun(write, tmp_path):
    early = samples.log(samples.DSQ, [7, 6, 5], max_epoch=4, done=False)
    late = samples.config_line(4) + samples.valid_line(4, 40, 4) + samples.train_line(4, 40, 4.5)
    write(early, "run/slurm-9.out")
    write(late.replace("2026-11-22", "2026-11-23"), "run/slurm-10.out")
    write("nothing of the kind\n", "run/preprocess.log")
    run = read_run(tmp_path / "run")
    assert [epoch.valid_loss for epoch in run.epochs] == [7, 6, 5, 4]
    assert run.name == "run"


def test_names_leave_out_what_says_nothing(write):
    text = samples.log(samples.DSQ, [7])
    assert read_run(write(text, "bfp/train.log")).name == "bfp"
    assert read_run(write(text, "bfp/seed1.log")).name == "seed1"
    assert read_run(write(text, "a\x1b[31mb/train.log")).name == "a?[31mb"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04\0\0\0\0", "binary data"),
        (b"Lorem ipsum\n", "text without an epoch in it (it begins 'Lorem ipsum')"),
        (b'{"epoch": 3, "loss": 1.5}\n', "text without an epoch in it"),
        (b"epoch 001 | loss 5 | lr 1\n", "text without an epoch in it"),
        (b'{"epoch": "x", "train_loss": "1", "train_num_updates": "4"}\n', "text without an epoch in it"),
        (samples.config_line(4).encode(), "a log that ends before its first epoch"),
        ((samples.config_line(4) + samples.begin_line(1)).encode(), "a log that ends within epoch 1"),
    ],
)
def test_a_foreign_file_is_refused_in_one_line(tmp_path, content, found):
    path = tmp_path / "some.log"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_run(path)
    message = str(error.value)
    assert message.startswith(f"{path}: {found}") and "expected a log of fairseq-train" in message
    assert "\n" not in message


def test_a_folder_without_a_log_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a folder without an epoch in it \(empty\), expected a log"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder, expected a log"):
        read_run(tmp_path / "missing")


def test_a_corrupt_event_file_is_refused(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "events.out.tfevents.1").write_bytes(b"\1\2\3 not events")
    with pytest.raises(ValueError, match="a folder without an epoch in it"):
        read_run(tmp_path)


def test_losses_that_are_no_number_are_no_best(write):
    run = read_run(write(samples.log(samples.DSQ, [7.0, float("nan")])))
    assert run.best == {"loss": 7.0}
    assert run.epochs[1].valid_loss != run.epochs[1].valid_loss
