"""Two Python threads that train DSQ models at once get what each gets alone: there is no state but the tensors'."""

import threading

import pytest
import torch
from torch import nn

from fairseq_dsq.nn import DSQContext, GemmConfig, convert
from fairseq_dsq.precision import PrecisionConfig


def train(seed, q, steps):
    """The weights after some steps of SGD, and the losses."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 130), nn.ReLU(), nn.Linear(130, 33))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 7)
    convert(model, DSQContext(GemmConfig(PrecisionConfig(q))))
    losses = []
    for _ in range(steps):
        x = torch.randn(65, 48, generator=generator)
        loss = model(x).square().mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        losses.append(loss.item())
    return [*(parameter.detach().clone() for parameter in model.parameters()), torch.tensor(losses)]


@pytest.mark.parametrize("qs", [((2, 2, 2, 16), (16, 4, 4, 16)), ((8, 8, 8, 8), (4, 4, 4, 4))], ids=str)
def test_two_threads_at_once_train_as_one_after_the_other(qs):
    jobs = [(seed, q) for seed, q in enumerate(qs * 2)]
    alone = [train(*job, 30) for job in jobs]
    a, b = torch.randn(200, 200), torch.randn(200, 200)
    product = a @ b
    together, plain = {}, []
    start = threading.Barrier(len(jobs) + 1)

    def run(job):
        start.wait()
        together[job] = train(*job, 30)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        plain.append(torch.equal(a @ b, product))
    assert all(plain)  # other threads' products are float32's
    for job, expected in zip(jobs, alone, strict=True):
        assert all(map(torch.equal, together[job], expected))
