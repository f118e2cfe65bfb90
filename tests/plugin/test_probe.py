"""What the probe says a step executes, against torch's own count and against a step that really runs."""

import dataclasses

import pytest
import torch
from nn.common import held_bytes, saved_tensors
from torch.nn.functional import relu
from torch.utils.flop_counter import FlopCounterMode

from fairseq_dsq.cost import load_profile, total_cost
from fairseq_dsq.cost.gemm import stash_bytes
from fairseq_dsq.nn import DSQContext, GemmConfig
from fairseq_dsq.plugin import probe
from fairseq_dsq.plugin.attach import quantize
from fairseq_dsq.precision import PrecisionConfig

LEVEL = PrecisionConfig((16, 4, 4, 16))
SMALL = {
    "encoder-decoder": probe.ModelSpec("transformer_iwslt_de_en", "--encoder-layers 2 --decoder-layers 1", 97, 9, 27),
    "encoder": probe.ModelSpec("roberta_base", "--encoder-layers 2", 97, 21, 63),
    "decoder": probe.ModelSpec("transformer_lm", "--decoder-layers 2 --decoder-embed-dim 64 --decoder-input-dim 64 "
                               "--decoder-output-dim 64 --decoder-attention-heads 4", 97, 18, 54),
    "llama": probe.ModelSpec("llama", "--decoder-layers 2 --decoder-embed-dim 64 --decoder-ffn-embed-dim 96 "
                             "--decoder-attention-heads 4", 97, 18, 54),
}  # fmt: skip


def macs(work):
    return sum(key.gemm.macs * count for key, count in work.gemms.items())


@pytest.mark.parametrize(
    ("name", "fewer_layers"),
    [
        ("transformer_iwslt_de_en", "--encoder-layers 2 --decoder-layers 2"),
        ("roberta-base", "--encoder-layers 2"),
        ("opt-1.3b", "--decoder-layers 2"),
        ("llama_130m", "--decoder-layers 2"),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["forward and backward", "forward"])
def test_macs_are_half_of_torch_s_flops_on_the_float_twin(name, fewer_layers, training):
    spec = probe.find_model(name)
    spec = dataclasses.replace(spec, flags=f"{spec.flags} {fewer_layers}")
    twin = probe.build(spec)
    with FlopCounterMode(display=False) as counter:
        probe.step(twin, spec, training)
    work = probe.trace(spec, training)
    assert 2 * macs(work) == counter.get_total_flops() > 0
    assert ({key.gemm.kind for key in work.gemms} == {"output"}) == (not training)


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_a_step_that_really_runs_executes_what_the_probe_says_and_holds_its_bytes(spec):
    model = probe.build(spec, "cpu")
    context = DSQContext(GemmConfig(LEVEL))
    quantize(model, context)
    with saved_tensors() as saved:
        probe.step(model, spec)
    ran = context.ledger.drain()

    predicted = probe.trace(spec).at_precision(LEVEL)

    def without_scope(counts):
        plain = {}
        for key, count in counts.items():
            key = key._replace(scope="")
            plain[key] = plain.get(key, 0) + count
        return plain

    assert without_scope(predicted.gemms) == ran.gemms
    assert without_scope(predicted.stashes) == ran.stashes

    # A bit for each value of a ReLU, which no GEMM reads.
    functions = [(layer.activation_fn, layer.fc2) for layer in model.modules() if hasattr(layer, "fc2")]
    masks = [spec.tokens * fc2.in_features // 8 for kept, fc2 in functions if kept.function is relu]
    held = held_bytes(saved, model.parameters())[torch.uint8] - sum(masks)
    charged = sum(stash_bytes(key.stash, key.precision) * count for key, count in ran.stashes.items())
    assert charged == held == ran.stash_bytes > 0
    operands = load_profile("operands")
    with_stash = total_cost(operands, ran.gemms.items(), ran.stashes.items())
    without = total_cost(operands, ran.gemms.items(), [])
    assert with_stash.dram_bytes - without.dram_bytes == held


def test_every_gemm_names_the_module_it_serves():
    spec = SMALL["encoder-decoder"]
    work = probe.trace(spec)
    scopes = {key.scope for key in work.gemms}
    assert "decoder.layers.0.encoder_attn" in scopes and "decoder.output_projection" in scopes
    for scope in scopes:
        kinds = {key.gemm.kind for key in work.gemms if key.scope == scope}
        assert kinds == {"output", "grad_input", "grad_weight"}, scope
    assert {key.scope for key in work.stashes} == scopes


def test_a_dsq_architecture_is_traced_as_its_float_twin():
    spec = SMALL["encoder-decoder"]
    quantized = dataclasses.replace(spec, arch="transformer_dsq_iwslt_de_en")
    assert probe.trace(quantized).gemms == probe.trace(spec).gemms


def test_traffic_outside_of_gemms_grows_as_it_should():
    spec = SMALL["decoder"]
    attention, others = probe.traffic(spec)
    longer = dataclasses.replace(spec, length=4 * spec.length, tokens=4 * spec.tokens)
    attention_longer, others_longer = probe.traffic(longer)
    # Sentences four times as long: softmax grows towards 16 times, everything else fourfold.
    assert 4 < attention_longer / attention < 16
    assert others_longer / others == pytest.approx(4, rel=0.1)


def test_a_wider_feed_forward_moves_nothing_in_attention():
    spec = SMALL["encoder-decoder"]
    wider = dataclasses.replace(spec, flags=f"{spec.flags} --encoder-ffn-embed-dim 4096")
    (attention, others), (attention_wider, others_wider) = probe.traffic(spec), probe.traffic(wider)
    assert attention == attention_wider > 0
    assert others_wider > others


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "resnet"}, "arch: got 'resnet', expected one that fairseq-train --arch knows"),
        ({"tokens": 10}, "tokens: got 10, expected a multiple of length 32"),
        ({"length": 0}, "length: got 0, expected an integer >= 1"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        probe.ModelSpec(**{"arch": "transformer", **fields})


def test_models_are_found_by_name_by_file_and_by_architecture(tmp_path):
    assert probe.find_model("opt-1.3b").vocabulary == 50272
    assert probe.find_model("transformer_wmt_en_de").arch == "transformer_wmt_en_de"
    path = tmp_path / "mine.yaml"
    path.write_text("arch: transformer_lm\nlength: 8\ntokens: 16\n")
    assert probe.find_model(str(path)) == probe.ModelSpec("transformer_lm", length=8, tokens=16)
    path.write_text("arch: transformer_lm\ntokens: many\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: tokens: Value 'many'"):
        probe.find_model(str(path))
    with pytest.raises(ValueError, match=r"got 'nix', expected opt-1\.3b, .* or an architecture"):
        probe.find_model("nix")


def test_an_architecture_of_another_family_is_refused():
    with pytest.raises(ValueError, match="expected a translation, language or masked language model"):
        probe.build(probe.ModelSpec("wav2vec"))
