"""The record that a training keeps, held to what fairseq logs; killed, resumed, copied, begun anew."""

import json
import shutil

import pytest
from e2e.test_distributed import FLAGS as TWO_WORKERS
from e2e.test_distributed import train as train_ranks
from fairseq import checkpoint_utils

from fairseq_dsq import record
from fairseq_dsq.kernels import native
from fairseq_dsq.record import Point, Start
from fairseq_dsq.report.runs import read_run

FLAGS = (
    "--dsq-levels", "[2,2,2,16] [16,4,4,16]", "--dsq-patience", 2, "--dsq-min-delta", 100,
    "--update-epoch-batch-itr", "True",
)  # fmt: skip
RISES_AT_ONCE = (*FLAGS, "--dsq-patience", 1)
TIMES = {"wps", "ups", "train_wall", "wall"}


def points(folder):
    return [line for line in record.read(folder / record.NAME) if isinstance(line, Point)]


def untimed(folder):
    """What two trainings of the same flags share."""
    return [{name: value for name, value in vars(point).items() if name != "wall_s"} for point in points(folder)]


def logged(log, split):
    """(epoch, updates) to fairseq's values as it prints them, but times."""
    found = {}
    for line in log.splitlines():
        if f'"{split}_num_updates"' in line:
            values = json.loads(line[line.index("{") :])
            own = {name.removeprefix(f"{split}_"): value for name, value in values.items() if name != "epoch"}
            key = (values["epoch"], int(own["num_updates"]))
            found[key] = {name: value for name, value in own.items() if name not in TIMES}
    return found


def as_logged(values):
    """A validation's metrics; its loss is rounded in the log alone."""
    return {**values, "loss": round(values["loss"], 3)}


def shown(values):
    return {name: f"{value:g}" for name, value in values.items()}


