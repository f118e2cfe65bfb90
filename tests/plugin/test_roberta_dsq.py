"""roberta_dsq: fairseq's roberta where nothing asks for more, quantized heads, token types, the pooler, misfits."""

import copy

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from plugin.encoders import FLOAT32, HEAD, classifier, classifier_task, masked_lm, pairs

from fairseq_dsq.errors import DSQError
from fairseq_dsq.nn import DSQDropout, DSQLinear
from fairseq_dsq.nn.saved import Activation
from fairseq_dsq.plugin.encoder import token_types
from fairseq_dsq.plugin.twins import HEADS

TWO_LEVELS = ("--dsq-levels", "[2,2,2,16] [16,4,4,16]", "--dsq-patience", "1")


def official_layout(state):
    """The names of fairseq's published roberta.base: decoder, emb_layer_norm, one in_proj, no version."""
    old = {}
    for name, tensor in state.items():
        name = name.replace("encoder.", "decoder.", 1).replace("layernorm_embedding", "emb_layer_norm")
        if name.endswith(".version") or name.startswith("dsq."):
            continue
        for kind in ("weight", "bias"):
            if name.endswith(f".q_proj.{kind}"):
                parts = [state[name.replace("decoder.", "encoder.", 1).replace("q_proj", p)] for p in PROJECTIONS]
                old[name.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = torch.cat(parts)
        if not any(projection in name for projection in PROJECTIONS):
            old[name] = tensor
    return old


PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def logits(model, tokens, **options):
    with torch.no_grad():
        return model.eval()(tokens, **options)[0]


def test_the_architectures_are_registered():
    assert {"roberta_dsq", "roberta_dsq_large"} <= set(ARCH_MODEL_REGISTRY)


def test_float32_equals_fairseq_s_roberta_on_one_checkpoint():
    own, dsq, tokens = masked_lm(arch="roberta"), masked_lm(*FLOAT32), pairs()
    dsq.load_state_dict(copy.deepcopy(own.state_dict()))
    torch.testing.assert_close(logits(dsq, tokens), logits(own, tokens), rtol=0, atol=1e-5)
    own, dsq = classifier(arch="roberta"), classifier(*FLOAT32)
    dsq.load_state_dict(copy.deepcopy(own.state_dict()))
    head = {"classification_head_name": HEAD}
    torch.testing.assert_close(logits(dsq, tokens, **head), logits(own, tokens, **head), rtol=0, atol=1e-5)


def test_two_bits_take_effect_in_encoder_lm_head_and_classification_head():
    tokens, model = pairs(), classifier("--dsq-levels", "[2,2,2,16]")
    twin = classifier(*FLOAT32)
    twin.load_state_dict({**model.state_dict(), **{f"dsq.{k}": v for k, v in twin.dsq.state_dict().items()}})
    for options in ({}, {"classification_head_name": HEAD}, {"features_only": True}):
        assert (logits(model, tokens, **options) - logits(twin, tokens, **options)).abs().max() > 1e-3
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"DSQMultiheadAttention", "DSQRobertaLMHead", "DSQLinear"} <= kinds
    assert not {"Linear", "MultiheadAttention", "RobertaLMHead"} & kinds


def test_names_shapes_and_first_values_are_fairseq_s():
    torch.manual_seed(1)
    own = classifier(arch="roberta").state_dict()
    torch.manual_seed(1)
    dsq = classifier().state_dict()
    assert {name for name in dsq if not name.startswith("dsq.")} == set(own)
    assert all(torch.equal(dsq[name], value) for name, value in own.items())


def test_the_official_layout_loads_and_its_missing_head_is_new():
    own = masked_lm(arch="roberta")
    model = classifier(*FLOAT32)
    head = copy.deepcopy(model.classification_heads.state_dict())
    model.load_state_dict(official_layout(own.state_dict()))
    torch.testing.assert_close(logits(model, tokens := pairs()), logits(own, tokens), rtol=0, atol=1e-5)
    assert all(torch.equal(value, head[name]) for name, value in model.classification_heads.state_dict().items())


def test_a_head_follows_the_level():
    task = classifier_task()
    model = classifier(*TWO_LEVELS, task=task)
    head = model.classification_heads[HEAD]
    assert head.dense.context.config.precision.q == head.out_proj.context.config.precision.q == (2, 2, 2, 16)
    for _ in range(2):
        task.begin_valid_epoch(1, model)
        task.post_validate(model, {"loss": 1.0}, None)
    model.train()
    assert head.dense.context.config.precision.q == head.out_proj.context.config.precision.q == (16, 4, 4, 16)
    model.register_classification_head(HEAD, 5)
    assert model.classification_heads[HEAD].out_proj.context.config.precision.q == (16, 4, 4, 16)


