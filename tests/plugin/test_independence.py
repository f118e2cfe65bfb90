"""No position sees a later one, no sentence another: at any level, whatever side the padding is on."""

import pytest
import torch
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from nn.common import dictionary, seeded, tiny_transformer
from plugin.encoders import HEAD, classifier, pairs

from fairseq_dsq.formats import FormatOptions
from fairseq_dsq.nn import DSQContext, GemmConfig
from fairseq_dsq.plugin.attach import quantize
from fairseq_dsq.precision import PrecisionConfig

WORDS = dictionary()
LENGTHS = (40, 23, 9, 31, 17)
LONGEST = max(LENGTHS)
PER_ROW = FormatOptions(fixed_scale="row")
PRECISIONS = [
    *(PrecisionConfig(q) for q in ((2, 2, 2, 16), (4, 4, 4, 16), (8, 8, 8, 16), (16, 4, 4, 16))),
    PrecisionConfig((4, 4, 4, 16), "fixed", PER_ROW),
]
# A last bit of a float sum may turn the last bit of a 16-bit code: a step of 2^-14 of the largest value, and what
# becomes of it.
TOLERANCE = {"rtol": 0, "atol": 2e-3}

levels = pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p.format_name}{p}")
value_boxes = pytest.mark.parametrize("value_boxes", ["row", "feature"])


def quantized(model, precision, value_boxes="row"):
    quantize(model, DSQContext(GemmConfig(precision, value_boxes=value_boxes)))
    return model.eval()


def transformer(precision, value_boxes):
    sizes = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 96, "encoder_layers": 2, "decoder_layers": 2}
    return quantized(tiny_transformer(**sizes), precision, value_boxes)


def language_model(precision, value_boxes):
    torch.manual_seed(1)
    config = TransformerLanguageModelConfig(
        decoder_layers=2, decoder_embed_dim=64, decoder_ffn_embed_dim=96, decoder_output_dim=64, decoder_input_dim=64,
        decoder_attention_heads=2, max_target_positions=64, tokens_per_sample=64,
    )  # fmt: skip
    task = type("Task", (), {"source_dictionary": WORDS, "target_dictionary": WORDS})
    return quantized(TransformerLanguageModel.build_model(config, task), precision, value_boxes)


def tokens(rows, length, seed):
    return torch.randint(WORDS.nspecial, len(WORDS), (rows, length), generator=seeded(seed))


def padded(x, side):
    """Rows of a tensor (rows, LONGEST), cut to LENGTHS and padded on a side."""
    y = torch.full_like(x, WORDS.pad())
    for row, length in enumerate(LENGTHS):
        y[row, LONGEST - length if side == "left" else 0 :][:length] = x[row, :length]
    return y


def logits_of(model, previous, source=None):
    """B x T x vocabulary, of a translator or a language model."""
    if source is None:
        return model(previous)[0]
    return model(source, source.ne(WORDS.pad()).sum(1), previous)[0]


@levels
@value_boxes
@pytest.mark.parametrize("build", [transformer, language_model])
@torch.no_grad()
def test_a_decoder_s_logits_do_not_move_with_later_tokens(build, value_boxes, precision):
    model = build(precision, value_boxes)
    source = tokens(3, LONGEST, 1) if build is transformer else None
    previous, other = tokens(3, 37, 2), tokens(3, 37, 3)
    logits = logits_of(model, previous, source)
    for position in (0, 5, 15, 16, 20, 35):
        changed = torch.cat([previous[:, : position + 1], other[:, position + 1 :]], 1)
        moved = logits_of(model, changed, source) - logits
        assert not moved[:, : position + 1].any(), position
        assert moved[:, position + 1 :].any()


@levels
@value_boxes
@torch.no_grad()
def test_incremental_decoding_equals_the_training_pass(value_boxes, precision):
    model = transformer(precision, value_boxes)
    source, previous = padded(tokens(len(LENGTHS), LONGEST, 1), "left"), tokens(len(LENGTHS), 37, 2)
    encoded = model.encoder(source, source.ne(WORDS.pad()).sum(1))
    state = {}
    steps = [
        model.decoder(previous[:, : step + 1], encoder_out=encoded, incremental_state=state)[0] for step in range(37)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), logits_of(model, previous, source), **TOLERANCE)


@levels
@value_boxes
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_translation_does_not_depend_on_its_batch(side, value_boxes, precision):
    model = transformer(precision, value_boxes)
    source, previous = tokens(len(LENGTHS), LONGEST, 1), tokens(len(LENGTHS), 37, 2)
    batch = padded(source, side)
    together, extra = model(batch, batch.ne(WORDS.pad()).sum(1), previous)
    for row, length in enumerate(LENGTHS):
        alone, extra_alone = model(source[row : row + 1, :length], torch.tensor([length]), previous[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, **TOLERANCE)
        # Attention weights are returned in the order of the source as it came.
        start = LONGEST - length if side == "left" else 0
        own = extra["attn"][0][row, :, start : start + length]
        torch.testing.assert_close(own, extra_alone["attn"][0][0], **TOLERANCE)


@levels
@torch.no_grad()
def test_a_language_model_s_logits_do_not_depend_on_the_batch(precision):
    model = language_model(precision, "row")
    sentences = tokens(len(LENGTHS), LONGEST, 1)
    together = logits_of(model, padded(sentences, "right"))
    for row, length in enumerate(LENGTHS):
        alone = logits_of(model, sentences[row : row + 1, :length])[0]
        torch.testing.assert_close(together[row, :length], alone, **TOLERANCE)


@levels
@torch.no_grad()
def test_a_sentence_s_classes_do_not_depend_on_the_batch(precision):
    torch.manual_seed(1)
    flags = ("--dsq-levels", str(precision), "--dsq-format", precision.format_name, "--dsq-fixed-scale", "row")
    model = classifier(*flags).eval()
    batch = pairs(length=23)
    together = model(batch, features_only=True, classification_head_name=HEAD)[0]
    for row, sentence in enumerate(batch):
        own = sentence[sentence.ne(1)][None]
        alone = model(own, features_only=True, classification_head_name=HEAD)[0]
        torch.testing.assert_close(together[row : row + 1], alone, **TOLERANCE)