@pytest.mark.parametrize(
    "flags",
    [
        ("--validate-interval-updates", 4, "--valid-subset", "valid,test", "--max-epoch", 3),
        ("--validate-interval", 2, "--max-epoch", 3),
        ("--disable-validation", "--max-update", 9),
        ("--validate-after-updates", 99, "--max-update", 2, "--no-last-checkpoints"),
        ("--save-interval-updates", 4, "--max-update", 9),
        ("--stop-time-hours", 1e-9),
        ("--stop-time-hours", 1e-9, "--disable-validation"),
        ("--stop-time-hours", 1e-9, "--validate-interval", 2, "--save-interval", 2, "--update-freq", 99),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_the_record_holds_what_fairseq_logs(train, tmp_path, flags):
    log = train(tmp_path, *FLAGS, *flags)
    found = points(tmp_path)
    trained = {(point.epoch, point.update): shown(point.train) for point in found}
    for key, values in logged(log, "train").items():
        assert trained.pop(key) == values
    for split in ("valid", "test"):
        valid = {(point.epoch, point.update): point.valid[split] for point in found if split in point.valid}
        assert {key: shown(as_logged(values)) for key, values in valid.items()} == logged(log, split)
        assert all(values["loss"] != round(values["loss"], 3) for values in valid.values())
        trained = {key: values for key, values in trained.items() if key not in valid}
    assert trained == {}
    assert len({point.update for point in found}) == len(found)
    assert sum(updates for _, updates in read_run(tmp_path).levels) == found[-1].update
    for point in found:
        assert point.level == float(point.valid.get("valid", point.train)["dsq_level"])
        assert point.precision == ("[bfp2,bfp2,bfp2,bfp16]", "[bfp16,bfp4,bfp4,bfp16]")[point.level]
    not_counted = log.count("does not count in the precision schedule")
    assert sum(not point.counts for point in found if point.valid) == not_counted
    (start,) = (line for line in record.read(tmp_path / record.NAME) if isinstance(line, Start))
    assert (start.arch, start.criterion) == ("transformer_dsq", "dsq_label_smoothed_cross_entropy")
    assert start.levels == ("[bfp2,bfp2,bfp2,bfp16]", "[bfp16,bfp4,bfp4,bfp16]")


def test_a_validation_of_the_training_set_ends_no_epoch(train, tmp_path):
    flags = (*FLAGS[:-2], "--valid-subset", "valid,train", "--save-interval-updates", 2)
    shared = "by one iterator for training and validation"
    assert shared not in train(tmp_path, *flags, *FLAGS[-2:], "--max-epoch", 1)
    *within, last = points(tmp_path)
    assert len(within) > 1 and {(point.epoch_ended, point.counts) for point in within} == {(False, False)}
    assert (last.epoch_ended, last.counts) == (True, True)
    assert shared in train(tmp_path / "shared", *flags, "--max-update", 1)


@pytest.fixture(scope="module")
def undisturbed(cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    cli.train(folder, *FLAGS, "--save-interval-updates", 4, "--max-epoch", 3)
    return folder


def test_a_record_goes_on_where_the_checkpoint_of_a_killed_training_is(train, undisturbed, tmp_path):
    """Killed after a line was written and before its checkpoint, in a line, and before an epoch's log line."""
    flags = (*FLAGS, "--save-interval-updates", 4)
    train(tmp_path, *flags, "--max-epoch", 1)
    early = (tmp_path / "checkpoint_last.pt").read_bytes()
    train(tmp_path, *flags, "--max-epoch", 2)
    (tmp_path / "checkpoint_last.pt").write_bytes(early)
    with open(tmp_path / record.NAME, "ab") as file:
        file.write(b'{"update": 13, "epoch": 3, "tra')
    train(tmp_path, *flags, "--max-epoch", 3)
    assert untimed(tmp_path) == untimed(undisturbed)
    starts = [line.update for line in record.read(tmp_path / record.NAME) if isinstance(line, Start)]
    assert starts == [0, points(undisturbed)[1].update]
    assert [path.name for path in tmp_path.glob("dsq.*")] == [record.NAME]


def test_a_record_goes_on_where_checkpoints_have_a_suffix(train, tmp_path):
    for updates in (1, 2):
        log = train(tmp_path, *FLAGS, "--checkpoint-suffix=-a", "--disable-validation", "--max-update", updates)
    assert f"{tmp_path}/checkpoint_last-a.pt (epoch 1 @ 1 updates)" in log
    assert [line.update for line in record.read(tmp_path / record.NAME)] == [0, 1, 1, 2]
    assert [path.name for path in tmp_path.glob("dsq.*")] == [record.NAME]


def test_a_record_reports_wherever_it_lies(undisturbed, tmp_path):
    shutil.copy(undisturbed / record.NAME, tmp_path / "mine.jsonl")
    copy, own = read_run(tmp_path / "mine.jsonl"), read_run(undisturbed)
    assert (copy.epochs, copy.best, copy.flags, copy.incomplete) == (own.epochs, own.best, own.flags, "")
    assert [epoch.number for epoch in own.epochs] == [1, 2, 3]
    text = (tmp_path / "mine.jsonl").read_text()
    (tmp_path / "mine.jsonl").write_text(text[: len(text) // 2])
    assert "of 3" in read_run(tmp_path / "mine.jsonl").incomplete


def test_a_training_that_goes_on_in_another_folder_takes_its_record_along(train, undisturbed, tmp_path):
    flags = ("--dsq-cost-profile", "operands", "--restore-file", undisturbed / "checkpoint_last.pt", "--max-epoch", 4)
    log = train(tmp_path, *FLAGS, *flags)
    assert log.count("--dsq-cost-profile paper up to update") == 1
    assert "paper, operands" in read_run(tmp_path).notes[0]
    assert untimed(tmp_path)[:-1] == untimed(undisturbed)
    assert points(tmp_path)[-1].epoch == 4


@pytest.mark.parametrize(
    ("flag", "epoch"), [("--finetune-from-model", 1), ("--reset-optimizer", 4), ("--reset-dataloader", 1)]
)
def test_a_training_that_begins_anew_keeps_another_s_record_aside(train, undisturbed, tmp_path, flag, epoch):
    own = tmp_path / record.NAME
    shutil.copy(undisturbed / record.NAME, own)
    checkpoint = undisturbed / "checkpoint_last.pt"
    flags = (flag, checkpoint) if flag == "--finetune-from-model" else (flag, "--restore-file", checkpoint)
    checkpoint_utils.save_checkpoint.best = 9.0  # as a training before in this process leaves it
    log = train(tmp_path, *FLAGS, *flags, "--max-epoch", epoch)
    assert ("the precision schedule starts anew" in log) == (flag != "--reset-dataloader")
    assert f"{own}: has another training; it is dsq.1.jsonl now" in log
    assert (tmp_path / "dsq.1.jsonl").read_bytes() == (undisturbed / record.NAME).read_bytes()
    start, point = record.read(own)
    counted = 0 if flag in ("--finetune-from-model", "--reset-optimizer") else points(undisturbed)[-1].update
    assert (start.update, point.epoch) == (counted, epoch)
    assert sum(updates for _, updates in read_run(tmp_path).trained) == points(undisturbed)[-1].update // 3
    if flag == "--finetune-from-model":
        # which fairseq resumes
        train(tmp_path, *FLAGS, *flags, "--max-update", points(tmp_path)[-1].update + 1, "--disable-validation")
        assert [(point.epoch, point.epoch_ended) for point in points(tmp_path)] == [(1, True), (2, False)]


def test_a_checkpoint_without_an_optimizer_s_state_begins_another_record_since_fairseq_counts_anew(train, tmp_path):
    flags = (*RISES_AT_ONCE, "--no-save-optimizer-state")
    train(tmp_path, *flags, "--max-epoch", 2)
    updates = points(tmp_path)[-1].update
    log = train(tmp_path, *flags, "--max-epoch", 4, "--validate-interval", 2)
    assert "has another training; it is dsq.1.jsonl now" in log
    start, *lines = record.read(tmp_path / record.NAME)
    assert (start.update, start.epoch) == (0, 3)
    assert [(line.epoch, line.update, line.counts) for line in lines] == [(3, updates // 2, False), (4, updates, True)]
    assert read_run(tmp_path).trained == (("[16,4,4,16]", updates),)


def test_there_is_no_record_without_checkpoints(train, tmp_path):
    train(tmp_path, *FLAGS, "--max-epoch", 1, "--no-save")
    assert not (tmp_path / record.NAME).exists()


def test_two_workers_write_one_record(cli, tmp_path):
    train_ranks(cli, 2, tmp_path, *TWO_WORKERS, "--max-epoch", 1)
    log, _ = train_ranks(cli, 2, tmp_path, *TWO_WORKERS, "--max-epoch", 2)
    assert [(point.epoch, point.level) for point in points(tmp_path)] == [(1, 0), (2, 0)]
    (values,) = logged(log, "train").values()
    assert shown(points(tmp_path)[-1].train) == values
    starts = [line for line in record.read(tmp_path / record.NAME) if isinstance(line, Start)]
    assert [start.machine["workers"] for start in starts] == ["2", "2"]
    assert {start.machine["cpu_kernels"] for start in starts} == {native.kernels.isa if native.kernels else "none"}
