"""The schedule's state through fairseq-train: what is stopped, saved, averaged, resumed with other flags, or idle.

Trainings run in this process, which saves the seconds that each command takes to start.
"""

import json
import re

import pytest
import torch
from e2e.states import assert_equal_states, load_model
from fairseq import checkpoint_utils

import fairseq_dsq
from fairseq_dsq.cli import main
from fairseq_dsq.errors import DSQError
from fairseq_dsq.report.runs import read_run

LEVELS = ("--dsq-levels", "[2,2,2,16] [16,4,4,16]")
RISES_AT_ONCE = (*LEVELS, "--dsq-patience", 1, "--dsq-min-delta", 100)
# Without it fairseq draws the batches of all epochs at the start.
EXACT_RESUME = ("--update-epoch-batch-itr", "True")
FROZEN = ("--lr", 0, "--dropout", 0)


def model_of(path, **overrides):
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], arg_overrides=overrides)
    return models[0].eval()


def precision_of(model):
    return model.decoder.layers[0].fc1.context.config.precision.q


def logged(log, key):
    """The values of a metric, in the log's order."""
    records = [json.loads(line[line.index("{") :]) for line in log.splitlines() if f'"{key}"' in line and '{"' in line]
    return [float(record[key]) for record in records]


@pytest.mark.parametrize(
    "flags",
    [(), ("--ema-fp32",), ("--ema-update-freq", 2), ("--ema-start-update", 3)],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_an_average_of_the_weights_in_training_is_at_the_training_s_level(train, tmp_path, flags):
    flags = (*RISES_AT_ONCE, "--store-ema", "--ema-decay", 0.9, *flags)
    train(tmp_path / "run", *flags, "--max-epoch", 2)
    checkpoint_utils.save_ema_as_checkpoint(tmp_path / "run/checkpoint_last.pt", str(tmp_path / "scored.pt"))
    assert precision_of(model_of(tmp_path / "scored.pt")) == (2, 2, 2, 16)
    train(tmp_path / "run", *flags, "--max-epoch", 3)
    checkpoint_utils.save_ema_as_checkpoint(tmp_path / "run/checkpoint_last.pt", str(tmp_path / "ema.pt"))
    model = model_of(tmp_path / "ema.pt")
    assert precision_of(model) == (16, 4, 4, 16)
    assert model.dsq.state.level == 1
    weights = load_model(tmp_path / "run")["decoder.embed_tokens.weight"]
    assert 0 < (weights - model.decoder.embed_tokens.weight).abs().max() < 0.1


def test_an_average_starts_from_a_model_of_other_levels(train, tmp_path):
    train(tmp_path / "seed", "--dsq-levels", "[8,8,8,16]", "--store-ema", "--max-epoch", 1)
    seed = ("--store-ema", "--ema-seed-model", tmp_path / "seed/checkpoint_last.pt")
    train(tmp_path / "run", *LEVELS, *seed, "--max-epoch", 1)
    checkpoint_utils.save_ema_as_checkpoint(tmp_path / "run/checkpoint_last.pt", str(tmp_path / "ema.pt"))
    assert precision_of(model_of(tmp_path / "ema.pt")) == (2, 2, 2, 16)


@pytest.fixture(scope="module")
def risen(cli, tmp_path_factory):
    """The second of two equal validations raised the level, and is the best; two subsets were scored. With its log."""
    folder = tmp_path_factory.mktemp("risen")
    log = cli.train(folder / "run", *RISES_AT_ONCE, *FROZEN, "--valid-subset", "valid,test", "--max-epoch", 2)
    (folder / "log").write_text(log)
    return folder


def test_a_checkpoint_is_what_was_scored_and_training_goes_on_at_the_raised_level(cli, train, risen, tmp_path):
    log = (risen / "log").read_text()
    assert "precision rises from [2,2,2,16] to [16,4,4,16]" in log
    assert logged(log, "valid_dsq_level") == [0, 0]
    assert logged(log, "test_dsq_level") == [0, 0]
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        model = model_of(risen / "run" / name)
        assert precision_of(model) == (2, 2, 2, 16)
        assert (model.dsq.level_in_force, model.dsq.state.level) == (0, 1)
    out, err = cli.run(
        "fairseq-validate", cli.data, "--user-dir", fairseq_dsq.__path__[0], "--task", "translation",
        "--max-tokens", 600, "--path", risen / "run/checkpoint_best.pt", "--log-format", "json", "--cpu",
    )  # fmt: skip
    assert logged(out + err, "valid_loss") == logged(log, "valid_loss")[-1:]
    assert "precision level in force: 0, [2,2,2,16]" in out + err
    resumed = train(
        tmp_path, *RISES_AT_ONCE, *FROZEN, "--restore-file", risen / "run/checkpoint_last.pt", "--max-epoch", 3
    )
    assert "precision level in force: 1, [16,4,4,16]" in resumed
    assert logged(resumed, "train_dsq_level") == [1]
    assert precision_of(model_of(tmp_path / "checkpoint_last.pt")) == (16, 4, 4, 16)


STOPS = [
    ("--max-update", 3),
    ("--stop-time-hours", 1e-9),
    ("--max-update", 4, "--save-interval-updates", 1),
]


@pytest.fixture(scope="module")
def undisturbed(cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    cli.train(folder, *LEVELS, "--dsq-patience", 2, "--dsq-min-delta", 100, *EXACT_RESUME, "--max-epoch", 4)
    return load_model(folder)


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: " ".join(map(str, stop)))
def test_a_stop_within_an_epoch_and_a_resume_equal_all_in_one_go(train, undisturbed, tmp_path, stop):
    flags = (*LEVELS, "--dsq-patience", 2, "--dsq-min-delta", 100, *EXACT_RESUME, "--max-epoch", 4)
    assert (undisturbed["dsq.level"], undisturbed["dsq.bad_validations"]) == (1, 1)
    log = train(tmp_path, *flags, *stop)
    assert "does not count in the precision schedule" in log
    stopped = load_model(tmp_path)
    assert (stopped["dsq.level"], stopped["dsq.bad_validations"], stopped["dsq.best_loss"]) == (0, 0, torch.inf)
    train(tmp_path, *flags)
    assert_equal_states(undisturbed, load_model(tmp_path))


def test_saves_within_epochs_change_nothing(train, undisturbed, tmp_path):
    flags = (*LEVELS, "--dsq-patience", 2, "--dsq-min-delta", 100, *EXACT_RESUME, "--max-epoch", 4)
    train(tmp_path, *flags, "--save-interval-updates", 2, "--keep-interval-updates", 1)
    assert_equal_states(undisturbed, load_model(tmp_path))


def test_a_validation_at_an_interval_of_updates_counts_once_where_a_stop_coincides(train, tmp_path):
    flags = (*RISES_AT_ONCE, *EXACT_RESUME, "--validate-interval-updates", 2, "--validate-interval", 99)
    train(tmp_path / "whole", *flags, "--max-update", 6, "--dsq-patience", 2)
    train(tmp_path / "halves", *flags, "--max-update", 4, "--dsq-patience", 2)
    half = load_model(tmp_path / "halves")
    assert (half["dsq.level"], half["dsq.bad_validations"]) == (0, 1)
    train(tmp_path / "halves", *flags, "--max-update", 6, "--dsq-patience", 2)
    whole = load_model(tmp_path / "whole")
    assert (whole["dsq.level"], whole["dsq.bad_validations"]) == (1, 0)
    assert_equal_states(whole, load_model(tmp_path / "halves"))


def test_a_stop_at_the_end_of_an_epoch_without_validation_does_not_count(train, tmp_path):
    log = train(tmp_path, *RISES_AT_ONCE, "--validate-interval", 2, "--max-epoch", 3)
    (updates,) = {int(value) for value in logged(log, "train_num_updates")[:1]}
    assert load_model(tmp_path)["dsq.counted_update"] == 2 * updates
    log = train(tmp_path / "stopped", *RISES_AT_ONCE, "--validate-interval", 2, "--max-update", updates)
    assert "does not count" in log
    assert load_model(tmp_path / "stopped")["dsq.counted_update"] == -1


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (("--dsq-levels", "[2,2,2,16] [4,4,4,16] [16,4,4,16]"), 2),
        (("--dsq-levels", "[16,4,4,16] [16,8,8,16]"), 0),
        (("--dsq-levels", "[15,3,3,15] [16,16,16,16]", "--dsq-sign-bit", "extra"), 0),
    ],
)
def test_the_checkpoint_s_level_is_found_among_others_by_value(train, risen, tmp_path, flags, level):
    log = train(tmp_path, *flags, *FROZEN, "--restore-file", risen / "run/checkpoint_last.pt", "--max-epoch", 3)
    assert logged(log, "train_dsq_level") == [level]
    assert f"precision level in force: {level}, " in log
    low, high = (precision for precision, _ in read_run(tmp_path).trained)
    assert low == ("[2,2,2,16]" if flags[1].startswith("[2,") else "[bfp2,bfp2,bfp2,bfp16]")
    assert high == flags[1].split()[level]
    assert model_of(tmp_path / "checkpoint_last.pt").dsq.levels[level].stash("input").bits == 4


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (("--dsq-levels", "[2,2,2,16] [4,4,4,16]"), r"these are \[bfp2,bfp2,bfp2,bfp16\] \[bfp4,bfp4,bfp4,bfp16\]"),
        (("--dsq-format", "fixed"), r"these are \[fixed4,fixed4,fixed4,fixed16\] \[fixed16,fixed4,fixed4,fixed16\]"),
        (("--dsq-format", "float32"), r"these are \[float32,float32,float32,float32\]"),
    ],
)
def test_levels_without_the_checkpoint_s_are_refused_in_one_line(train, risen, tmp_path, flags, given):
    with pytest.raises(DSQError, match=rf"argument --dsq-levels: got .*\[bfp16,bfp4,bfp4,bfp16\].*{given}") as stop:
        train(tmp_path, *flags, "--restore-file", risen / "run/checkpoint_last.pt", "--max-epoch", 3)
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.glob("*.pt"))
    log = train(tmp_path, *flags, "--finetune-from-model", risen / "run/checkpoint_last.pt", "--max-epoch", 1)
    assert logged(log, "train_dsq_level") == [0]


