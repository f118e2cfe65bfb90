"""torch's DistributedDataParallel around DSQ layers: what fairseq's pytorch_ddp is on GPUs, here on CPUs with gloo."""

import contextlib

import torch
from command import together
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from fairseq_dsq.nn import DSQContext, GemmConfig, convert
from fairseq_dsq.precision import parse_levels
from scripts.distributed import free_port

VOCABULARY, WIDTH, RANKS, ACCUMULATED = 50, 32, 2, 2


class Model(nn.Module):
    """A shared embedding, a residual block, and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.unused = nn.LayerNorm(WIDTH), nn.Linear(4, 4)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.norm(x + self.fc2(torch.relu(self.fc1(x)))) @ self.embed.weight.t()


def converted():
    torch.manual_seed(0)
    model = Model()
    convert(model, DSQContext(GemmConfig(parse_levels("[4,4,4,16]")[0]), stash_scope="all"))
    return model


def backward(model, tokens):
    cross_entropy(model(tokens).flatten(0, -2), tokens.flatten(), reduction="sum").backward()


def worker(rank, port):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=RANKS, rank=rank)
    model, alone = converted(), converted()
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for update in range(2):
        generator = torch.Generator().manual_seed(update)
        tokens = torch.randint(VOCABULARY, (RANKS, ACCUMULATED, 8, 5), generator=generator)
        for number in range(ACCUMULATED):
            with contextlib.nullcontext() if number == ACCUMULATED - 1 else parallel.no_sync():
                backward(parallel, tokens[rank, number])
        for batch in tokens.flatten(0, 1):
            backward(alone, batch)
        for (name, mine), own in zip(model.named_parameters(), alone.parameters(), strict=True):
            if own.grad is None:
                assert "unused" in name
                continue
            torch.testing.assert_close(mine.grad * RANKS, own.grad, rtol=1e-4, atol=1e-5)
            for parameter, grad in ((mine, mine.grad * RANKS), (own, own.grad)):
                parameter.data -= 1e-4 * grad
                parameter.grad = None
    del parallel  # torch 2.13 waits for ever, one time in ten or a hundred, where it outlives the group
    distributed.destroy_process_group()


def test_gradients_of_two_workers_add_up_to_one_s():
    together(worker, (free_port(),), RANKS)
