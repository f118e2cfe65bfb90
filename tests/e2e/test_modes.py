"""fairseq's training modes with DSQ: each trains as it should, or is refused in one line before anything is built.

Trainings run in forks of this process, which has imported everything: what takes long is fairseq's start.
"""

import itertools
import json
import logging
import math
import os
import re
import sys
import traceback

import pytest
import torch
import torch._dynamo  # every optimizer does, in every fork otherwise
from fairseq import checkpoint_utils
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq_cli.preprocess import cli_main as preprocess
from fairseq_cli.train import cli_main

import fairseq_dsq
from fairseq_dsq.plugin import config

LEVELS = ("--dsq-levels", "[2,2,2,16] [16,4,4,16]", "--dsq-patience", 1, "--dsq-min-delta", 100)
MODEL = (
    "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 48,
    "--encoder-attention-heads", 2, "--decoder-attention-heads", 2, "--dropout", 0,
)  # fmt: skip
TIED = ("--share-decoder-input-output-embed",)


def in_a_fork(folder, words, command, before):
    """Run one of fairseq's commands in a fork of this process; returns the exit code and what it wrote."""
    log = folder.with_suffix(".log")
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), log.read_text()
    code = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            logging.basicConfig(force=True, level=logging.INFO, stream=file)
            sys.argv = [str(word) for word in words]
            torch.set_num_threads(1)
            before()
            command()
            code = 0
    except BaseException as error:
        with open(log, "a") as file:
            traceback.print_exception(error, file=file)
    finally:
        os._exit(code)


class Trained:
    """A training's log by epochs and its last checkpoint's weights."""

    def __init__(self, log, folder):
        self.log = log
        self.epochs = {}
        for match in re.finditer(r'\{"epoch": .*\}', log):
            record = json.loads(match[0])
            if "train_loss" in record or "valid_loss" in record:
                self.epochs.setdefault(record["epoch"], {}).update(
                    {name: float(value) for name, value in record.items() if name != "epoch"}
                )
        assert sorted(self.epochs), log[-2000:]
        state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_last.pt"))["model"]
        self.weights = {name: value for name, value in state.items() if not name.startswith("dsq.")}
        self.state = {name: value for name, value in state.items() if name.startswith("dsq.")}

    def logged(self, name):
        return [self.epochs[epoch][name] for epoch in sorted(self.epochs)]


@pytest.fixture(scope="module")
def train(cli, tmp_path_factory):
    def train(
        *flags, data=None, levels=LEVELS, tied=TIED, criterion="dsq_label_smoothed_cross_entropy", before=lambda: None
    ):
        folder = tmp_path_factory.mktemp("modes") / "run"
        words = (
            "fairseq-train", data or cli.data, "--user-dir", fairseq_dsq.__path__[0], "--arch", "transformer_dsq",
            "--criterion", criterion, *MODEL, *tied, *levels, "--optimizer", "adam", "--lr", 5e-3, "--max-tokens", 600,
            "--seed", 3, "--cpu", "--log-format", "json", "--no-epoch-checkpoints", "--max-epoch", 3,
            "--save-dir", folder, *flags,
        )  # fmt: skip
        code, log = in_a_fork(folder, words, cli_main, before)
        assert code == 0, log[-3000:]
        return Trained(log, folder)

    return train


@pytest.fixture(scope="module")
def plain(train):
    return train()


def assert_learns(run, levels=(0, 0, 1)):
    """The loss falls, the level rises when it should, and nothing is Inf or NaN."""
    assert run.logged("train_dsq_level") == list(levels)
    losses = run.logged("valid_loss")
    assert losses[0] > losses[1] > losses[2] and run.logged("train_loss")[0] > run.logged("train_loss")[2] + 0.5
    assert all(value.isfinite().all() for value in run.weights.values())


def assert_same_costs(run, other):
    for name in ("train_dsq_arithmetic", "train_dsq_dram_bytes", "train_dsq_stash_bytes", "valid_dsq_arithmetic"):
        assert run.logged(name) == other.logged(name), name


def assert_equal_weights(run, other):
    assert run.weights.keys() == other.weights.keys()
    for name, value in run.weights.items():
        assert torch.equal(value, other.weights[name]), name