def test_evaluation_with_other_levels_is_refused_too(risen):
    with pytest.raises(DSQError, match=r"argument --dsq-levels: got '.4,4,4,16.', expected .*bfp2,bfp2,bfp2,bfp16"):
        model_of(risen / "run/checkpoint_last.pt", dsq_levels="[4,4,4,16]")
    wider = model_of(risen / "run/checkpoint_last.pt", dsq_levels="[2,2,2,16] [2,4,4,16] [16,4,4,16]")
    assert (precision_of(wider), wider.dsq.state.level) == ((2, 2, 2, 16), 2)


def test_a_checkpoint_of_integers_and_indices_still_loads(risen, tmp_path):
    """As it was before levels were kept by value."""
    state = checkpoint_utils.load_checkpoint_to_cpu(str(risen / "run/checkpoint_last.pt"))
    parameters = {name: value for name, value in state["model"].items() if not name.startswith("dsq.")}
    buffers = {"level": torch.tensor(1), "best_loss": torch.tensor(4.5).double(), "bad_validations": torch.tensor(2)}
    state["model"] = {**parameters, **{f"dsq.{name}": value for name, value in buffers.items()}}
    torch.save(state, tmp_path / "old.pt")
    model = model_of(tmp_path / "old.pt")
    assert precision_of(model) == (16, 4, 4, 16)
    assert (model.dsq.state.best_loss, model.dsq.state.bad_validations) == (4.5, 2)


