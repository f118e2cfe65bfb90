"""Tiny RoBERTa encoders as fairseq's tasks build them from flags."""

import functools

import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.tasks.masked_lm import MaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask

from fairseq_dsq.plugin.probe import training_config

WORDS = 40
TINY = [
    *("--encoder-layers", "2", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "48"),
    *("--encoder-attention-heads", "4", "--max-positions", "24", "--dropout", "0.1"),
]
FLOAT32 = ("--dsq-format", "float32")
MASKED_LM = ("--task", "masked_lm", "--criterion", "masked_lm")
HEAD = "sentence_classification_head"

# Composing a configuration takes half a second: its task's part is composed once, the model's is the parsed flags.
task_config = functools.cache(lambda *flags: training_config(["data", "--arch", "roberta", *flags]).task)


def dictionary(words=WORDS):
    own = Dictionary()
    for number in range(words):
        own.add_symbol(f"word{number}")
    return own


def parse(arch, flags):
    return options.parse_args_and_arch(options.get_training_parser(), ["data", "--arch", arch, *TINY, *flags])


def masked_lm(*flags, arch="roberta_dsq", words=WORDS):
    """A masked language model; its dictionary ends in <mask>."""
    args = parse(arch, (*MASKED_LM, *flags))
    return MaskedLMTask(task_config(*MASKED_LM), dictionary(words)).build_model(args)


def classifier_task(head=HEAD):
    """The task of a classifier of three classes."""
    words = dictionary()
    words.add_symbol("<mask>")
    flags = ("--task", "sentence_prediction", "--criterion", "sentence_prediction", "--num-classes", "3")
    config = task_config(*flags, "--max-positions", "24", "--classification-head-name", head)
    return SentencePredictionTask(config, words, Dictionary())


def classifier(*flags, arch="roberta_dsq", task=None):
    """A classifier of three classes."""
    return (task or classifier_task()).build_model(parse(arch, flags))


def pairs(batch=4, length=20):
    """B x T: ``<s> a </s> b </s>`` of different lengths, padded."""
    tokens = torch.full((batch, length), 1)
    for row, sentence in enumerate(tokens):
        end = length - 2 * row
        sentence[:end] = torch.randint(4, 4 + WORDS, (end,))
        sentence[0], sentence[end // 2], sentence[end - 1] = 0, 2, 2
    return tokens
