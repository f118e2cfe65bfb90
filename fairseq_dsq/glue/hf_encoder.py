"""Hugging Face's BERT and RoBERTa encoders as checkpoints of ``roberta_dsq``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.tasks.masked_lm import MaskedLMTask
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_dsq.glue.hf_vocabulary import read_json
from fairseq_dsq.plugin.checkpoints import shape_to_str
from fairseq_dsq.plugin.config import DSQEncoderConfig, defaults
from fairseq_dsq.plugin.encoder import POOLER
from fairseq_dsq.plugin.probe import training_config
from fairseq_dsq.plugin.twins import HEADS

ARCH = "roberta_dsq"
FAMILIES = ("bert", "roberta")
# Hugging Face's names: fairseq's --activation-fn.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "relu": "relu",
    "tanh": "tanh",
}
# Rows of fairseq's table of positions that stand before the first position.
FIRST_POSITION = 2

LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}
LM_HEADS = {
    "bert": {"dense": "cls.predictions.transform.dense", "layer_norm": "cls.predictions.transform.LayerNorm"},
    "roberta": {"dense": "lm_head.dense", "layer_norm": "lm_head.layer_norm"},
}
# Files may hold either name of the bias; where they hold both, the first is what computes.
LM_BIASES = {
    "bert": ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    "roberta": ("lm_head.decoder.bias", "lm_head.bias"),
}
LM_WEIGHTS = {"bert": "cls.predictions.decoder.weight", "roberta": "lm_head.decoder.weight"}
# Buffers, and BERT's next-sentence head, which nothing in fairseq uses.
IGNORED = {
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
}


@dataclass(frozen=True)
class EncoderConfig:
    """What config.json says of an encoder.

    Attributes:
        family: bert or roberta.
        positions: rows of the table of positions.
        first_position: the row of the first token's position.
        token_types: rows of the table of token types.
        vocabulary: rows of the word embeddings.
        activation_fn: fairseq's name.
    """

    family: str
    layers: int
    embed_dim: int
    ffn_embed_dim: int
    attention_heads: int
    activation_fn: str
    positions: int
    first_position: int
    token_types: int
    vocabulary: int
    layer_norm_eps: float

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sentence."""
        return self.positions - self.first_position

    @property
    def kept_token_types(self) -> int:
        """Token types that the converted model tells apart; RoBERTa's tokenizer gives every token type 0."""
        return self.token_types if self.family == "bert" and self.token_types > 1 else 0

    @property
    def notes(self) -> list[str]:
        """What of the source the converted model does without."""
        if self.family == "roberta" and self.token_types > 1:
            return [f"type_vocab_size is {self.token_types}: RoBERTa gives every token type 0, the others are left out"]
        return []

    def flags(self, untied: bool = False) -> list[str]:
        """The flags of fairseq-train that build the model; ``untied``: the LM head has a weight of its own."""
        flags = {
            "arch": ARCH,
            "encoder-layers": self.layers,
            "encoder-embed-dim": self.embed_dim,
            "encoder-ffn-embed-dim": self.ffn_embed_dim,
            "encoder-attention-heads": self.attention_heads,
            "activation-fn": self.activation_fn,
            "max-positions": self.max_positions,
        }
        for name, value in (("token_types", self.kept_token_types), ("layer_norm_eps", self.layer_norm_eps)):
            if value != defaults(DSQEncoderConfig)[name]:
                flags[name.replace("_", "-")] = value
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [*words, "--untie-weights-roberta"] if untied else words