def fairseq_average(*states):
    """The arithmetic of fairseq's scripts/average_checkpoints.py, which compares the lists of names first."""
    names = list(states[0])
    total = {}
    for state in states:
        if list(state) != names:
            raise KeyError(f"expected list of params: {names}, but found: {list(state)}")
        for name in names:
            total[name] = total[name] + state[name] if name in total else state[name].clone()
    return {
        name: value / len(states) if value.is_floating_point() else value // len(states)
        for name, value in total.items()
    }


def test_checkpoints_of_two_levels_are_averaged_at_the_higher_and_fairseq_s_script_refuses(
    train, risen, tmp_path, capsys
):
    flags = (*RISES_AT_ONCE, "--restore-file", risen / "run/checkpoint_last.pt", "--max-epoch")
    train(tmp_path / "3", *flags, 3)
    train(tmp_path / "4", *RISES_AT_ONCE, "--restore-file", tmp_path / "3/checkpoint_last.pt", "--max-epoch", 4)
    low, *high = (
        risen / "run/checkpoint_last.pt",
        tmp_path / "3/checkpoint_last.pt",
        tmp_path / "4/checkpoint_last.pt",
    )
    with pytest.raises(KeyError, match="expected list of params"):
        fairseq_average(load_model(low), load_model(high[0]))

    # Among checkpoints of one level it works, and `fairseq-dsq average` agrees.
    document = checkpoint_utils.load_checkpoint_to_cpu(str(high[0]))
    document["model"] = fairseq_average(*map(load_model, high))
    torch.save(document, tmp_path / "script.pt")
    assert main(["average", str(tmp_path / "same.pt"), *map(str, high)]) == 0
    script, same = model_of(tmp_path / "script.pt"), model_of(tmp_path / "same.pt")
    assert precision_of(script) == precision_of(same) == (16, 4, 4, 16)
    for mean, own in zip(script.parameters(), same.parameters(), strict=True):
        assert torch.allclose(mean, own, rtol=0, atol=1e-7)

    assert main(["average", str(tmp_path / "mixed.pt"), str(high[0]), str(low)]) == 0
    assert "the average of 2 checkpoints, at precision level 1, [bfp16,bfp4,bfp4,bfp16]" in capsys.readouterr().out
    mixed = model_of(tmp_path / "mixed.pt")
    assert precision_of(mixed) == (16, 4, 4, 16)
    weights = [load_model(path)["decoder.embed_tokens.weight"] for path in (low, high[0])]
    assert torch.allclose(mixed.decoder.embed_tokens.weight, sum(weights) / 2, rtol=0, atol=1e-7)
    assert sorted(path.name for path in tmp_path.glob("*.p*")) == ["mixed.pt", "same.pt", "script.pt"]


