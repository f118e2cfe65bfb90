"""A step with the dsq_ criterion over the plain one: 512 tokens in float32, where logging weighs the most."""

from __future__ import annotations

from collections.abc import Callable

from fairseq_dsq.bench.timing import CPU, Found, Settings, interleave
from fairseq_dsq.bench.train_step import criterion_of
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.config import CRITERION_PREFIX

ROUNDS = 15


def run(settings: Settings) -> Found:
    name = "cross_entropy"
    spec = probe.ModelSpec("transformer_dsq_iwslt_de_en", "--dsq-format float32", tokens=512)
    model = probe.build(spec, "cpu")
    sample = probe.sample(model, spec)

    def step(name: str) -> Callable[[], object]:
        criterion = criterion_of(name)
        return lambda: criterion(model, sample)[0].backward()

    ours = {f"{CRITERION_PREFIX}{name}": step(CRITERION_PREFIX + name)}
    return Found(interleave(ours, step(name), name, settings.rounds, CPU.clock))
