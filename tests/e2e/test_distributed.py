"""Real gloo processes: what several workers train, how they resume, and how they end when one is gone."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from e2e.states import assert_equal_trainings, load, load_model

import fairseq_dsq  # noqa: F401  (registers the names that checkpoints refer to)
from scripts.distributed import distributed_flags, free_port, interface_to

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LEVELS = ("--dsq-levels", "[2,2,2,16] [16,4,4,16]", "--dsq-patience", 1, "--dsq-min-delta", 100)
EXACT_RESUME = ("--update-epoch-batch-itr", "True")
FLAGS = (*LEVELS, *EXACT_RESUME, "--dropout", 0, "--dsq-cost-profile", "operands", "--dsq-stash-scope", "all")
COSTS = ("dsq_level", "dsq_arithmetic", "dsq_arithmetic_baseline", "dsq_dram_bytes", "dsq_stash_bytes")
SUPERVISOR = ROOT / "scripts/distributed.sh"


def start(*command, **environment):
    """A command of ours in this environment; a session of its own, so that a test can end what is left of it."""
    return subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DSQ_ENV": str(BIN.parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train(cli, ranks, folder, *flags, **environment):
    """Train as the workers that the supervisor would start, each forked; returns the first one's (stdout, stderr)."""
    command = [str(part) for part in cli.train_command(folder, *flags)]
    environment["GLOO_SOCKET_IFNAME"] = interface_to("127.0.0.1")
    master = f"127.0.0.1:{free_port()}"
    commands = [(*command, *distributed_flags(command, master, ranks, rank)) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as threads:
        first, *_ = threads.map(lambda each: cli.run(*each, **environment), commands)
    return first


def supervised(cli, ranks, folder, *flags, **environment):
    """Train as ``ranks`` workers; returns (stdout, stderr)."""
    command = cli.train_command(folder, *flags)
    process = start(SUPERVISOR, ranks, BIN / command[0], *command[1:], **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-3000:]}"
    return out, err


def assert_alike(a, b):
    """Equal trainings by other numbers of workers, whose validation's loss is one sum in float32 in another order."""
    best, other = (state["model"]["dsq.best_loss"] for state in (a, b))
    assert float(best) == pytest.approx(float(other), rel=2 * torch.finfo(torch.float32).eps)
    assert_equal_trainings(a, {**b, "model": {**b["model"], "dsq.best_loss": best}})


def records(log, split="train"):
    lines = [line for line in log.splitlines() if f'"{split}_loss"' in line]
    return [json.loads(line[line.index("{") :]) for line in lines]


def costs(log, split="train"):
    """As printed, six digits, by epoch."""
    return [tuple(record[f"{split}_{key}"] for key in COSTS) for record in records(log, split)]


@pytest.fixture(scope="module")
def two(cli, tmp_path_factory):
    """Two epochs of two workers, whose level rose after the second; (folder, log)."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "ranks").mkdir()
    flags = ("--user-dir", ROOT / "tests/e2e/ranks", "--task", "translation_of_ranks", "--max-epoch", 2)
    log, _ = supervised(cli, 2, folder / "run", *FLAGS, *flags, RANKS=str(folder / "ranks"))
    return folder, log


def test_two_workers_are_one_that_accumulates_two_batches(cli, two, tmp_path):
    folder, log = two
    one_log = cli.train(tmp_path / "one", *FLAGS, "--max-epoch", 2, "--update-freq", 2)
    for split in ("train", "valid"):
        assert costs(log, split) == costs(one_log, split) and "0" not in costs(log)[0][1:]
    assert load_model(folder / "run")["dsq.level"] == 1
    assert_alike(load(folder / "run"), load(tmp_path / "one"))


def test_workers_hold_the_same_parameters(two):
    ranks = [torch.load(two[0] / "ranks" / f"{rank}.pt") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name


def test_two_workers_resume_to_what_they_train_in_one_go(cli, two, tmp_path):
    train(cli, 2, tmp_path, *FLAGS, "--max-epoch", 1)
    log, _ = train(cli, 2, tmp_path, *FLAGS, "--max-epoch", 2)
    assert costs(log) == costs(two[1])[1:]
    assert_equal_trainings(load(tmp_path), load(two[0] / "run"))


def test_a_training_goes_on_with_another_number_of_workers(cli, two, tmp_path):
    """1, 2 and 1 again: each sees the batches of one training's updates."""
    cli.train(tmp_path, *FLAGS, "--max-epoch", 1, "--update-freq", 2)
    train(cli, 2, tmp_path, *FLAGS, "--max-epoch", 2)
    assert_alike(load(tmp_path), load(two[0] / "run"))
    log = cli.train(tmp_path, *FLAGS, "--max-epoch", 3, "--update-freq", 2)
    assert [record["train_dsq_level"] for record in records(log)] == ["1"]