def test_what_has_no_average_is_refused_in_one_line(train, risen, tmp_path, capsys):
    own = str(risen / "run/checkpoint_last.pt")
    train(tmp_path / "levels", "--dsq-levels", "[2,2,2,16] [4,4,4,16]", "--max-update", 1)
    train(tmp_path / "shapes", *LEVELS, "--encoder-ffn-embed-dim", 40, "--max-update", 1)
    train(tmp_path / "boxes", *LEVELS, "--dsq-box-dim", "last", "--max-update", 1)
    (tmp_path / "text.pt").write_text("none")
    capsys.readouterr()  # of the trainings
    for other, expected in (
        ("levels/checkpoint_last.pt", "got the levels [bfp2,bfp2,bfp2,bfp16] [bfp4,bfp4,bfp4,bfp16], expected"),
        ("shapes/checkpoint_last.pt", "encoder.layers.0.fc1.weight: got (40, 32), expected (48, 32)"),
        ("boxes/checkpoint_last.pt", "--dsq-box-dim: got 'last', expected 'reduction'"),
        ("text.pt", "is cut or no checkpoint: torch cannot read it"),
        ("missing.pt", "does not exist"),
    ):
        assert main(["average", str(tmp_path / "out.pt"), own, str(tmp_path / other)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fairseq-dsq average: error: {tmp_path / other}: ")
        assert expected in line
    assert not list(tmp_path.glob("out.pt*"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--disable-validation",), "--disable-validation: no validation is scored"),
        (
            ("--validate-interval", 2),
            "--max-epoch 1, --validate-interval 2: 0 validations will count, fewer than the 2",
        ),
        (("--max-update", 2), "--max-epoch 1, --max-update 2, --validate-interval 1: 0 validations will count"),
        (("--patience", 1), "--patience 1: training stops after that many validations without a new best"),
        (("--dsq-fixed-scale", "static"), "--dsq-fixed-scale static: has no effect with --dsq-format bfp"),
    ],
)
def test_what_will_not_happen_is_said_before_training(train, tmp_path, flags, expected):
    log = train(tmp_path, *LEVELS, "--dsq-patience", 1, "--max-epoch", 1, *flags)
    (line,) = [line for line in log.splitlines() if expected in line]
    assert line.startswith("WARNING")
    assert log.index(line) < log.index("Start iterating over samples")


def test_a_level_that_was_never_reached_is_said_at_the_end(cli, tmp_path):
    ended = r"training ended at precision level 0, \[2,2,2,16\]: it never rose to \[16,4,4,16\]"
    log = cli.train(tmp_path, *LEVELS, "--max-epoch", 1)
    assert len(re.findall(ended, log)) == 1
    assert re.search(ended, log[log.index("done training") :])