@pytest.mark.parametrize(
    "flags",
    [
        # AMP casts on GPUs alone.
        ("--amp", "--fp16-no-flatten-grads", "--empty-cache-freq", 2, "--ddp-backend", "legacy_ddp"),
        ("--use-bmuf", "--ddp-backend", "slowmo"),
        ("--ddp-backend", "no_c10d", "--find-unused-parameters", "--heartbeat-timeout", 60),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_what_is_for_gpus_or_several_workers_changes_nothing_on_one_cpu(train, plain, flags):
    run = train(*flags)
    assert_equal_weights(run, plain)
    assert_same_costs(run, plain)


@pytest.mark.parametrize("flags", [(), ("--offload-activations",)], ids=["kept", "offloaded"])
def test_activation_checkpointing_is_bit_equal_and_what_it_repeats_is_charged(train, plain, flags):
    run = train("--checkpoint-activations", *flags)
    assert_equal_weights(run, plain)
    assert run.logged("valid_dsq_arithmetic") == plain.logged("valid_dsq_arithmetic")
    for repeated, once in zip(run.logged("train_dsq_arithmetic"), plain.logged("train_dsq_arithmetic"), strict=True):
        assert once < repeated < 4 / 3 * once * 1.2
    for name in ("train_dsq_arithmetic_baseline", "train_dsq_dram_baseline_bytes"):
        assert run.logged(name) == plain.logged(name)
    for name in ("train_dsq_arithmetic_relative", "train_dsq_dram_relative"):
        assert all(more > less for more, less in zip(run.logged(name), plain.logged(name), strict=True))
    assert run.logged("train_dsq_stash_bytes") == plain.logged("train_dsq_stash_bytes")


@pytest.mark.parametrize("flag", ["--bf16", "--memory-efficient-bf16"])
def test_bfloat16_trains_at_the_same_costs_with_the_schedule_s_state_in_full(train, plain, flag):
    run = train(flag)
    assert_learns(run)
    assert_same_costs(run, plain)
    # Half of float32's, and the float copies' own.
    share = 0.5 if "memory" in flag else 1.5
    assert run.logged("train_dsq_gradient_bytes") == [share * held for held in plain.logged("train_dsq_gradient_bytes")]
    best = run.state["dsq.best_loss"]
    assert best.dtype == torch.float64
    assert float(best) in [pytest.approx(loss, abs=5e-4) for loss in run.logged("valid_loss")]
    assert any(not torch.equal(value, plain.weights[name]) for name, value in run.weights.items())


def with_an_overflow():
    """As on a GPU, whose scaler leaves out the step: the first norm of the second update is infinite."""
    norms, steps = itertools.count(1), itertools.count(1)
    clip, step = AMPOptimizer.clip_grad_norm, AMPOptimizer.step
    AMPOptimizer.clip_grad_norm = lambda self, *args, **kwargs: (
        clip(self, *args, **kwargs) * (math.inf if next(norms) == 2 else 1)
    )
    AMPOptimizer.step = lambda self: None if next(steps) == 2 else step(self)


def test_an_update_that_overflows_under_amp_is_charged_where_it_is_made_again(train):
    flags = ("--amp", "--dsq-cost-profile", "operands", "--max-epoch", 1)
    once, again = train(*flags), train(*flags, before=with_an_overflow)
    assert_equal_weights(again, once)
    assert_same_costs(again, once)
    for name in ("train_num_updates", "train_dsq_dram_baseline_bytes", "train_dsq_gradient_bytes"):
        assert again.logged(name) == once.logged(name)


def as_on_a_gpu():
    """Without what fairseq's fp16 wants of a GPU after an overflow, and without our refusal."""
    torch.cuda.synchronize = lambda: None
    torch.Tensor.cuda = lambda tensor: tensor
    config.check_modes = lambda args: None


@pytest.mark.parametrize("flags", [("--memory-efficient-fp16",), ("--fp16", "--fp16-no-flatten-grads")])
def test_half_precision_trains_and_backs_off_from_a_scale_that_overflows(train, plain, flags):
    run = train(*flags, "--fp16-init-scale", 2**13, before=as_on_a_gpu)
    # Inf in a gradient makes its boxes NaN: fairseq must still see them.
    skipped = run.log.count("gradient overflow detected")
    assert 1 <= skipped < 12
    assert max(run.logged("train_loss_scale")) < 2**13
    assert run.logged("train_dsq_level") == [0, 0, 1]
    assert run.logged("train_loss")[0] > run.logged("train_loss")[2]
    assert all(value.isfinite().all() for value in run.weights.values())
    # fairseq logs nothing of an update that it skips, neither its loss nor its costs.
    assert run.logged("train_dsq_arithmetic")[0] < plain.logged("train_dsq_arithmetic")[0]
    assert run.logged("train_dsq_arithmetic")[1:] == plain.logged("train_dsq_arithmetic")[1:]
    assert run.logged("train_dsq_dram_bytes")[1:] == plain.logged("train_dsq_dram_bytes")[1:]
    assert run.state["dsq.best_loss"].dtype == torch.float64


def test_half_the_batch_at_twice_the_update_frequency_is_the_same_update(train):
    flags = ("--optimizer", "sgd", "--lr", 0.5, "--max-tokens", 100_000)
    level = ("--dsq-levels", "[16,16,16,16]")
    whole = train(*flags, "--batch-size", 240, levels=level)
    halves = train(*flags, "--batch-size", 120, "--update-freq", 2, levels=level)
    assert whole.logged("train_num_updates") == halves.logged("train_num_updates") == [1, 2, 3]
    for name, value in whole.weights.items():  # other boxes, other sums
        assert torch.allclose(value, halves.weights[name], atol=3e-4), name


def test_layers_that_are_dropped_are_not_charged(train):
    every = train("--encoder-layers", 3, "--max-epoch", 1)
    some = train("--encoder-layers", 3, "--encoder-layerdrop", 0.5, "--decoder-layerdrop", 0.2)
    assert_learns(some)
    assert some.logged("train_dsq_arithmetic")[0] < every.logged("train_dsq_arithmetic")[0]
    # In evaluation every layer runs.
    assert some.logged("valid_dsq_arithmetic")[0] == every.logged("valid_dsq_arithmetic")[0]


@pytest.mark.parametrize(
    "flags",
    [
        ("--no-cross-attention",),
        ("--cross-self-attention",),
        ("--encoder-normalize-before", "--decoder-normalize-before", "--layernorm-embedding"),
        ("--encoder-learned-pos", "--decoder-learned-pos", "--activation-fn", "gelu"),
    ],
    ids=" ".join,
)
def test_variants_of_the_transformer_learn(train, flags):
    assert_learns(train(*flags))


@pytest.mark.parametrize("scope", ["gemm", "all"])
def test_adaptive_softmax_learns(train, scope):
    flags = ("--adaptive-softmax-cutoff", "20,40", "--ddp-backend", "legacy_ddp", "--dsq-stash-scope", scope)
    assert_learns(train(*flags, tied=(), criterion="dsq_adaptive_loss"))


def test_one_embedding_for_all_learns(train, cli, tmp_path):
    text, joined = cli.folder / "text", tmp_path / "joined"
    words = ("fairseq-preprocess", "-s", "de", "-t", "en", "--trainpref", text / "train", "--validpref", text / "valid",
             "--destdir", joined, "--joined-dictionary")  # fmt: skip
    code, log = in_a_fork(tmp_path / "preprocess", words, preprocess, lambda: None)
    assert code == 0, log[-2000:]
    run = train("--share-all-embeddings", data=joined, tied=())
    assert_learns(run)
    embedding = run.weights["encoder.embed_tokens.weight"]
    for name in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        assert torch.equal(run.weights[name], embedding)


TWO_WORKERS = (
    "--distributed-world-size", 2, "--distributed-init-method", "tcp://127.0.0.1:9", "--distributed-no-spawn",
    "--distributed-backend", "gloo",
)  # fmt: skip
REFUSED = [
    (("--fp16",), "--fp16: got True, expected --bf16 or neither"),
    (("--memory-efficient-fp16",), "--fp16: got True, expected --bf16 or neither"),
    (("--tpu",), "--tpu: got True"),
    (("--tpu", "--bf16"), "--tpu: got True"),
    (("--quant-noise-pq", 0.1), "--quant-noise-pq: got 0.1, expected 0: quant noise"),
    (("--quant-noise-scalar", 0.1), "--quant-noise-scalar: got 0.1, expected 0: quant noise"),
    (("--quantization-config-path", "x.yaml"), "--quantization-config-path: got x.yaml, expected none"),
    (("--pipeline-model-parallel",), "--pipeline-model-parallel: got True"),
    (("--model-parallel-size", 2), "--model-parallel-size: got 2, expected 1"),
    (("--ddp-backend", "fully_sharded"), "--ddp-backend: got fully_sharded"),
    (("--ddp-backend", "slowmo", *TWO_WORKERS), "argument --ddp-backend: got"),
    (("--use-bmuf", "--ddp-backend", "legacy_ddp", *TWO_WORKERS), "--use-bmuf: got True"),
    (("--zero-sharding", "os"), "--zero-sharding: got os, expected none"),
    (("--cpu-offload",), "--cpu-offload: got True"),
    (("--write-checkpoints-asynchronously",), "--write-checkpoints-asynchronously: got True"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 trains there")
@pytest.mark.parametrize(("flags", "expected"), REFUSED, ids=lambda value: " ".join(map(str, value))[:40])
def test_what_cannot_be_right_is_refused_before_anything_is_built(cli, tmp_path, monkeypatch, flags, expected):
    command = [str(word) for word in cli.train_command(tmp_path / "run", *flags)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises((SystemExit, ValueError), match=re.escape(expected)) as stop:
        cli_main()
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 300
    assert not (tmp_path / "run").exists()


def test_a_command_that_does_not_train_takes_the_flags_of_a_checkpoint_as_they_are(monkeypatch):
    flags = {"fp16": True, "tpu": True, "quant_noise_scalar": math.inf}
    monkeypatch.setattr(sys, "argv", ["fairseq-generate"])
    args = type("Flags", (), flags)()
    config.check_modes(args)
    assert args.tpu
