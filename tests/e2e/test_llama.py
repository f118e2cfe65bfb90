"""llama_dsq on fairseq's command lines: it trains, is evaluated, resumes, generates, and goes back to llama."""

import pytest
from e2e.states import assert_equal_states, load_model
from e2e.test_twins import BATCHES, TRAINING, evaluate, evaluated, generate, logged

# Minutes of fairseq's commands: scripts/readme.sh runs them.
pytestmark = pytest.mark.slow

SHAPE = (
    "--decoder-layers", 1, "--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 48, "--decoder-attention-heads", 2,
    "--dropout", 0.1, "--attention-dropout", 0.1, "--share-decoder-input-output-embed",
)  # fmt: skip


def train(cli, save_dir, *flags, arch="llama_dsq", criterion="dsq_cross_entropy"):
    return (
        "fairseq-train", cli.folder / "lm", "--user-dir", "fairseq_dsq", "--task", "language_modeling", "--arch", arch,
        "--criterion", criterion, *SHAPE, *BATCHES, *TRAINING, "--save-dir", save_dir, *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(cli, lm_data):
    """Two epochs: (folder of the run, its log)."""
    folder = cli.folder / "llama"
    out, err = cli.run(*train(cli, folder, "--dsq-levels", "[4,4,4,16]", "--max-epoch", 2, "--dsq-stash-scope", "all"))
    return folder, out + err


def test_it_trains_quantized_and_is_evaluated_to_its_validation_loss(cli, trained):
    folder, log = trained
    assert logged(log, "train", "train_dsq_arithmetic_relative") < 0.3
    assert logged(log, "valid", "valid_loss") < 6
    found = evaluated(cli, *evaluate(cli, folder / "checkpoint_best.pt", "--user-dir", "fairseq_dsq"))
    assert found == pytest.approx(logged(log, "valid", "valid_loss"), abs=0.0015)


def test_it_resumes_to_the_same_bits(cli, trained, tmp_path):
    folder, _ = trained
    flags = ("--dsq-levels", "[4,4,4,16]", "--dsq-stash-scope", "all")
    cli.run(*train(cli, tmp_path, *flags))
    cli.run(*train(cli, tmp_path, *flags, "--max-epoch", 2))
    whole, resumed = (load_model(path) for path in (folder, tmp_path))
    assert_equal_states(whole, resumed)


def test_it_generates(cli, trained):
    folder, _ = trained
    out, _ = cli.run(*generate(cli, folder / "checkpoint_last.pt"))
    assert out.count("\nH-") >= 20


def test_its_export_is_a_llama_which_trains_on(cli, trained, tmp_path):
    folder, log = trained
    cli.run("fairseq-dsq", "export-float", folder / "checkpoint_best.pt", tmp_path / "plain.pt")
    loss = evaluated(cli, *evaluate(cli, tmp_path / "plain.pt", "--user-dir", "fairseq_dsq"))
    assert loss == pytest.approx(logged(log, "valid", "valid_loss"), abs=0.3)
    more = ("--max-epoch", 3, "--restore-file", tmp_path / "plain.pt")
    out, err = cli.run(*train(cli, tmp_path, *more, arch="llama", criterion="cross_entropy"))
    assert logged(out + err, "valid", "valid_num_updates") > logged(log, "valid", "valid_num_updates")


def test_recomputing_its_layers_in_backward_changes_no_bit(cli, trained, tmp_path):
    folder, _ = trained
    flags = ("--dsq-levels", "[4,4,4,16]", "--dsq-stash-scope", "all", "--max-epoch", 2)
    cli.run(*train(cli, tmp_path, *flags, "--checkpoint-activations"))
    assert_equal_states(load_model(folder), load_model(tmp_path))


def test_heads_that_do_not_fit_are_refused_in_one_line(cli, lm_data, tmp_path):
    _, err = cli.run(*train(cli, tmp_path, "--decoder-attention-heads", 3), code=1)
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("fairseq-train: error: argument --decoder-attention-heads: got 3, expected")