def test_four_workers_and_a_batch_that_some_have_not(cli, tmp_path):
    """Six batches are an update of four and one of two: what fairseq gives the others to do is not charged."""
    log, _ = train(cli, 4, tmp_path / "four", *FLAGS, "--max-epoch", 1, "--ddp-backend", "no_c10d")
    one_log = cli.train(tmp_path / "one", *FLAGS, "--max-epoch", 1, "--update-freq", 4)
    assert records(log)[0]["train_num_updates"] == "2"
    for split in ("train", "valid"):
        assert costs(log, split) == costs(one_log, split)
    four, one = (load_model(tmp_path / name) for name in ("four", "one"))
    for name, value in one.items():  # gradients are summed in another order
        assert torch.allclose(value, four[name], rtol=1e-3, atol=1e-4), name


def test_without_gpus_fairseq_would_start_no_worker_and_say_nothing(cli, tmp_path):
    flags = ("--distributed-world-size", 2, "--distributed-init-method", "tcp://127.0.0.1:1")
    _, error = cli.run(*cli.train_command(tmp_path, *flags), code=1)
    assert "--distributed-no-spawn: expected" in error.splitlines()[-1]


def test_lone_copies_under_torchrun_s_environment_are_refused(cli, tmp_path):
    _, error = cli.run(*cli.train_command(tmp_path, "--max-update", 1), code=1, WORLD_SIZE="2", RANK="0")
    assert "--distributed-world-size: got 1, expected 2" in error.splitlines()[-1]
    assert not list(tmp_path.glob("*.pt"))


def test_a_worker_does_not_wait_for_long_for_one_that_never_comes(cli, tmp_path):
    began = time.monotonic()
    _, error = cli.run(
        *cli.train_command(tmp_path), "--distributed-world-size", 2, "--distributed-rank", 0,
        "--distributed-init-method", f"tcp://127.0.0.1:{free_port()}", "--distributed-no-spawn",
        "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--heartbeat-timeout", 2, code=1,
    )  # fmt: skip
    assert "timed out" in error.splitlines()[-1].lower()
    assert time.monotonic() - began < 60


# A worker that tells its process id and does what the test wants of its rank.
WORKER = """
while [ $# -gt 0 ]; do [ "$1" != --distributed-rank ] || rank=$2; [ $# -gt 1 ] || break; shift; done
echo "$rank $$" >> "$PIDS"; echo "hello of $rank"
[ "$rank" = 0 ] || eval "$RANK1"
[ "$rank" != 0 ] || eval "$RANK0"
"""


@pytest.fixture
def supervise(tmp_path):
    """Starts two shells under the supervisor; returns the process and a function that waits for their process ids."""
    script, pids = tmp_path / "worker.sh", tmp_path / "pids"
    script.write_text(WORKER)
    pids.touch()

    def begin(rank0, rank1):
        command = (SUPERVISOR, 2, "bash", script)
        return start(*command, RANK0=rank0, RANK1=rank1, PIDS=str(pids)), started

    def started():
        deadline = time.monotonic() + 30
        while len(pids.read_text().split()) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        return {int(rank): int(pid) for rank, pid in (line.split() for line in pids.read_text().splitlines())}

    return begin