def read_config(path: Path) -> EncoderConfig:
    """The encoder that a config.json describes.

    Raises:
        ValueError: an encoder that ``roberta_dsq`` cannot be; names the file, the key, its value and what is expected.
    """
    config = read_json(path)

    def expect(key: str, value: Any, *expected: Any) -> None:
        if value not in expected:
            raise ValueError(f"{path}: {key}: got {value!r}, expected {', '.join(map(str, expected))}")

    def number(key: str, default: int | None = None, least: int = 1) -> int:
        value = config.get(key, default)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{path}: {key}: got {value!r}, expected an integer >= {least}")
        return value

    family = config.get("model_type")
    expect("model_type", family, *FAMILIES)
    expect("hidden_act", config.get("hidden_act", "gelu"), *ACTIVATIONS)
    expect("position_embedding_type", config.get("position_embedding_type") or "absolute", "absolute")
    for key in ("is_decoder", "add_cross_attention"):
        expect(key, config.get(key, False), False)
    expect("pruned_heads", config.get("pruned_heads") or {}, {})
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"{path}: layer_norm_eps: got {eps!r}, expected a number > 0")
    encoder = EncoderConfig(
        family=str(family),
        layers=number("num_hidden_layers"),
        embed_dim=number("hidden_size"),
        ffn_embed_dim=number("intermediate_size"),
        attention_heads=number("num_attention_heads"),
        activation_fn=ACTIVATIONS[config.get("hidden_act", "gelu")],
        positions=number("max_position_embeddings"),
        # RoBERTa's positions begin behind the padding token's id, BERT's at 0.
        first_position=number("pad_token_id", 1, least=0) + 1 if family == "roberta" else 0,
        token_types=number("type_vocab_size", 2),
        vocabulary=number("vocab_size"),
        layer_norm_eps=float(eps),
    )
    if encoder.embed_dim % encoder.attention_heads:
        raise ValueError(
            f"{path}: num_attention_heads: got {encoder.attention_heads}, expected a divisor of hidden_size "
            f"{encoder.embed_dim}"
        )
    if encoder.max_positions < 1:
        raise ValueError(
            f"{path}: max_position_embeddings: got {encoder.positions}, expected more than {encoder.first_position}"
        )
    return encoder


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of a folder's weights and its tensors.

    Raises:
        ValueError: neither model.safetensors nor pytorch_model.bin, or one that cannot be read.
    """
    path = folder / "model.safetensors"
    try:
        if path.is_file():
            from safetensors.torch import load_file

            return path, load_file(path)
        path = folder / "pytorch_model.bin"
        if path.is_file():
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
                raise ValueError("expected a dictionary of tensors")
            return path, tensors
    except ImportError:
        raise ValueError(f"{path}: needs safetensors: pip install '.[glue]' in the clone") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # safetensors has an exception of its own, and torch raises any of a damaged file
        raise ValueError(f"{path}: cannot be read: {(str(error).splitlines() or ['it ends early'])[0]}") from None
    raise ValueError(f"{folder}: found neither model.safetensors nor pytorch_model.bin")


class _Source:
    """Hugging Face's tensors, each of which is taken once, and its shape checked."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path = path
        prefixes = [f"{family}." for family in FAMILIES if any(name.startswith(f"{family}.") for name in tensors)]
        self.tensors = {}
        for name, tensor in tensors.items():
            # Files made from TensorFlow's name LayerNorm's parameters so.
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
            self.tensors[name.removeprefix(prefixes[0] if prefixes else "")] = tensor

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of ``shape``, as float32."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: lacks tensor {name}")
        tensor = self.tensors.pop(name)
        if tuple(tensor.shape) != shape:
            has = shape_to_str(tuple(tensor.shape))
            raise ValueError(f"{self.path}: {name} is {has}, expected {shape_to_str(shape)} as config.json says")
        if not tensor.is_floating_point():
            raise ValueError(f"{self.path}: {name}: got {tensor.dtype}, expected floating point")
        return tensor.float()

    def take_layer(self, name: str, *shape: int) -> dict[str, Tensor]:
        """The weight of ``shape`` and the bias, as long as its rows."""
        return {"weight": self.take(f"{name}.weight", *shape), "bias": self.take(f"{name}.bias", shape[0])}


