"""--optimizer dsq_adam on the real command lines: logs, checkpoints, resume, workers, refusals."""

import json
import re

import pytest
import torch
from e2e.conftest import ROOT
from e2e.states import assert_equal_trainings, load, load_model
from e2e.test_distributed import train as train_ranks
from e2e.test_hydra import hydra

from fairseq_dsq import record
from fairseq_dsq.adam import Moments
from fairseq_dsq.errors import DSQError
from fairseq_dsq.formats import parse
from fairseq_dsq.plugin import hooks

# Minutes of fairseq's commands: scripts/readme.sh runs them.
pytestmark = pytest.mark.slow

# A layer of 64 features and 128 hidden ones: its matrices are large enough for low bits.
WIDE = (
    "--encoder-embed-dim", 64, "--encoder-ffn-embed-dim", 128, "--decoder-ffn-embed-dim", 128, "--dropout", 0,
    "--update-epoch-batch-itr", "True",
)  # fmt: skip
ADAM = ("--optimizer", "dsq_adam", *WIDE)


def moments(state):
    return {
        (index, name): held
        for index, entry in state["last_optimizer_state"]["state"].items()
        for name, held in entry.items()
    }


def nbytes(state):
    return sum(held.numel() * held.element_size() for held in moments(state).values() if torch.is_tensor(held))


@pytest.fixture(scope="module")
def whole(cli, tmp_path_factory):
    """Two epochs; (folder, log)."""
    folder = tmp_path_factory.mktemp("adam")
    return folder, cli.train(folder, *ADAM, "--max-epoch", 2)


def test_moments_are_saved_as_the_bytes_that_are_logged(whole):
    state = load(whole[0])
    held = moments(state)
    assert {value.dtype for value in held.values() if torch.is_tensor(value)} == {torch.uint8, torch.float32}
    formats = Moments(parse("int8/row"), parse("log8/row"))
    expected = sum(formats.nbytes(p.shape) for name, p in state["model"].items() if _trained(name))
    assert nbytes(state) == expected < 4 * sum(p.numel() for name, p in state["model"].items() if _trained(name))
    (start, *points) = record.read(whole[0] / record.NAME)
    assert [point.train["dsq_state_bytes"] for point in points] == [expected, expected]
    line = next(line for line in whole[1].splitlines() if '"train_loss"' in line)
    assert json.loads(line[line.index("{") :])["train_dsq_state_bytes"] == str(expected)
    assert start.flags["dsq_moment2"] == "log8/row"


def _trained(name):
    return not name.startswith("dsq.") and "version" not in name and "_float" not in name and "output_proj" not in name


def test_training_resumes_to_what_it_trains_in_one_go(cli, whole, tmp_path):
    cli.train(tmp_path, *ADAM, "--max-epoch", 1)
    log = cli.train(tmp_path, *ADAM, "--max-epoch", 2, "--dsq-residual", "moment1")
    assert_equal_trainings(load(tmp_path), load(whole[0]))
    assert "--dsq-residual moment1: has no effect without --dsq-weights direct" in log


def test_changed_flags_encode_the_states_again_and_fairseq_s_are_taken_up(cli, train, tmp_path):
    cli.train(tmp_path, *WIDE, "--max-epoch", 1)  # fairseq's Adam
    train(tmp_path, *ADAM, "--max-epoch", 2)
    low = load(tmp_path)
    assert torch.uint8 in {held.dtype for held in moments(low).values() if torch.is_tensor(held)}
    flags = ("--dsq-moment1", "float32", "--dsq-moment2", "float32")
    train(tmp_path, *ADAM, *flags, "--max-epoch", 3)
    high = load(tmp_path)
    assert {held.dtype for held in moments(high).values() if torch.is_tensor(held)} == {torch.float32}
    steps = [state["last_optimizer_state"]["state"][0]["step"] for state in (low, high)]
    assert steps[1] * 2 == steps[0] * 3


def test_fairseq_s_adam_refuses_bytes(train, whole):
    with pytest.raises(DSQError, match="argument --optimizer: got another than the checkpoint's dsq_adam"):
        train(whole[0], *WIDE, "--max-epoch", 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dsq-moment1", "log8/row"), "--dsq-moment1: got log8/row, expected a format with negative values"),
        (("--dsq-moment2", "int9x"), "--dsq-moment2: format: got 'int9x', expected such as"),
        (("--dsq-moment-rounding", "up"), "--dsq-moment-rounding: got 'up', expected one of nearest, stochastic"),
        (("--dsq-residual", "m"), "--dsq-residual: got 'm', expected one of none, moment1"),
        (("--dsq-residual", "moment1", "--adam-betas", "(0.0, 0.9)"), "--dsq-residual: got moment1 with a beta1 of 0"),
        (("--fp16-adam-stats",), "--fp16-adam-stats: got it beside --optimizer dsq_adam"),
    ],
)
def test_bad_flags_are_refused_in_one_line(train, tmp_path, flags, message):
    with pytest.raises(DSQError, match=f"^argument {re.escape(message)}[^\n]*$"):
        train(tmp_path, *ADAM, *flags)