def test_heads_of_a_checkpoint_are_quantized_as_they_are_registered():
    trained = classifier()
    trained.register_classification_head("mnli", 7, 16)
    model = classifier("--load-checkpoint-heads")
    model.load_state_dict(trained.state_dict())
    assert model.classification_heads["mnli"].out_proj.out_features == 7
    assert isinstance(model.classification_heads["mnli"].dense, DSQLinear)
    assert model.classification_heads["mnli"].dense.context.config.precision.q == (4, 4, 4, 16)


@pytest.mark.parametrize(
    ("pattern", "dense", "out_proj", "lm_dense"),
    [
        (f"{HEADS}.*", True, True, False),
        (f"{HEADS}.{HEAD}.dense", True, False, False),
        ("*.dense", True, False, True),
        (f"encoder {HEADS}.*.out_proj", False, True, True),
        ("encoder.lm_head", False, False, True),
    ],
)
def test_skip_patterns_reach_heads(pattern, dense, out_proj, lm_dense):
    model = classifier("--dsq-skip", pattern)
    head = model.classification_heads[HEAD]
    layers = (head.dense, head.out_proj, model.encoder.lm_head.dense)
    assert tuple(not layer.context.packs for layer in layers) == (dense, out_proj, lm_dense)


def test_a_skip_pattern_that_matches_no_layer_and_no_head_is_named():
    with pytest.raises(DSQError, match=r"--dsq-skip: skip pattern 'classification_heads\.other' matches no layer"):
        classifier("--dsq-skip", f"{HEADS}.other encoder")
    with pytest.raises(DSQError, match="--dsq-skip"):
        masked_lm("--dsq-skip", f"{HEADS}.*")


def test_the_stash_scope_reaches_heads():
    head = classifier("--dsq-stash-scope", "all").classification_heads[HEAD]
    assert isinstance(head.dropout, DSQDropout)
    assert isinstance(head.activation_fn, Activation)
    assert head.activation_fn.context.packs_everything
    assert not isinstance(classifier().classification_heads[HEAD].dropout, DSQDropout)
    skipped = classifier("--dsq-stash-scope", "all", "--dsq-skip", f"{HEADS}.*").classification_heads[HEAD]
    assert not isinstance(skipped.dropout, DSQDropout)
    assert not skipped.activation_fn.context.packs_everything


def saved_bytes(model, tokens):
    """Bytes that autograd keeps for a classification step, those of parameters aside."""
    kept = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(tokens, classification_head_name=HEAD)[0].sum().backward()
    return sum(kept.values())


def test_a_step_trains_every_part_and_keeps_less_under_scope_all():
    tokens, sizes = pairs(), {}
    for scope in ("gemm", "all"):
        model = classifier("--dsq-stash-scope", scope, "--token-types", "2")
        sizes[scope] = saved_bytes(model, tokens)
        assert model.dsq.context.ledger.drain().stash_bytes > 0
        for name, parameter in model.named_parameters():
            if "lm_head" not in name:
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert sizes["all"] < 0.8 * sizes["gemm"]


def test_spectral_norm_and_quant_noise_are_refused_in_a_line():
    for flags in (("--spectral-norm-classification-head",), ("--quant-noise-pq", "0.1")):
        with pytest.raises(DSQError, match="has hooks"):
            classifier(*flags)


