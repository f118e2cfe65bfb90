"""The twins of fairseq's models: names and shapes of their architectures, and models that build as they like."""

import argparse

import pytest
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_INV_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY

from fairseq_dsq.errors import DSQError
from fairseq_dsq.models import TWINS
from fairseq_dsq.plugin.config import DSQEncoderConfig, defaults
from fairseq_dsq.plugin.twins import dsq_twin, twin_arch

ARCHITECTURES = [(model, arch) for model in TWINS for arch in ARCH_MODEL_INV_REGISTRY[model]]


@pytest.mark.parametrize(("model", "arch"), ARCHITECTURES)
def test_an_architecture_s_twin_has_its_shape(model, arch):
    own, twin = argparse.Namespace(), argparse.Namespace()
    ARCH_CONFIG_REGISTRY[arch](own)
    ARCH_CONFIG_REGISTRY[twin_arch(model, arch)](twin)
    more = vars(twin).keys() - vars(own).keys()
    assert {name: value for name, value in vars(twin).items() if name not in more} == vars(own)
    assert "dsq_levels" in more and more <= set(defaults(DSQEncoderConfig))
    assert ARCH_MODEL_REGISTRY[twin_arch(model, arch)] is TWINS[model]


def test_a_twin_is_its_model():
    for name, twin in TWINS.items():
        assert issubclass(twin, MODEL_REGISTRY[name])
        assert MODEL_REGISTRY[f"{name}_dsq"] is twin


@pytest.mark.parametrize(
    ("model", "arch", "expected"),
    [
        ("transformer", "transformer", "transformer_dsq"),
        ("transformer", "transformer_iwslt_de_en", "transformer_dsq_iwslt_de_en"),
        ("roberta", "roberta_large", "roberta_dsq_large"),
        ("bart", "mbart_large", "mbart_large_dsq"),
        ("bart", "barthez", "barthez_dsq"),
    ],
)
def test_an_architecture_s_name(model, arch, expected):
    assert twin_arch(model, arch) == expected


def test_a_model_that_fairseq_does_not_know_has_no_twin():
    with pytest.raises(DSQError, match="got 'transfomer', expected a model that fairseq has registered"):
        dsq_twin("transfomer")