def test_a_float_model_and_bfloat16_train_with_it(cli, train, tmp_path):
    for name, flags in (("float", ()), ("bf16", ("--bf16",)), ("small", ("--bf16", "--memory-efficient-bf16"))):
        options = {"arch": "transformer", "criterion": "label_smoothed_cross_entropy"} if name == "float" else {}
        for epochs in (1, 2):
            log = train(tmp_path / name, *ADAM, *flags, "--max-epoch", epochs, **options)
        assert "dsq_state_bytes" in log
        assert torch.uint8 in {held.dtype for held in moments(load(tmp_path / name)).values() if torch.is_tensor(held)}


def test_hydra_s_yaml_sets_it_as_flags_do(cli, tmp_path):
    overrides = ("optimizer._name=dsq_adam", "+optimizer.dsq_moment2=log8/128", "model.encoder_embed_dim=64")
    cli.run(*hydra("transformer_dsq", cli.data, tmp_path, *overrides, "model.decoder_embed_dim=64"))
    start, point = record.read(tmp_path / record.NAME)
    assert (start.flags["dsq_moment1"], start.flags["dsq_moment2"]) == ("int8/row", "log8/128")
    state = load(tmp_path)
    assert nbytes(state) == point.train["dsq_state_bytes"]
    assert state["last_optimizer_state"]["param_groups"][0]["moment2"] == "log8/128"


# Two workers' batches differ in length, and so does what dropout draws.
RANKS = ("--user-dir", ROOT / "tests/e2e/ranks", "--task", "translation_of_ranks", *ADAM, "--dropout", 0.1)


def of_ranks(cli, folder, epochs, **environment):
    """The parameters of both workers after training to that epoch."""
    folder.mkdir(exist_ok=True)
    train_ranks(cli, 2, folder / "run", *RANKS, "--max-epoch", epochs, RANKS=str(folder), **environment)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def equal(ranks):
    return all(torch.equal(value, ranks[1][name]) for name, value in ranks[0].items())


def test_two_workers_stay_equal_and_resume_to_what_they_train_in_one_go(cli, tmp_path):
    assert equal(of_ranks(cli, tmp_path / "whole", 2))
    for epochs in (1, 2):
        ranks = of_ranks(cli, tmp_path / "parts", epochs)
    assert equal(ranks)
    assert_equal_trainings(load(tmp_path / "parts/run"), load(tmp_path / "whole/run"))


def test_workers_with_noise_of_their_own_drift_apart(cli, tmp_path):
    assert not equal(of_ranks(cli, tmp_path / "lone", 1, LONE_NOISE="1"))


def test_weights_that_are_codes_take_their_steps_in_integers_and_resume(cli, tmp_path):
    flags = ("--optimizer", "dsq_adam", "--dsq-weights", "direct", "--dsq-weight-format", "int8/row")
    whole = cli.train(tmp_path / "whole", *flags, "--max-epoch", 3, "--update-epoch-batch-itr", True)
    records = [json.loads(line[line.index("{") :]) for line in whole.splitlines() if '"train_loss"' in line]
    assert float(records[-1]["train_loss"]) < float(records[0]["train_loss"])
    assert 0 < float(records[-1]["train_dsq_flips"]) < 1
    assert float(records[-1]["train_dsq_state_bytes"]) > 0
    for epochs in (1, 3):
        cli.train(tmp_path / "parts", *flags, "--max-epoch", epochs, "--update-epoch-batch-itr", True)
    first, second = (load_model(tmp_path / name) for name in ("whole", "parts"))
    assert first.keys() == second.keys() and any(name.endswith("weight_codes") for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_an_update_is_charged_once_whatever_its_batches(train, tmp_path, monkeypatch):
    flags = ("--dsq-cost-profile", "operands", "--update-freq", 2, "--max-epoch", 1, "--max-tokens", 200)
    train(tmp_path / "whole", *flags)
    whole = record.read(tmp_path / "whole" / record.NAME)[-1].train
    monkeypatch.setattr(hooks, "log_update", lambda *args: None)
    train(tmp_path / "gemms", *flags)
    gemms = record.read(tmp_path / "gemms" / record.NAME)[-1].train
    values = sum(state.numel() for (_, name), state in moments(load(tmp_path / "whole")).items() if name == "exp_avg")
    assert (whole["dsq_gradient_bytes"], whole["dsq_state_bytes"]) == (4 * values, 8 * values)
    assert whole["dsq_weight_bytes"] == 4 * values
    for name in ("dsq_dram_bytes", "dsq_dram_baseline_bytes"):
        assert whole[name] - gemms[name] == 28 * values * whole["num_updates"] > 0
    assert whole["dsq_dram_relative"] == pytest.approx(
        whole["dsq_dram_bytes"] / whole["dsq_dram_baseline_bytes"], abs=1e-6
    )
    assert "dsq_gradient_bytes" not in gemms and whole["dsq_arithmetic"] == gemms["dsq_arithmetic"]
