"""Stochastic rounding on data-parallel replicas, in two real gloo processes."""

import torch
from command import together
from nn.common import normal
from torch import distributed

from fairseq_dsq.nn import DSQContext, DSQLinear, GemmConfig
from fairseq_dsq.precision import PrecisionConfig

ROWS = 48


def replica(rank, store, folder):
    """What weights, inputs and gradients are rounded to: each multiplied by an identity, which stays as it is."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", world_size=2, rank=rank)
    context = DSQContext(GemmConfig(PrecisionConfig((3, 3, 3, 3)), "stochastic"))
    layers = [DSQLinear(ROWS, ROWS, context, bias=False) for _ in range(2)]
    rounded = {}
    for update in (0, 1):
        torch.manual_seed(7 + update)  # as fairseq does before each update
        torch.rand(100 * (1 + rank))  # the dropout of a batch that is longer on one of them
        for number, layer in enumerate(layers):
            for name, weight, x in (
                ("weight", normal(ROWS, ROWS), torch.eye(ROWS)),
                ("input", torch.eye(ROWS), normal(ROWS, ROWS)),
            ):
                layer.weight.data.copy_(weight)
                x.requires_grad_()
                y = layer(x)
                y.backward(torch.eye(ROWS) if name == "weight" else normal(ROWS, ROWS, seed=3))
                rounded[name, number, update] = y.detach()
                rounded[f"{name}'s gradient", number, update] = x.grad.clone()
    torch.save(rounded, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_replicas_round_weights_alike_and_what_they_hold_alone_apart(tmp_path):
    together(replica, (tmp_path / "store", tmp_path), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, value in first.items():
        shared = key[0] in ("weight", "weight's gradient")  # dx = dy @ W rounds the weight, where dy is the identity
        assert torch.equal(value, second[key]) == shared, key
    for name in ("weight", "input"):
        # Each layer and each update has noise of its own.
        different = [first[name, number, update] for number in (0, 1) for update in (0, 1)]
        assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i]), name