def map_tensors(
    config: EncoderConfig, path: Path, tensors: dict[str, Tensor], rows: Sequence[int]
) -> tuple[dict[str, Tensor], bool]:
    """Tensors by fairseq's names, for the dictionary whose entries are the source's ``rows``.

    Args:
        config: the encoder.
        path: the file of the tensors, for messages.
        tensors: Hugging Face's, of an encoder alone, with its pooler, or with a (masked) language-model head.
        rows: the source's token id of each entry of fairseq's dictionary.

    Returns:
        The tensors, and whether the language-model head has a weight of its own.

    Raises:
        ValueError: a tensor is missing, of another shape than the configuration says, or has no place.
    """
    source, family, dim = _Source(path, tensors), config.family, config.embed_dim
    encoder: dict[str, Tensor] = {}

    def put(name: str, layer: dict[str, Tensor]) -> None:
        encoder.update({f"sentence_encoder.{name}.{kind}": tensor for kind, tensor in layer.items()})

    words = source.take("embeddings.word_embeddings.weight", config.vocabulary, dim)[list(rows)]
    positions = source.take("embeddings.position_embeddings.weight", config.positions, dim)[config.first_position :]
    types = source.take("embeddings.token_type_embeddings.weight", config.token_types, dim)
    if config.kept_token_types:
        put("embed_token_types", {"weight": types})
    else:
        positions = positions + types[0]
    put("embed_tokens", {"weight": words})
    put("embed_positions", {"weight": torch.cat([positions.new_zeros(FIRST_POSITION, dim), positions])})
    put("layernorm_embedding", source.take_layer("embeddings.LayerNorm", dim))
    for number in range(config.layers):
        for name, own in LAYER.items():
            rows_out = config.ffn_embed_dim if own == "fc1" else dim
            columns = [] if "LayerNorm" in name else [config.ffn_embed_dim if own == "fc2" else dim]
            put(f"layers.{number}.{own}", source.take_layer(f"encoder.layer.{number}.{name}", rows_out, *columns))

    untied = False
    bias_names = [name for name in LM_BIASES[family] if name in source.tensors]
    if bias_names:
        if family == "roberta" and config.activation_fn != "gelu":
            raise ValueError(f"{path}: its lm_head has gelu, expected {config.activation_fn}, the encoder's hidden_act")
        for own, name in LM_HEADS[family].items():
            layer = source.take_layer(name, dim, *([dim] if own == "dense" else []))
            encoder.update({f"lm_head.{own}.{kind}": tensor for kind, tensor in layer.items()})
        biases = [source.take(name, config.vocabulary) for name in bias_names]
        encoder["lm_head.bias"] = biases[0][list(rows)]
        encoder["lm_head.weight"] = words
        if LM_WEIGHTS[family] in source.tensors:
            weight = source.take(LM_WEIGHTS[family], config.vocabulary, dim)[list(rows)]
            untied = not torch.equal(weight, words)
            encoder["lm_head.weight"] = weight
    result = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    if "pooler.dense.weight" in source.tensors:
        head = f"{HEADS}.{POOLER}"
        result |= {f"{head}.dense.{kind}": value for kind, value in source.take_layer("pooler.dense", dim, dim).items()}
        result |= {f"{head}.out_proj.weight": words.new_zeros(0, dim), f"{head}.out_proj.bias": words.new_zeros(0)}
    left = sorted(set(source.tensors) - IGNORED)
    if left:
        raise ValueError(f"{path}: tensor {left[0]} has no place in {ARCH} ({len(left)} such)")
    return result, untied


def checkpoint(tensors: dict[str, Tensor], flags: Sequence[str], dictionary: Path, data: Path) -> dict[str, Any]:
    """A fairseq checkpoint of the masked_lm task, at float32, before its first update.

    A language-model head that ``tensors`` lack is newly initialised, always to the same values.

    Args:
        tensors: by fairseq's names.
        flags: of fairseq-train, that build the model.
        dictionary: the dict.txt, without <mask>.
        data: the folder whose dict.txt fairseq takes when it loads the checkpoint.
    """
    config = training_config(
        [str(data), "--task", "masked_lm", "--criterion", "masked_lm", "--dsq-format", "float32", *flags]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MaskedLMTask(config.task, Dictionary.load(str(dictionary))).build_model(config.model)
    # Without the schedule's state, fairseq's own roberta reads it too.
    fresh = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("dsq.")}
    if "encoder.lm_head.weight" not in tensors:
        tensors = {**tensors, "encoder.lm_head.weight": tensors["encoder.sentence_encoder.embed_tokens.weight"]}
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    state: dict[str, Any] = {
        "args": None,
        "cfg": OmegaConf.to_container(config, resolve=True, enum_to_str=True),
        "model": {**fresh, **tensors},
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
    model.load_state_dict(dict(state["model"]))  # every name and shape is the model's
    return state
