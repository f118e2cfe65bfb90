"""What a configuration refuses: a misspelt choice would act as another one."""

import pytest
from nn.common import normal

from fairseq_dsq.formats import FormatOptions, parse
from fairseq_dsq.nn import FLOAT32, CodedWeight, DSQContext, GemmConfig
from fairseq_dsq.precision import PrecisionConfig

LEVEL = PrecisionConfig((4, 4, 4, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GemmConfig((2, 2, 2, 16)), r"precision: got \(2, 2, 2, 16\), expected such as PrecisionConfig"),
        (lambda: GemmConfig(LEVEL, rounding="neares"), "rounding: got 'neares', expected one of nearest, stochastic"),
        (lambda: GemmConfig(LEVEL, box_dim="foo"), "box_dim: got 'foo', expected one of reduction, last"),
        (lambda: GemmConfig(LEVEL, gemm="nonsense"), "gemm: got 'nonsense', expected one of auto, .*, float32"),
        (lambda: GemmConfig(LEVEL, value_boxes="x"), "value_boxes: got 'x', expected one of row, feature"),
        (lambda: GemmConfig(LEVEL, coded="no"), "coded: got 'no', expected one of False, True"),
        (lambda: GemmConfig(LEVEL, rotation="backward/16"), "rotation: got 'backward/16', expected such as Rotation"),
        (lambda: DSQContext(LEVEL), r"config: got PrecisionConfig\(.*, expected such as GemmConfig\(precision\)"),
        (lambda: DSQContext(GemmConfig(LEVEL), "off"), "attention_matmul: got 'off', expected one of False, True"),
        (
            lambda: DSQContext(GemmConfig(LEVEL), stash_scope="everything"),
            "stash_scope: got .*, expected one of gemm, all",
        ),
        (lambda: FormatOptions(scale="Fit"), "scale: got 'Fit', expected one of floor, fit"),
        (lambda: FormatOptions(fixed_scale="rows"), "fixed_scale: got 'rows', expected one of dynamic, row, static"),
        (lambda: FormatOptions("counted"), "sign_bit_extra: got 'counted', expected one of False, True"),
        (lambda: CodedWeight.of(normal(2, 3), parse("int8/row"), "max"), "rule: got 'max', expected one of own, abs"),
    ],
)
def test_a_choice_that_is_none_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make()


def test_what_is_no_level_is_not_put_in_force():
    context = DSQContext(GemmConfig(LEVEL))
    other = context.ruled((FLOAT32,))
    with pytest.raises(TypeError, match=r"precision: got '\[2,2,2,16\]', expected such as PrecisionConfig"):
        context.set_precision("[2,2,2,16]", 1)
    assert (context.config.precision, context.level, other.config.precision) == (LEVEL, 0, FLOAT32)


def test_a_configuration_for_evaluation_is_made_once():
    """With what was planned for it."""
    context = DSQContext(GemmConfig(LEVEL, "stochastic"))
    assert context.for_mode(False) is context.for_mode(False) and context.for_mode(False) == GemmConfig(LEVEL)
    assert context.for_mode(True) is context.config
