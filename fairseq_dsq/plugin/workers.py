"""Training on several workers: what fairseq cannot start is refused, and no worker waits long for one that is gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d

from fairseq_dsq.errors import flag_error

# How long a worker waits for the others, to form a group or in a collective: torch's own for NCCL. For gloo it is half
# an hour.
PATIENCE = timedelta(minutes=10)
CPU_DDP_BACKENDS = ("legacy_ddp", "no_c10d")


def check_workers(given: Callable[[str], Any]) -> None:
    """Refuse what fairseq cannot do on several workers without GPUs, and bound how long one waits for the others.

    ``--heartbeat-timeout``, where it is given, is the bound. Called before fairseq forms the group of its workers.

    Args:
        given: a flag's value, by its name; None where it is not given.

    Raises:
        DSQError: a flag that ends in a traceback, or in no training at all; one line names it.
    """
    workers: int = given("distributed_world_size") or 1
    init_method: str | None = given("distributed_init_method")
    if workers == 1 and init_method is None:
        return
    if given("cpu") or not torch.cuda.is_available():
        how = (
            f"without GPUs; scripts/distributed.sh {workers} fairseq-train ... starts the workers with the right flags"
        )
        if init_method is None:
            flag_error("--distributed-init-method", f"got none for {workers} workers, expected tcp://HOST:PORT {how}")
        if not given("distributed_no_spawn"):
            flag_error("--distributed-no-spawn", f"expected {how}: fairseq starts one worker a GPU")
        if given("distributed_backend") != "gloo":
            flag_error("--distributed-backend", f"got {given('distributed_backend')!r}, expected 'gloo' {how}")
        if workers > 1 and given("ddp_backend") not in CPU_DDP_BACKENDS:
            flag_error(
                "--ddp-backend", f"got {given('ddp_backend')!r}, expected one of {', '.join(CPU_DDP_BACKENDS)} {how}"
            )
    heartbeat: int = given("heartbeat_timeout") or -1
    # fairseq passes no timeout on, and its heartbeat cannot interrupt a worker that waits in gloo. This is the default
    # of the groups that this command forms.
    distributed_c10d.default_pg_timeout = timedelta(seconds=heartbeat) if heartbeat > 0 else PATIENCE


def refuse_lone_workers() -> None:
    """Before the first update: fairseq ignores torchrun's environment where a process sees no second GPU.

    Raises:
        DSQError: every process of torchrun would train a copy of its own, all into one folder.
    """
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    if workers == 1 or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    flag_error(
        "--distributed-world-size",
        f"got 1, expected {workers}, the WORLD_SIZE of torchrun's environment: each process would train a copy of its "
        + (
            "own"
            if torch.cuda.is_available()
            else f"own; without GPUs, scripts/distributed.sh {workers} fairseq-train ... starts the workers instead"
        ),
    )
