"""The LLaMA-like decoder: transformers' Llama on the same weights, its quantized twin, and what no position may see."""

import pytest
import torch
from fairseq import options
from fairseq.tasks.language_modeling import LanguageModelingTask
from plugin.encoders import dictionary

from fairseq_dsq.errors import DSQError
from fairseq_dsq.nn import DSQLinear
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.probe import training_config

TINY = (
    "--task", "language_modeling", "--tokens-per-sample", "32", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim",
    "56", "--decoder-layers", "2", "--decoder-attention-heads", "4",
)  # fmt: skip
LEVELS = ("[2,2,2,16]", "[4,4,4,16]")
PAD = 1


def build(*flags, arch="llama", seed=0):
    flags = ["data", "--arch", arch, *TINY, *flags]
    task = LanguageModelingTask(training_config(["data", "--arch", "llama", *TINY[:4]]).task, dictionary())
    torch.manual_seed(seed)
    model = task.build_model(options.parse_args_and_arch(options.get_training_parser(), flags))
    for name, parameter in model.named_parameters():  # so that no norm is one and no logit nearly zero
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + name.endswith("norm.weight"))
    return model.eval()


def twin(*flags, level="float32", **options):
    form = ("--dsq-format", "float32") if level == "float32" else ("--dsq-levels", level)
    return build(*form, *flags, arch="llama_dsq", **options)


def tokens(batch=3, length=20, seed=1):
    return torch.randint(4, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def stepwise(model, sentences, order=None):
    """Logits of every position, decoded one after the other; beams change places after the fifth."""
    state, found = {}, []
    for length in range(1, sentences.shape[1] + 1):
        found.append(model(sentences[:, :length], incremental_state=state)[0])
        if order is not None and length == 5:
            model.decoder.reorder_incremental_state_scripting(state, order)
            sentences, found = sentences[order], [step[order] for step in found]
    return torch.cat(found, 1)


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_transformers_llama(tied):
    transformers = pytest.importorskip("hugging_face", reason="needs transformers and safetensors").transformers
    model = build("--rotary-base", "500", "--rms-norm-eps", "1e-3", *["--share-decoder-input-output-embed"] * tied)
    shape = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(dictionary()), **shape, tie_word_embeddings=tied, rms_norm_eps=1e-3, rope_theta=500.0
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    theirs = transformers.LlamaForCausalLM(config).eval()
    names = {
        "decoder.": "model.", "embed_tokens": "embed_tokens", "self_attn_layer_norm": "input_layernorm",
        "final_layer_norm": "post_attention_layernorm", "layer_norm": "norm", "out_proj": "o_proj", "ffn": "mlp",
        "model.output_projection": "lm_head",
    }  # fmt: skip
    weights = {}
    for name, value in model.state_dict().items():
        for own, other in names.items():
            if own != "layer_norm" or name.startswith("model.layer_norm"):
                name = name.replace(own, other)
        weights[name] = value
    theirs.load_state_dict(weights)
    expected = theirs(tokens()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens())[0], expected, rtol=1e-5, atol=1e-5)


def test_the_twin_at_float32_is_the_float_model():
    model = build()
    quantized = twin(seed=1)
    quantized.load_state_dict({**quantized.state_dict(), **model.state_dict()})
    names = {name for name in quantized.state_dict() if not name.startswith("dsq.")}
    assert names == set(model.state_dict())
    torch.testing.assert_close(quantized(tokens())[0], model(tokens())[0], rtol=1e-5, atol=1e-5)
    assert sum(isinstance(module, DSQLinear) for module in quantized.modules()) == 2 * 7 + 1


@pytest.mark.parametrize("level", LEVELS)
def test_no_position_sees_a_later_one(level):
    """Not by a bit; what stands there does change what comes after."""
    model = twin(level=level)
    before = model(tokens())[0]
    for start in (1, 7, 17):
        changed = tokens()
        changed[:, start:] = tokens(seed=2)[:, start:]
        after = model(changed)[0]
        assert torch.equal(before[:, :start], after[:, :start])
        assert not torch.equal(before[:, start:], after[:, start:])


@pytest.mark.parametrize("level", ["float32", *LEVELS])
@pytest.mark.parametrize("order", [None, (2, 0, 0)])
def test_decoding_step_by_step_is_teacher_forcing(level, order):
    order = None if order is None else torch.tensor(order)
    for model in [twin(level=level), *([build()] if level == "float32" else [])]:
        sentences = tokens() if order is None else torch.cat([tokens()[:, :5], tokens(seed=4)[:, 5:]], 1)
        with torch.no_grad():
            found = stepwise(model, sentences, order)
            expected = model(sentences if order is None else sentences[order])[0]
        # Float summation differs with the shape, and its last bit may turn a code.
        tolerance = 1e-5 if level == "float32" else 0.02
        assert (found - expected).abs().mean() < tolerance * expected.abs().mean()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("level", ["float32", *LEVELS])
def test_a_padded_sentence_is_the_sentence_alone(level, side):
    for model in [twin(level=level), *([build()] if level == "float32" else [])]:
        batch, short = tokens(), tokens()[:1, :13]
        real = slice(0, 13) if side == "right" else slice(7, 20)
        batch[0] = PAD
        batch[0, real] = short[0]
        with torch.no_grad():
            found, expected = model(batch)[0], model(short)[0]
        assert found.isfinite().all()
        torch.testing.assert_close(found[:1, real], expected, rtol=1e-5, atol=1e-5)


def test_the_projections_of_one_input_share_one_stash():
    model = twin("--dsq-stash-scope", "gemm", level="[4,4,4,16]").train()
    model(tokens())[0].sum().backward()
    work = model.dsq.context.ledger.drain()
    # A layer stashes the inputs of q k v, of out, of gate and up, of down, and both operands of two products.
    assert sum(work.stashes.values()) == 2 * (4 + 4) + 1


def test_every_architecture_has_its_shape_and_its_twin():
    for name, size, float_size in (("60m", 58e6, 25e6), ("130m", 134e6, 85e6), ("350m", 368e6, 302e6)):
        float_model = probe.build(probe.ModelSpec(f"llama_{name}", vocabulary=32_000))
        quantized = probe.build(probe.ModelSpec(f"llama_dsq_{name}", vocabulary=32_000))
        for model in (float_model, quantized):
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(size, rel=0.01)
            assert sum(p.numel() for p in model.decoder.layers.parameters()) == pytest.approx(float_size, rel=0.03)


@pytest.mark.parametrize("heads", ["3", "32", "0"])
def test_heads_that_do_not_fit_are_refused_in_one_line(heads):
    with pytest.raises((DSQError, SystemExit), match=f"--decoder-attention-heads: got {heads}, expected a divisor of"):
        build("--decoder-attention-heads", heads)
