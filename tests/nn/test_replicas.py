"""Stochastic rounding on data-parallel replicas, in two real gloo processes."""

import torch
from command import together
from nn.common import normal
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from fairseq_dsq.nn import DSQContext, DSQLinear, GemmConfig, convert
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
    rounded |= passes()
    torch.save(rounded, folder / f"{rank}.pt")
    distributed.destroy_process_group()


class Repeated(nn.Module):
    """A layer whose forward pass the backward pass repeats, or not."""

    def __init__(self):
        super().__init__()
        self.layer, self.repeats = nn.Linear(ROWS, ROWS, bias=False), False

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=True) if self.repeats else self.layer(x)


def passes():
    """What a loop that seeds torch once rounds a weight to, by pass; the gradient of a pass, and of a repeated one."""
    model = Repeated()
    model.layer.weight.data.copy_(normal(ROWS, ROWS))
    convert(model, DSQContext(GemmConfig(PrecisionConfig((3, 3, 3, 3)), "stochastic")))
    torch.manual_seed(5)
    found = {("weight of pass", number): model(torch.eye(ROWS)).detach() for number in range(3)}
    bare = nn.Linear(ROWS, ROWS, bias=False)
    bare.weight.data.copy_(normal(ROWS, ROWS))
    bare = convert(bare, DSQContext(GemmConfig(PrecisionConfig((3, 3, 3, 3)), "stochastic")))
    found |= {("weight of a bare layer", number): bare(torch.eye(ROWS)).detach() for number in range(3)}
    torch.manual_seed(5)
    model(torch.eye(ROWS))
    for model.repeats in (False, True):
        torch.manual_seed(6)
        for _ in range(2):
            model.layer.weight.grad = None
            model(normal(ROWS, ROWS).requires_grad_()).square().sum().backward()
        found["gradient", model.repeats] = model.layer.weight.grad
        torch.manual_seed(5)
        model(torch.eye(ROWS))
    return found


def test_replicas_round_weights_alike_and_what_they_hold_alone_apart(tmp_path):
    together(replica, (tmp_path / "store", tmp_path), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, value in first.items():
        # dx = dy @ W rounds the weight, where dy is the identity.
        shared = key[0] in ("weight", "weight's gradient", "weight of pass", "weight of a bare layer")
        assert torch.equal(value, second[key]) == shared, key
    for name in ("weight", "input"):
        # Each layer and each update has noise of its own.
        different = [first[name, number, update] for number in (0, 1) for update in (0, 1)]
        assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i]), name
    for name in ("weight of pass", "weight of a bare layer"):
        of_passes = [first[name, number] for number in range(3)]
        assert not any(torch.equal(a, b) for i, a in enumerate(of_passes) for b in of_passes[:i]), name
    for of_rank in (first, second):
        assert torch.equal(of_rank["gradient", True], of_rank["gradient", False])
