"""fairseq-hydra-train on configs/hydra/: a YAML means what the command line means, and is refused in the same lines."""

from e2e.conftest import ROOT
from e2e.states import assert_equal_states, load_model

from fairseq_dsq import record

DECODER = {"layers": 1, "embed_dim": 32, "ffn_embed_dim": 48, "attention_heads": 2}
TINY = {
    "transformer_dsq": [f"model.{side}_{name}={n}" for side in ("encoder", "decoder") for name, n in DECODER.items()],
    "transformer_lm_dsq": [f"model.decoder_{name}={n}" for name, n in DECODER.items()],
    "llama_dsq": [f"model.decoder_{name}={n}" for name, n in DECODER.items()],
}  # fmt: skip


def hydra(name, data, save_dir, *overrides):
    return (
        "fairseq-hydra-train", "--config-dir", ROOT / "configs/hydra", "--config-name", name, f"task.data={data}",
        f"checkpoint.save_dir={save_dir}", "common.cpu=true", *TINY[name], "dataset.max_tokens=512",
        "optimization.lr=[0.005]", "lr_scheduler.warmup_updates=10", "optimization.max_epoch=1", *overrides,
    )  # fmt: skip


def flags(save_dir, *more):
    return (
        "--user-dir", "fairseq_dsq", "--seed", 1, "--cpu", "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)",
        "--lr", 0.005, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 10, "--max-tokens", 512, "--max-epoch", 1,
        "--no-epoch-checkpoints", "--save-dir", save_dir, *more,
    )  # fmt: skip


def shape(*sides):
    return [f"--{side}-{name.replace('_', '-')}={value}" for side in sides for name, value in DECODER.items()]


def test_a_translation_trains_to_the_bits_of_the_command_line(cli, tmp_path):
    """Levels are lists, switches booleans and numbers text, as YAML has them."""
    cli.run(
        *hydra(
            "transformer_dsq", cli.data, tmp_path / "yaml", "model.dsq_levels=[[4,4,4,16]]", "model.dsq_patience='3'",
            "+model.dsq_attention_matmul=off", "+model.dsq_rounding=stochastic",
        )
    )  # fmt: skip
    cli.run(
        "fairseq-train", cli.data, "--arch", "transformer_dsq_iwslt_de_en", *shape("encoder", "decoder"), "--dropout",
        0.3, "--share-decoder-input-output-embed", "--criterion", "dsq_label_smoothed_cross_entropy",
        "--label-smoothing", 0.1, "--weight-decay", 0.0001, *flags(tmp_path / "flags"), "--dsq-levels", "[4,4,4,16]",
        "--dsq-attention-matmul", "off", "--dsq-rounding", "stochastic",
    )  # fmt: skip
    assert_equal_states(load_model(tmp_path / "yaml"), load_model(tmp_path / "flags"))
    starts, points = zip(*(record.read(tmp_path / name / record.NAME) for name in ("yaml", "flags")), strict=True)
    assert (starts[0].arch, starts[0].criterion) == (starts[1].arch, starts[1].criterion)
    assert (points[0].train, points[0].valid) == (points[1].train, points[1].valid)


def test_a_language_model_trains_to_the_bits_of_the_command_line_and_is_scored(cli, lm_data, tmp_path):
    """What its dataclass takes from the task, the length of a sample, it has."""
    tokens = "task.tokens_per_sample=32"
    cli.run(*hydra("transformer_lm_dsq", lm_data, tmp_path / "yaml", tokens))
    cli.run(
        "fairseq-train", lm_data, "--task", "language_modeling", "--tokens-per-sample", 32, "--arch",
        "transformer_lm_dsq", *shape("decoder"), "--decoder-input-dim", 32, "--decoder-output-dim", 32,
        "--share-decoder-input-output-embed", "--decoder-normalize-before", "--activation-fn", "gelu", "--dropout", 0.1,
        "--attention-dropout", 0.1, "--criterion", "dsq_cross_entropy", "--weight-decay", 0.01,
        *flags(tmp_path / "flags"), "--required-batch-size-multiple", 1,
    )  # fmt: skip
    assert_equal_states(load_model(tmp_path / "yaml"), load_model(tmp_path / "flags"))
    out, err = cli.run(
        "fairseq-eval-lm", lm_data, "--user-dir", "fairseq_dsq", "--path", tmp_path / "yaml/checkpoint_best.pt",
        "--gen-subset", "valid", "--tokens-per-sample", 32, "--max-tokens", 256,
    )  # fmt: skip
    assert "Loss (base 2)" in out + err


def test_a_llama_trains_to_the_bits_of_the_command_line(cli, lm_data, tmp_path):
    cli.run(*hydra("llama_dsq", lm_data, tmp_path / "yaml", "task.tokens_per_sample=32", "+model.rotary_base=500"))
    cli.run(
        "fairseq-train", lm_data, "--task", "language_modeling", "--tokens-per-sample", 32, "--arch", "llama_dsq",
        *shape("decoder"), "--criterion", "dsq_cross_entropy", "--weight-decay", 0.1, *flags(tmp_path / "flags"),
        "--adam-betas", "(0.9, 0.95)", "--required-batch-size-multiple", 1, "--rotary-base", 500,
    )  # fmt: skip
    assert_equal_states(load_model(tmp_path / "yaml"), load_model(tmp_path / "flags"))


def test_a_value_or_a_name_that_is_no_flag_s_is_refused_in_one_line(cli, lm_data, tmp_path):
    for override, line in (
        ("model.dsq_patience=0", "argument --dsq-patience: got 0, expected an integer >= 1"),
        ("+model.dsq_gemm=fast", "argument --dsq-gemm: got 'fast', expected one of auto, int8, native, cuda, float32"),
        ("+model.dsq_patince=3", "dsq_patince: no such flag, expected dsq_patience"),
    ):
        _, err = cli.run(*hydra("transformer_lm_dsq", lm_data, tmp_path, override), code=1)
        assert "Traceback" not in err
        assert err.splitlines()[-1] == f"fairseq-hydra-train: error: {line}"
