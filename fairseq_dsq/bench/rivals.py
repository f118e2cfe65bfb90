"""What a user may pick instead of quantizing: other arithmetic for the same float model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from fairseq_dsq.bench.timing import AUTOCAST, Place, Settings

COMPILE, MKLDNN, PEERS, CHECKPOINTING = "compile", "mkldnn", "peers", "checkpointing"


class Rival(NamedTuple):
    """A way to run the float model.

    Attributes:
        dtype: of autocast; None for the place's own.
        compiled: by torch.compile.
        around: what the whole of a step runs in.
    """

    name: str
    dtype: torch.dtype | None = None
    compiled: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def rivals(settings: Settings) -> tuple[list[Rival], tuple[str, ...]]:
    """Those of the settings that this machine has, and a line for each of the others: why it has not."""
    place, asked = settings.place, settings.rivals
    found, notes = [], []
    half = place.dtype is not torch.float32
    if "autocast" in asked and not half:
        found.append(Rival(AUTOCAST, torch.bfloat16))
    if COMPILE in asked:
        if reason := _no_compiler(place):
            notes.append(f"torch.compile: left out, as it fails here ({reason})")
        else:
            found.append(Rival("torch.compile", compiled=True))
            if not half:
                found.append(Rival(f"torch.compile, {AUTOCAST}", torch.bfloat16, compiled=True))
    if MKLDNN in asked and not half:
        if reason := _no_bf16_products(place):
            notes.append(f"mkldnn.matmul.fp32_precision = bf16: left out, as {reason}")
        else:
            found.append(Rival("mkldnn.matmul.fp32_precision = bf16", around=_bf16_products))
    if half and {"autocast", MKLDNN} & set(asked):
        notes.append("autocast bf16, mkldnn.matmul.fp32_precision = bf16: left out, as --dtype is not float32")
    return found, tuple(notes)


def _no_compiler(place: Place) -> str | None:
    """Why torch.compile cannot be used: what compiling the least function ends in."""
    logging.getLogger("filelock").setLevel(logging.WARNING)  # fairseq's imports let debug lines through
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=place.device))
    except Exception as error:  # torch's own, a compiler's or Triton's
        return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
    return None


def _no_bf16_products(place: Place) -> str | None:
    if place.device != "cpu":
        return "it is of products on a CPU"
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        return f"torch {torch.__version__} has no such setting"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 multipliers"
    return None


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Float32 products may be multiplied in bfloat16; restored after."""
    backend: Any = torch.backends.mkldnn
    setting = backend.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
