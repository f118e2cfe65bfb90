"""fairseq-train, fairseq-generate and resume, as a user runs them."""

import json

import pytest
import torch
from e2e.states import assert_equal_states, load, load_model
from fairseq import checkpoint_utils

import fairseq_dsq
from fairseq_dsq.report.runs import read_run

# Without it fairseq draws the batches of all epochs at the start, from the epoch that the command starts in: its own
# transformer does not resume exactly either.
EXACT_RESUME = ("--update-epoch-batch-itr", "True")
TWO_LEVELS = ("--dsq-levels", "[2,2,2,16] [16,4,4,16]", "--dsq-patience", 1, "--dsq-min-delta", 100)


def test_half_the_epochs_and_a_resume_equal_all_in_one_go(cli, tmp_path):
    cli.train(tmp_path / "whole", *TWO_LEVELS, *EXACT_RESUME, "--max-epoch", 4)
    cli.train(tmp_path / "halves", *TWO_LEVELS, *EXACT_RESUME, "--max-epoch", 2)
    half = load_model(tmp_path / "halves")
    cli.train(tmp_path / "halves", *TWO_LEVELS, *EXACT_RESUME, "--max-epoch", 4)
    whole = load(tmp_path / "whole")
    resumed = load(tmp_path / "halves")
    assert not torch.equal(half["decoder.embed_tokens.weight"], whole["model"]["decoder.embed_tokens.weight"])
    assert_equal_states(whole["model"], resumed["model"])
    # The first validation sets the best, the second is no better by 100: the level rises, then two more count.
    assert (half["dsq.level"], half["dsq.bad_validations"]) == (1, 0)
    assert (whole["model"]["dsq.level"], whole["model"]["dsq.bad_validations"]) == (1, 2)
    assert 1 < whole["model"]["dsq.best_loss"] < 20


def test_stochastic_rounding_resumes_to_equal_parameters(cli, tmp_path):
    flags = ("--dsq-levels", "[4,4,4,16]", "--dsq-rounding", "stochastic", *EXACT_RESUME)
    cli.train(tmp_path / "whole", *flags, "--max-epoch", 2)
    cli.train(tmp_path / "halves", *flags, "--max-epoch", 1)
    cli.train(tmp_path / "halves", *flags, "--max-epoch", 2)
    whole, halves = (load_model(tmp_path / name) for name in ("whole", "halves"))
    assert_equal_states(whole, halves)


@pytest.fixture(scope="module")
def trained(cli, tmp_path_factory):
    """A two-level run whose level rose after its second epoch, and its log."""
    folder = tmp_path_factory.mktemp("trained")
    log = cli.train(folder / "run", *TWO_LEVELS, "--max-epoch", 3, "--tensorboard-logdir", folder / "board")
    (folder / "train.log").write_text(log)
    return folder


def test_every_epoch_logs_level_and_costs_for_train_and_valid(trained):
    records = {}
    for line in (trained / "train.log").read_text().splitlines():
        if '"train_loss"' in line or '"valid_loss"' in line:
            record = json.loads(line[line.index("{") :])
            records.setdefault(record["epoch"], {}).update(record)
    assert sorted(records) == [1, 2, 3]
    assert [float(records[epoch]["train_dsq_level"]) for epoch in (1, 2, 3)] == [0, 0, 1]
    for epoch, arithmetic, dram in ((1, 0.0318, 0.3049), (3, 0.1048, 0.4461)):
        record = {key: float(value) for key, value in records[epoch].items() if "dsq" in key}
        assert record["train_dsq_arithmetic_relative"] == pytest.approx(arithmetic, abs=2e-3)
        assert record["train_dsq_dram_relative"] == pytest.approx(dram, abs=1e-3)
        for split in ("train", "valid"):
            for cost in ("arithmetic", "dram"):
                absolute = "dsq_arithmetic" if cost == "arithmetic" else "dsq_dram_bytes"
                baseline = "dsq_arithmetic_baseline" if cost == "arithmetic" else "dsq_dram_baseline_bytes"
                relative = record[f"{split}_dsq_{cost}_relative"]
                assert relative == pytest.approx(
                    record[f"{split}_{absolute}"] / record[f"{split}_{baseline}"], rel=1e-3
                )
        assert record["train_dsq_stash_bytes"] > 0
        assert record["valid_dsq_stash_bytes"] == 0
        # Three GEMMs a product in training, one in validation; the corpora differ in size.
        assert record["valid_dsq_arithmetic_baseline"] < record["train_dsq_arithmetic_baseline"] / 10