def test_token_types_are_bert_s():
    tokens = torch.tensor([[0, 5, 2, 6, 2, 1], [0, 5, 6, 2, 1, 1], [0, 2, 2, 7, 2, 8], [0, 5, 6, 7, 8, 9]])
    expected = [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    assert token_types(tokens, separator=2).tolist() == expected


def test_token_types_and_epsilon_change_what_they_should():
    tokens = pairs()
    model, plain = masked_lm(*FLOAT32, "--token-types", "2"), masked_lm(*FLOAT32)
    state = {name: value for name, value in model.state_dict().items() if "embed_token_types" not in name}
    plain.load_state_dict(copy.deepcopy(state))
    assert (logits(model, tokens) - logits(plain, tokens)).abs().max() > 1e-4
    model.encoder.sentence_encoder.embed_token_types.weight.data.zero_()
    assert torch.equal(logits(model, tokens), logits(plain, tokens))

    eps = {module.eps for module in plain.modules() if hasattr(module, "normalized_shape")}
    assert eps == {1e-5}
    for flags in ((), ("--dsq-stash-scope", "all")):
        model = classifier("--layer-norm-eps", "1e-12", *flags)
        assert {module.eps for module in model.modules() if hasattr(module, "normalized_shape")} == {1e-12}


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--token-types", "1", "got '1', expected 0, for none, or an integer >= 2"),
        ("--token-types", "two", "got 'two'"),
        ("--layer-norm-eps", "0", "got '0', expected a finite number > 0"),
        ("--layer-norm-eps", "nan", "got 'nan'"),
    ],
)
def test_bad_flags_are_named(flag, value, expected):
    with pytest.raises(SystemExit, match=f"argument {flag}: {expected}"):
        masked_lm(f"{flag}={value}")


def with_pooler(state):
    """A state as convert-hf writes it."""
    dim = 32
    pooler = {"dense.weight": torch.randn(dim, dim), "dense.bias": torch.randn(dim)}
    pooler |= {"out_proj.weight": torch.zeros(0, dim), "out_proj.bias": torch.zeros(0)}
    return {**state, **{f"{HEADS}.pooler.{name}": value for name, value in pooler.items()}}, pooler


def test_the_pooler_is_used_only_where_asked_for():
    state, pooler = with_pooler(masked_lm(arch="roberta").state_dict())
    for flags, equal in (((), False), (("--head-from-pooler",), True)):
        model = classifier(*flags)
        out_proj = model.classification_heads[HEAD].out_proj.weight.clone()
        model.load_state_dict(dict(state))
        dense = model.classification_heads[HEAD].dense
        assert torch.equal(dense.weight, pooler["dense.weight"]) is equal
        assert torch.equal(dense.bias, pooler["dense.bias"]) is equal
        assert torch.equal(model.classification_heads[HEAD].out_proj.weight, out_proj)
    classifier(arch="roberta").load_state_dict(dict(state))  # fairseq's own roberta drops it
    masked_lm("--head-from-pooler").load_state_dict(dict(state))


def test_a_trained_head_is_never_overwritten_by_the_pooler():
    trained = classifier()
    state, _ = with_pooler(trained.state_dict())
    model = classifier("--head-from-pooler")
    for checkpoint in (state, trained.state_dict()):
        model.load_state_dict(dict(checkpoint))
        assert torch.equal(
            model.classification_heads[HEAD].dense.weight, trained.classification_heads[HEAD].dense.weight
        )
    named, twin = (classifier(task=classifier_task("pooler")) for _ in range(2))
    twin.load_state_dict(named.state_dict())
    assert torch.equal(*(model.classification_heads["pooler"].dense.weight for model in (named, twin)))


def test_a_missing_pooler_is_named():
    with pytest.raises(DSQError, match=r"--head-from-pooler: the checkpoint's pooler is none, expected 32 x 32"):
        classifier("--head-from-pooler").load_state_dict(masked_lm(arch="roberta").state_dict())


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        ((), {"words": 30}, r"embed_tokens\.weight is 35 x 32, expected 45 x 32 \(entries of the dictionary in data"),
        (("--encoder-embed-dim", "64"), {}, r"embed_tokens\.weight is 45 x 64, .* \(--encoder-embed-dim 32\)"),
        (("--encoder-ffn-embed-dim", "64"), {}, r"fc1\.weight is 64 x 32, .* \(--encoder-ffn-embed-dim 48\)"),
        (("--max-positions", "30"), {}, r"embed_positions\.weight is 32 x 32, .* \(--max-positions 24 and 2\)"),
        (("--token-types", "2"), {}, r"embed_token_types\.weight is 2 x 32, expected none \(--token-types 0\)"),
        (("--encoder-layers", "3"), {}, r"layers\.2\..* expected none \(--encoder-layers 2\)"),
        (("--encoder-layers", "1"), {}, r"layers\.1\..* is none, .* \(--encoder-layers 2\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_in_one_line(flags, changes, expected):
    state = masked_lm(*flags, **changes).state_dict()
    with pytest.raises(DSQError, match=expected) as stop:
        masked_lm().load_state_dict(state)
    assert "\n" not in str(stop.value)
