"""The ledger counts what runs, when it runs."""

import pytest
import torch
from nn.common import BFP_MIXED, context, normal
from torch.utils.checkpoint import checkpoint

from fairseq_dsq.ledger import Gemm, Stash
from fairseq_dsq.nn import DSQLinear, Ledger, LedgerKey, StashKey
from fairseq_dsq.precision import PrecisionConfig


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpointing_repeats_is_counted_as_often_as_it_runs(use_reentrant):
    how = context(*BFP_MIXED.q)
    layer = DSQLinear(21, 18, how)
    x = normal(37, 21).requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    kinds = {}
    for key, count in how.ledger.gemms.items():
        kinds[key.gemm.kind] = kinds.get(key.gemm.kind, 0) + count
    assert kinds == {"output": 2, "grad_input": 1, "grad_weight": 1}
    assert [key.gemm.kind for key, count in how.ledger.gemms.items() if key.repeated and count == 1] == ["output"]
    once = how.ledger.drain().once().gemms
    assert sorted((key.gemm.kind, count) for key, count in once.items()) == [
        ("grad_input", 1), ("grad_weight", 1), ("output", 1),
    ]  # fmt: skip


def test_a_backward_gemm_belongs_to_the_scope_of_its_forward():
    how = context(*BFP_MIXED.q)
    layer = DSQLinear(21, 18, how)
    how.ledger.scope = "first"
    y = layer(normal(37, 21))
    how.ledger.scope = "second"
    y.sum().backward()
    assert {(key.scope, key.gemm.kind) for key in how.ledger.gemms} == {("first", "output"), ("first", "grad_weight")}
    assert [key.scope for key in how.ledger.stashes] == ["first"]


def test_what_ran_can_be_put_at_another_precision():
    low, high = BFP_MIXED, PrecisionConfig((16, 4, 4, 16))
    ledger = Ledger(scope="a")
    ledger.record("output", 2, 3, 5, 1, low, True)
    ledger.record_stash("input", (2, 3), 0, low, 7)
    work = ledger.drain()
    assert work.stash_bytes == 7
    moved = work.at_precision(high)
    assert moved.gemms == {LedgerKey(Gemm("output", 2, 3, 5), high, True, "a"): 1}
    assert moved.stashes == {StashKey(Stash("input", (2, 3), 0), high, "a"): 1}
    assert ledger.drain().gemms == {}
    assert torch.is_grad_enabled()