def test_the_metrics_reach_tensorboard(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for split in ("train", "valid"):
        events = accumulator.EventAccumulator(str(trained / "board" / split))
        events.Reload()
        assert {"dsq_level", "dsq_arithmetic", "dsq_dram_bytes", "dsq_stash_bytes"} <= set(events.Tags()["scalars"])


def test_the_epoch_table_reads_the_record(cli, trained):
    epochs = read_run(trained / "run").epochs
    assert [epoch.level for epoch in epochs] == [0, 0, 1]
    out, _ = cli.run("fairseq-dsq", "epochs", trained / "run")
    assert len(out.splitlines()) == 4


def test_generation_runs_at_the_checkpoint_s_level(cli, trained):
    models, _ = checkpoint_utils.load_model_ensemble([str(trained / "run/checkpoint_last.pt")])
    model = models[0]
    assert model.dsq.state.level == 1
    assert model.encoder.layers[0].fc1.context.config.precision.q == (16, 4, 4, 16)
    out, _ = cli.run(
        "fairseq-generate", cli.data, "--user-dir", fairseq_dsq.__path__[0],
        "--path", trained / "run/checkpoint_last.pt", "--beam", 3, "--required-batch-size-multiple", 1,
    )  # fmt: skip
    assert sum(line.startswith("D-") for line in out.splitlines()) == 24


RESET = ("--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler")


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (("--finetune-from-model", "{checkpoint}"), 0),
        (("--restore-file", "{checkpoint}", *RESET), 0),
        (("--restore-file", "{checkpoint}", "--reset-dataloader"), 1),
    ],
)
def test_the_schedule_starts_anew_where_fairseq_s_best_does(cli, trained, tmp_path, flags, level):
    checkpoint = trained / "run/checkpoint_last.pt"
    former = load_model(checkpoint)
    assert former["dsq.level"] == 1
    flags = [flag.format(checkpoint=checkpoint) for flag in flags]
    # Nothing is learnt and dropped, so that the loss alone tells whose best it is.
    log = cli.train(tmp_path / "run", *TWO_LEVELS, "--max-epoch", 1, "--lr", 0, "--dropout", 0, *flags)
    assert f'"train_dsq_level": "{level}"' in log
    assert ("starts anew; the checkpoint was at level 1" in log) == (level == 0)
    after = load_model(tmp_path / "run")
    assert (after["dsq.level"], after["dsq.bad_validations"]) == (level, 0 if level == 0 else 2)
    assert (after["dsq.best_loss"] == former["dsq.best_loss"]) == (level == 1)


def test_fine_tuning_may_have_fewer_levels_than_the_checkpoint_s_training(cli, trained, tmp_path):
    flags = ("--dsq-levels", "[4,4,4,16]", "--finetune-from-model", trained / "run/checkpoint_last.pt", "--max-epoch")
    log = cli.train(tmp_path / "run", *flags, 1)
    assert '"train_dsq_level": "0"' in log and "starts anew; the checkpoint was at level 1" in log
    cli.train(tmp_path / "run", *TWO_LEVELS, "--dsq-levels", "[4,4,4,16] [16,4,4,16]", *flags[2:], 3)
    assert load_model(tmp_path / "run")["dsq.level"] == 1
    _, error = cli.run(*cli.train_command(tmp_path / "run", *flags, 4), code=1)
    assert "argument --dsq-levels: got '[4,4,4,16]', expected the more than 1 levels" in error.splitlines()[-1]


def test_a_float_checkpoint_loads_into_dsq_and_an_exported_one_back(cli, tmp_path):
    cli.train(tmp_path / "float", "--max-epoch", 1, arch="transformer", criterion="label_smoothed_cross_entropy")
    before = load_model(tmp_path / "float")
    # A learning rate of zero leaves the loaded parameters as they are.
    cli.train(
        tmp_path / "dsq", *TWO_LEVELS, "--max-epoch", 1, "--lr", 0, "--restore-file",
        tmp_path / "float/checkpoint_last.pt", "--reset-optimizer", "--reset-dataloader", "--reset-meters",
        "--reset-lr-scheduler",
    )  # fmt: skip
    after = load_model(tmp_path / "dsq")
    assert (after["dsq.level"], after["dsq.bad_validations"]) == (0, 0)
    assert after["dsq.best_loss"] < 20
    assert_equal_states(before, {name: value for name, value in after.items() if not name.startswith("dsq.")})

    out, _ = cli.run("fairseq-dsq", "export-float", tmp_path / "dsq/checkpoint_last.pt", tmp_path / "exported.pt")
    assert "(transformer)" in out
    models, _ = checkpoint_utils.load_model_ensemble([str(tmp_path / "exported.pt")])
    assert type(models[0]).__name__ == "TransformerModel"
    assert_equal_states(before, models[0].state_dict())


def test_activation_checkpointing_trains_to_the_same_parameters(cli, tmp_path):
    cli.train(tmp_path / "plain", *TWO_LEVELS, "--max-epoch", 1, "--dropout", 0)
    cli.train(tmp_path / "checkpointed", *TWO_LEVELS, "--max-epoch", 1, "--dropout", 0, "--checkpoint-activations")
    plain, checkpointed = (load_model(tmp_path / name) for name in ("plain", "checkpointed"))
    for name, value in plain.items():
        assert torch.allclose(value, checkpointed[name], rtol=1e-4, atol=1e-6), name


def test_float32_through_dsq_trains_as_fairseq_s_own_transformer(cli, tmp_path):
    flags = ("--max-epoch", 1, "--dropout", 0)
    cli.train(tmp_path / "dsq", "--dsq-format", "float32", *flags)
    cli.train(tmp_path / "float", *flags, arch="transformer", criterion="label_smoothed_cross_entropy")
    dsq, own = (load(tmp_path / name) for name in ("dsq", "float"))
    losses = [state["extra_state"]["val_loss"] for state in (dsq, own)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, value in own["model"].items():
        assert torch.allclose(value, dsq["model"][name], rtol=1e-2, atol=1e-3), name