def gone(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize(
    ("rank0", "rank1", "code", "message"),
    [
        ("true", "true", 0, None),
        ("sleep 100", "exit 7", 7, "rank 1 ended first, by exit code 7"),
        ("sleep 1; exit 3", "sleep 100", 3, "rank 0 ended first, by exit code 3"),
        ("sleep 100", "kill -KILL $$", 137, "rank 1 ended first, by signal SIGKILL"),
        ("trap '' TERM; sleep 100", "exit 1", 1, "rank 1 ended first"),
    ],
)
def test_the_first_to_fail_ends_all_and_names_the_exit_code(supervise, rank0, rank1, code, message):
    process, started = supervise(rank0, rank1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == "hello of 0\n" and "[rank 1] hello of 1\n" in err
    assert message is None or message in err.splitlines()[-1]
    assert gone(started().values())


@pytest.mark.parametrize(("number", "code"), [("TERM", 143), ("INT", 130), ("KILL", -9)])
def test_a_signal_to_the_supervisor_ends_the_workers(supervise, number, code):
    process, started = supervise("exec sleep 100", "exec sleep 100")
    pids = started()
    process.send_signal(getattr(signal, f"SIG{number}"))
    process.communicate(timeout=60)
    assert process.returncode == code
    assert len(pids) == 2 and gone(pids.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0", "true"), "N: got '0', expected an integer >= 1"),
        (("2",), "CMD: got nothing, expected a fairseq-train command"),
        (("2", "no-such-command"), "cannot start no-such-command"),
        (("1", "--nodes", "2", "true"), "--master: got none, expected HOST:PORT"),
        (("1", "--nodes", "2", "--node-rank", "2", "true"), "--node-rank: got 2, expected 0 to 1"),
        (("1", "--nodes", "2", "--master", "1.2.3.4:x", "true"), "--master: got '1.2.3.4:x'"),
    ],
)
def test_the_supervisor_refuses_what_it_cannot_start(arguments, message):
    process = start(SUPERVISOR, *arguments)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"distributed.sh: error: {message}" in err.splitlines()[-1]


def test_a_killed_worker_ends_the_training(cli, tmp_path):
    command = cli.train_command(tmp_path, "--max-epoch", 10000, "--no-save")
    process = start(SUPERVISOR, 2, BIN / command[0], *command[1:])
    try:
        for line in process.stdout:
            if '"valid_loss"' in line:
                break
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        began = time.monotonic()
        os.kill(int(children[1]), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 137 and time.monotonic() - began < 20
    assert "rank 1 ended first, by signal SIGKILL" in err.splitlines()[-1]


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two hosts, as network namespaces that are joined by one wire; their names and addresses."""
    names = [f"dsq{os.getpid()}{letter}" for letter in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    try:
        for name in names:
            try:
                made = ip("netns", "add", name)
            except FileNotFoundError:
                pytest.skip("network namespaces: there is no ip command (iproute2)")
            if made.returncode:
                pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
        steps = [("link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])]
        for name, address in zip(names, addresses, strict=True):
            steps += [
                ("-n", name, "addr", "add", f"{address}/30", "dev", name),
                ("-n", name, "link", "set", name, "up"),
                ("-n", name, "link", "set", "lo", "up"),
            ]
        for step in steps:
            done = ip(*step)
            assert done.returncode == 0, done.stderr
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


def start_on_hosts(cli, hosts, folder, *flags):
    master = hosts[0][1]
    command = cli.train_command(folder, *flags)
    return [
        start(
            "ip", "netns", "exec", name, SUPERVISOR, 1, "--nodes", 2, "--node-rank", rank, "--master", master,
            BIN / command[0], *command[1:],
        )
        for rank, (name, _) in enumerate(hosts)
    ]  # fmt: skip


def test_two_hosts_train_as_two_workers_do(cli, hosts, two, tmp_path):
    processes = start_on_hosts(cli, hosts, tmp_path, *FLAGS, "--max-epoch", 2)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert costs(outputs[0][0]) == costs(two[1])
    assert_equal_trainings(load(tmp_path), load(two[0] / "run"))


def test_a_host_that_is_cut_off_ends_the_training_on_the_other(cli, hosts, tmp_path):
    """gloo and fairseq's heartbeat both wait --heartbeat-timeout; chance says which ends the worker."""
    flags = ("--max-epoch", 10000, "--no-save", "--heartbeat-timeout", 5)
    processes = start_on_hosts(cli, hosts, tmp_path, *flags)
    try:
        for line in processes[0].stdout:
            if '"valid_loss"' in line:
                break
        began = time.monotonic()
        assert ip("-n", hosts[1][0], "link", "set", hosts[1][0], "down").returncode == 0
        out, err = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode in (1, 130) and time.monotonic() - began < 60
    assert "Timed out waiting 5000ms" in err or "not making progress in 5 seconds" in out
