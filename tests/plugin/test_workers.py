"""What fairseq cannot do on several workers without GPUs."""

from datetime import timedelta

import pytest
import torch
from torch.distributed import distributed_c10d

from fairseq_dsq.errors import DSQError
from fairseq_dsq.plugin import workers

ONE = {
    "cpu": True, "distributed_world_size": 1, "distributed_init_method": None, "distributed_no_spawn": False,
    "distributed_backend": "nccl", "ddp_backend": "pytorch_ddp", "heartbeat_timeout": -1,
}  # fmt: skip
TWO = {
    **ONE, "distributed_world_size": 2, "distributed_init_method": "tcp://127.0.0.1:1", "distributed_no_spawn": True,
    "distributed_backend": "gloo", "ddp_backend": "legacy_ddp",
}  # fmt: skip


@pytest.fixture(autouse=True)
def default_timeout(monkeypatch):
    monkeypatch.setattr(distributed_c10d, "default_pg_timeout", timedelta(minutes=30))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "distributed_init_method",
            None,
            "--distributed-init-method: got none for 2 workers, expected tcp://HOST:PORT",
        ),
        ("distributed_no_spawn", False, "--distributed-no-spawn: expected"),
        ("distributed_backend", "nccl", "--distributed-backend: got 'nccl', expected 'gloo'"),
        ("ddp_backend", "pytorch_ddp", "--ddp-backend: got 'pytorch_ddp', expected one of legacy_ddp, no_c10d"),
        ("ddp_backend", "c10d", "--ddp-backend: got 'c10d', expected one of legacy_ddp, no_c10d"),
    ],
)
def test_a_flag_that_needs_gpus_is_refused(flag, value, message):
    with pytest.raises(DSQError) as error:
        workers.check_workers({**TWO, flag: value}.get)
    assert message in str(error.value) and "scripts/distributed.sh 2 " in str(error.value)


def test_with_gpus_fairseq_s_own_flags_pass(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    workers.check_workers({**ONE, "cpu": False, "distributed_world_size": 8}.get)


@pytest.mark.parametrize(
    ("flags", "minutes"),
    [(ONE, 30), (TWO, 10), ({**TWO, "heartbeat_timeout": 120}, 2), ({**TWO, "ddp_backend": "no_c10d"}, 10)],
)
def test_a_worker_of_several_waits_for_a_bounded_time(flags, minutes):
    workers.check_workers(flags.get)
    assert distributed_c10d.default_pg_timeout == timedelta(minutes=minutes)


def test_a_worker_alone_is_no_copy(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    workers.refuse_lone_workers()
    monkeypatch.setenv("WORLD_SIZE", "1")
    workers.refuse_lone_workers()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DSQError, match="--distributed-world-size: got 1, expected 2"):
        workers.refuse_lone_workers()
