"""Weights as codes through the real command lines: training, resuming, generating, going back to float; refusals."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from e2e.states import assert_equal_states, load_model

from fairseq_dsq.errors import DSQError

# Minutes of fairseq's commands: scripts/readme.sh runs them.
pytestmark = pytest.mark.slow

# An optimizer of one's own that knows codes: its class says so, and each step goes to the parameter's dsq_codes.
OPTIMIZER = """
import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import FairseqAdamConfig

import fairseq_dsq
from fairseq_dsq.quantized import noise_seed


class SignMomentum(torch.optim.Optimizer):
    supports_memory_efficient_fp16 = True
    supports_flat_params = False

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros(parameter.shape)
                state["step"] += 1
                state["mean"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                step = state["mean"].sign() * group["lr"]
                if hasattr(parameter, "dsq_codes"):
                    parameter.dsq_codes.subtract_(step, noise_seed(1, state["step"], index))
                else:
                    parameter.sub_(step)


@register_optimizer("sign_momentum", dataclass=FairseqAdamConfig)
class FairseqSignMomentum(FairseqOptimizer):
    updates_codes = True

    def __init__(self, cfg, params):
        super().__init__(cfg)
        self._optimizer = SignMomentum(params, cfg.lr[0])

    @property
    def optimizer_config(self):
        return {"lr": self.cfg.lr[0]}
"""


@pytest.fixture(scope="module")
def user_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes_plugin")
    (folder / "__init__.py").write_text("import fairseq_dsq\nfrom . import ranks, sign_momentum\n")
    (folder / "ranks.py").write_text(RANKS.read_text())
    (folder / "sign_momentum.py").write_text(OPTIMIZER)
    return folder


# Each worker keeps the model that it validates.
BIN = Path(sys.executable).parent
RANKS = Path(__file__).parent / "ranks/__init__.py"
SUPERVISOR = Path(__file__).resolve().parents[2] / "scripts/distributed.sh"


def flags(user_dir, *more):
    return (
        "--user-dir", user_dir, "--optimizer", "sign_momentum", "--lr", "1e-3", "--dsq-weights", "direct",
        "--dsq-levels", "[int8/row|float32,int8/row,float32,float32]", *more,
    )  # fmt: skip


def lines(log, key):
    return [json.loads(line[line.index("{") :]) for line in log.splitlines() if f'"{key}"' in line]


@pytest.fixture(scope="module")
def trained(cli, user_dir, tmp_path_factory):
    """Two epochs at once, and the log."""
    run = tmp_path_factory.mktemp("direct")
    log = cli.train(run, *flags(user_dir, "--max-epoch", 2, "--update-epoch-batch-itr", True, "--keep-last-epochs", 2))
    return run, log


def test_codes_train_and_what_they_take_and_do_is_logged(trained):
    run, log = trained
    first, last = lines(log, "train_loss")
    assert float(last["train_loss"]) < float(first["train_loss"])
    assert 0 < float(last["train_dsq_flips"]) < 1
    state = load_model(run / "checkpoint_last.pt")
    codes = [name for name in state if name.endswith("weight_codes")]
    assert len(codes) == 16 and "decoder.output_projection.weight_codes" not in state
    assert not any(name.removesuffix("_codes") in state for name in codes)
    no_weight = ("weight_columns", "weight_format", "version", "output_projection.weight")  # the last is the embedding
    held = sum(
        value.numel() * value.element_size()
        for name, value in state.items()
        if not name.startswith("dsq.") and not name.endswith(no_weight) and "_float_tensor" not in name
    )
    assert float(last["train_dsq_weight_bytes"]) == held
    assert "16 weights are codes of int8/row" in log


def test_a_resumed_training_is_the_uninterrupted_one(cli, user_dir, trained, tmp_path):
    cli.train(tmp_path / "run", *flags(user_dir, "--max-epoch", 1, "--update-epoch-batch-itr", True))
    cli.train(tmp_path / "run", *flags(user_dir, "--max-epoch", 2, "--update-epoch-batch-itr", True))
    resumed, whole = load_model(tmp_path / "run"), load_model(trained[0])
    assert list(resumed) == list(whole)
    assert_equal_states(resumed, whole)


def test_codes_generate_and_go_back_to_float(cli, user_dir, trained, tmp_path):
    run, _ = trained
    best, plain = run / "checkpoint_best.pt", tmp_path / "float.pt"
    search = ("--beam", 2, "--max-len-b", 10)
    cli.run("fairseq-generate", cli.data, "--path", best, "--user-dir", user_dir, *search)
    cli.run("fairseq-dsq", "export-float", best, plain)
    state, codes = load_model(plain), load_model(best)
    name = "encoder.layers.0.fc1.weight"
    values = codes[f"{name}_codes"].view(torch.int8).float() * codes[f"{name}_scale"]
    assert torch.equal(state[name], values) and not any("_codes" in key or "_columns" in key for key in state)
    out, _ = cli.run("fairseq-generate", cli.data, "--path", plain, *search)
    assert "BLEU" in out
    # And a float checkpoint becomes codes again, under scales of its own.
    log = cli.train(
        tmp_path / "again", *flags(user_dir, "--finetune-from-model", plain, "--max-update", 1, "--lr", "0")
    )
    assert "done training" in log
    again = load_model(tmp_path / "again/checkpoint_last.pt")
    requantized = again[f"{name}_codes"].view(torch.int8).float() * again[f"{name}_scale"]
    assert ((requantized - values).abs() <= 0.501 * again[f"{name}_scale"]).all()


def test_codes_do_not_load_into_a_float_model(cli, user_dir, trained, tmp_path):
    command = cli.train_command(
        tmp_path / "run", *flags(user_dir), "--dsq-weights", "float", "--optimizer", "adam",
        "--finetune-from-model", trained[0] / "checkpoint_last.pt",
    )  # fmt: skip
    _, err = cli.run(*command, code=1)
    assert "expected --dsq-weights direct, or fairseq-dsq export-float" in err.splitlines()[-1]


def test_an_8_bit_model_infers_with_ternary_weights(cli, user_dir, trained, tmp_path):
    best = trained[0] / "checkpoint_best.pt"
    evaluate = (
        "fairseq-validate", cli.data, "--user-dir", user_dir, "--task", "translation", "--max-tokens", 500,
        "--required-batch-size-multiple", 1,
    )  # fmt: skip
    losses = []
    for more in ((), ("--model-overrides", "{'dsq_weight_format': 'ternary'}")):
        out, err = cli.run(*evaluate, "--path", best, *more)
        losses.append(float(re.findall(r"\| loss ([0-9.]+)", out + err)[-1]))
        said = f"{best}: weights held as int8/row are encoded again as ternary" in out + err
        assert said == bool(more)
    assert losses[0] < losses[1] < 2 * losses[0]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--optimizer", "adam"), "argument --optimizer: got adam, expected one that updates codes ("),
        (("--bf16",), "argument --bf16: got True, expected --memory-efficient-bf16 or none"),
        (("--store-ema",), "argument --store-ema: got True, expected none"),
        (
            ("--distributed-world-size", 2, "--ddp-backend", "c10d", "--distributed-no-spawn"),
            "argument --ddp-backend: got c10d, expected legacy_ddp on several workers",
        ),
        (("--dsq-weight-format", "bfp8"), "argument --dsq-weight-format: got bfp8, expected integers with a scale by"),
        (("--dsq-weight-scale", "median"), "argument --dsq-weight-scale: got 'median', expected one of own, absmean"),
        (("--dsq-skip", "encoder decoder"), "argument --dsq-weights: got direct, and no layer is quantized"),
    ],
)
def test_what_codes_cannot_have_is_refused_in_one_line(user_dir, tmp_path, train, more, expected):
    with pytest.raises((DSQError, SystemExit)) as refusal:
        train(tmp_path / "run", *flags(user_dir), *more)
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.pt"))


def test_flags_of_codes_without_codes_are_said_to_be_idle(cli, tmp_path):
    log = cli.train(tmp_path / "run", "--dsq-weight-format", "ternary", "--max-update", 1)
    assert "--dsq-weight-format ternary: has no effect with --dsq-weights float" in log


def test_ternary_weights_train_in_bfloat16_without_float_copies(cli, user_dir, tmp_path):
    log = cli.train(
        tmp_path / "run", *flags(user_dir, "--dsq-weight-format", "ternary", "--max-epoch", 1),
        "--memory-efficient-bf16", "--dsq-format", "bfp", "--dsq-levels", "[16,4,4,16]",
    )  # fmt: skip
    assert "done training" in log and float(lines(log, "train_loss")[-1]["train_dsq_flips"]) > 0


def test_codes_of_two_workers_with_other_batches_stay_equal(cli, user_dir, tmp_path):
    command = cli.train_command(
        tmp_path / "run", *flags(user_dir, "--dsq-weight-format", "int4/row", "--max-epoch", 1),
        "--task", "translation_of_ranks", "--ddp-backend", "legacy_ddp",
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DSQ_ENV": str(BIN.parent), "RANKS": str(tmp_path)}
    done = subprocess.run(
        [SUPERVISOR, "2", BIN / command[0], *map(str, command[1:])], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert sum(name.endswith("weight_codes") for name in first) == 16
    assert all(torch.equal(value, second[name]) for name, value in first.items())
