"""What fairseq's commands do with checkpoints that are another criterion's, damaged, hostile or overridden."""

import json

import pytest
import torch
from e2e.states import load

from fairseq_dsq.cli import main
from fairseq_dsq.errors import DSQError
from fairseq_dsq.models import TWINS

FLOAT = {"arch": "transformer", "criterion": "label_smoothed_cross_entropy"}


@pytest.fixture(scope="module")
def runs(cli, tmp_path_factory):
    """A float training of one epoch, and a DSQ one that went on from it for another."""
    folder = tmp_path_factory.mktemp("runs")
    cli.train(folder / "float", "--max-epoch", 1, **FLOAT)
    log = cli.train(folder / "dsq", "--max-epoch", 2, "--restore-file", folder / "float/checkpoint_last.pt")
    return folder, log


def last_line(cli, *command):
    _, err = cli.run(*command, code=1)
    assert "Traceback" not in err
    return err.splitlines()[-1]


def generate(cli, path, *flags):
    return (
        "fairseq-generate", cli.data, "--user-dir", "fairseq_dsq", "--path", path, "--batch-size", 8, "--beam", 1,
        "--max-len-b", 10, "--cpu", *flags,
    )  # fmt: skip


def test_dsq_goes_on_from_a_float_checkpoint_with_its_optimizer(runs):
    folder, log = runs
    epochs = [json.loads(line[line.index("{") :]) for line in log.splitlines() if "| train |" in line]
    assert [epoch["epoch"] for epoch in epochs] == [2]
    updates = load(folder / "float")["optimizer_history"][-1]["num_updates"]
    assert int(epochs[0]["train_num_updates"]) == 2 * updates
    state = load(folder / "dsq/checkpoint_last.pt")
    assert {entry["criterion_name"] for entry in state["optimizer_history"]} == {"LabelSmoothedCrossEntropyCriterion"}
    assert state["last_optimizer_state"]["state"][0]["step"] == 2 * updates


def test_the_criterion_and_its_twin_go_on_from_each_other(cli, runs, tmp_path):
    path = runs[0] / "dsq/checkpoint_last.pt"
    log = cli.train(tmp_path, "--max-epoch", 3, "--restore-file", path, criterion=FLOAT["criterion"])
    assert '"epoch": 3' in log


def test_a_checkpoint_s_string_is_not_run(cli, runs, tmp_path, capsys):
    state = load(runs[0] / "dsq/checkpoint_last.pt")
    state["cfg"]["model"].adaptive_softmax_cutoff = f"__import__('os').system('touch {tmp_path}/ran') or [10,20]"
    path = tmp_path / "hostile.pt"
    torch.save(state, path)
    expected = f"error: {path}: cfg.model.adaptive_softmax_cutoff: got \"__import__('os')"
    assert f"fairseq-generate: {expected}" in last_line(cli, *generate(cli, path))
    assert main(["export-float", str(path), str(tmp_path / "out.pt")]) == 2
    assert f"fairseq-dsq export-float: {expected}" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(DSQError, match="adaptive_softmax_cutoff"):
        TWINS["transformer"].from_pretrained(str(tmp_path), "hostile.pt", str(cli.data))
    assert not (tmp_path / "ran").exists()


def test_a_cut_checkpoint_is_named_with_the_one_to_go_on_from(cli, runs, tmp_path):
    (tmp_path / "run").mkdir()
    content = (runs[0] / "dsq/checkpoint_last.pt").read_bytes()
    (tmp_path / "run/checkpoint_best.pt").write_bytes(content)
    (tmp_path / "run/checkpoint_last.pt").write_bytes(content[:-1000])
    line = last_line(cli, *cli.train_command(tmp_path / "run", "--max-epoch", 3))
    assert line == (
        f"fairseq-train: error: {tmp_path}/run/checkpoint_last.pt: is cut: the end of the file is missing or damaged; "
        f"the newest sound checkpoint beside it is {tmp_path}/run/checkpoint_best.pt"
    )


@pytest.mark.parametrize("flag", ["--restore-file", "--continue-once", "--finetune-from-model"])
def test_a_training_does_not_begin_anew_where_its_checkpoint_is_missing(cli, tmp_path, flag):
    line = last_line(cli, *cli.train_command(tmp_path / "run", flag, tmp_path / "nix.pt"))
    assert (
        line == f"fairseq-train: error: argument {flag}: got {tmp_path}/nix.pt, which is no file, expected a checkpoint"
    )


def test_training_does_not_go_on_from_what_a_failed_one_left(runs, train, tmp_path):
    state = load(runs[0] / "dsq/checkpoint_last.pt")
    del state["extra_state"]["train_iterator"]  # as in fairseq's crash.pt
    torch.save(state, tmp_path / "crash.pt")
    with pytest.raises(DSQError, match=f"{tmp_path}/crash.pt: has no 'train_iterator', expected a checkpoint"):
        train(tmp_path / "run", "--restore-file", tmp_path / "crash.pt", "--max-epoch", 9)


def test_generation_names_a_missing_checkpoint(cli, tmp_path):
    assert last_line(cli, *generate(cli, tmp_path / "nix.pt")).endswith(f"Model file not found: {tmp_path}/nix.pt")


def test_overrides_are_checked_as_flags_are(cli, runs):
    path = runs[0] / "dsq/checkpoint_last.pt"
    for overrides, expected in (
        ("{'dsq_patince': 3}", "dsq_patince: no such flag, expected dsq_patience"),
        ("{'dsq_attention_matmul': 2}", "argument --dsq-attention-matmul: got 2, expected one of on, off"),
    ):
        line = last_line(cli, *generate(cli, path, "--model-overrides", overrides))
        assert line == f"fairseq-generate: error: {expected}"
    with pytest.raises(DSQError, match="--dsq-rounding: got 'up', expected one of nearest, stochastic"):
        TWINS["transformer"].from_pretrained(str(path.parent), path.name, str(cli.data), dsq_rounding="up")
    hub = TWINS["transformer"].from_pretrained(str(path.parent), path.name, str(cli.data), dsq_attention_matmul=False)
    assert hub.models[0].dsq.context.attention_matmul is False


def test_plain_fairseq_reads_an_exported_checkpoint_and_trains_on(cli, runs, tmp_path):
    assert main(["export-float", str(runs[0] / "dsq/checkpoint_last.pt"), str(tmp_path / "plain.pt")]) == 0
    command = [part for part in generate(cli, tmp_path / "plain.pt") if part not in ("--user-dir", "fairseq_dsq")]
    out, _ = cli.run(*command)
    assert "\nH-0\t" in out
    command = list(cli.train_command(tmp_path, "--max-epoch", 3, "--restore-file", tmp_path / "plain.pt", **FLOAT))
    at = command.index("--user-dir")
    out, err = cli.run(*command[:at], *command[at + 2 :])
    assert '"epoch": 3' in out + err


def test_the_file_of_another_library_is_named(tmp_path, capsys):
    torch.save({"embeddings.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    assert main(["export-float", str(tmp_path / "pytorch_model.bin"), str(tmp_path / "o.pt")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"fairseq-dsq export-float: error: {tmp_path}/pytorch_model.bin: is no checkpoint of fairseq: it has no 'model'"
    ]
