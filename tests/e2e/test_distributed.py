"""Two real gloo processes."""

import json
import socket

import torch
from fairseq import checkpoint_utils

import fairseq_dsq  # noqa: F401  (registers the names that checkpoints refer to)

LEVELS = ("--dsq-levels", "[2,2,2,16] [16,4,4,16]", "--dsq-patience", 1, "--dsq-min-delta", 100)


def last_train_record(log):
    lines = [line for line in log.splitlines() if '"train_loss"' in line]
    return json.loads(lines[-1][lines[-1].index("{") :])


def test_two_workers_agree_on_level_and_add_up_costs(cli, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (*LEVELS, "--max-epoch", 2, "--dropout", 0, "--dsq-cost-profile", "operands", "--dsq-stash-scope", "all")
    workers = [
        cli.start(
            *cli.train_command(tmp_path / f"two{rank}", *flags),
            "--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-world-size", 2,
            "--distributed-rank", rank, "--distributed-no-spawn", "--distributed-backend", "gloo",
            "--ddp-backend", "legacy_ddp",
        )
        for rank in (0, 1)
    ]  # fmt: skip
    logs = ["".join(worker.communicate(timeout=300)) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], logs[0][-2000:] + logs[1][-2000:]
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "two0/checkpoint_last.pt"))["model"]
    assert state["dsq.level"] == 1

    # One worker that accumulates two batches sees the same batches in the same updates.
    one_log = cli.train(tmp_path / "one", *flags, "--update-freq", 2)
    one, two = last_train_record(one_log), last_train_record(logs[0])
    for key in ("dsq_arithmetic", "dsq_arithmetic_baseline", "dsq_dram_bytes", "dsq_stash_bytes"):
        assert two[f"train_{key}"] == one[f"train_{key}"] != "0", key  # as printed, six digits
    alone = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "one/checkpoint_last.pt"))["model"]
    assert state.keys() == alone.keys()
    assert torch.allclose(state["dsq.best_loss"], alone["dsq.best_loss"], rtol=1e-2)


def test_lone_copies_under_torchrun_s_environment_are_reported(cli, tmp_path):
    out, err = cli.run(*cli.train_command(tmp_path / "run", *LEVELS, "--max-update", 1), WORLD_SIZE="2", RANK="0")
    assert "independent copy" in out + err
