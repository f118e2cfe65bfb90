"""The cost profile against the numbers that the paper prints."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest

from fairseq_dsq.cost.profiles import Cost, PaperProfile, total_cost
from fairseq_dsq.precision import Gemm, PrecisionConfig

PROFILE = PaperProfile()
# One linear layer's three GEMMs.
LAYER = [
    Gemm("output", 64, 32, 16),
    Gemm("grad_input", 64, 16, 32),
    Gemm("grad_weight", 32, 64, 16),
]


def step_cost(format_name, q, training=True):
    """Arithmetic and DRAM of one step of a linear layer, relative to 32-bit fixed point."""
    precision = PrecisionConfig(tuple(q), format_name)
    gemms = LAYER if training else LAYER[:1]
    cost = total_cost(PROFILE, [((gemm, precision, training), 1) for gemm in gemms])
    return (
        cost.arithmetic / cost.arithmetic_baseline,
        cost.dram_bytes / cost.dram_baseline_bytes,
    )


def printed(value, places=2):
    """As the paper prints: round half up."""
    # Nine decimals first: a sum of floats may miss 0.125 by its last bit.
    exact = Decimal(value).quantize(Decimal("1e-9"))
    return str(exact.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))


@pytest.mark.parametrize(
    ("format_name", "q", "arithmetic", "dram"),
    [
        ("fixed", [32, 32, 32, 32], "1.00", "1.00"),
        ("fixed", [16, 16, 16, 16], "0.25", "0.50"),
        ("bfp", [32, 32, 32, 32], "0.56", "1.13"),
        ("bfp", [16, 16, 16, 16], "0.18", "0.63"),
        ("fixed", [16, 4, 4, 16], "0.13", "0.31"),
        ("bfp", [16, 4, 4, 16], "0.10", "0.45"),
    ],
)
def test_every_static_row_of_tables_1_and_6_as_printed(format_name, q, arithmetic, dram):
    assert tuple(printed(value) for value in step_cost(format_name, q)) == (arithmetic, dram)


def test_printing_rounds_half_up():
    assert printed(0.125) == "0.13"
    assert printed(0.1249999) == "0.12"


@pytest.mark.parametrize(
    ("q", "arithmetic", "dram"),
    [
        ([2, 2, 2, 2], "20.95", "2.55"),  # the headline
        ([2, 2, 2, 16], "7.9", "1.64"),  # the level that the paper's text starts at
    ],
)
def test_times_below_16_bit_fixed_point(q, arithmetic, dram):
    fixed16 = step_cost("fixed", [16, 16, 16, 16])
    here = step_cost("bfp", q)
    assert printed(fixed16[0] / here[0], places=len(arithmetic.split(".")[1])) == arithmetic
    assert printed(fixed16[1] / here[1]) == dram


def test_the_headlines_relative_costs():
    arithmetic, dram = step_cost("bfp", [2, 2, 2, 2])
    assert printed(arithmetic, 3) == "0.012"
    assert printed(dram, 3) == "0.196"


def test_the_mac_formulas():
    assert PROFILE.mac("fixed", 4, 16) == 64 / 1024
    assert PROFILE.mac("bfp", 4, 16) == pytest.approx((0.395 * 64 + 5.32 * 8) / 1024)
    assert PROFILE.mac("bfp", 4, 16) == PROFILE.mac("bfp", 16, 4)
    assert PROFILE.mac("float32", 32, 32) == 1.0


def test_each_gemm_is_charged_its_own_operands():
    # Four different q, so that no operand can stand in for another.
    precision = PrecisionConfig((2, 4, 8, 16), "fixed")
    bits = {"output": 2 * 2, "grad_input": 16 * 8, "grad_weight": 4 * 16}
    for gemm in LAYER:
        cost = PROFILE.cost(gemm, precision, training=True)
        assert cost.arithmetic == gemm.macs * bits[gemm.kind] / 1024
        assert cost.arithmetic_baseline == gemm.macs


def test_the_coefficients_are_the_profiles():
    profile = PaperProfile(bfp_product=1.0, bfp_root=0.0, bfp_overhead_bits=0.0)
    precision = PrecisionConfig((4, 4, 4, 4), "bfp")
    assert profile.mac("bfp", 4, 4) == profile.mac("fixed", 4, 4)
    assert profile.dram_relative(precision, training=True) == 4 / 32


@pytest.mark.parametrize(("format_name", "overhead"), [("fixed", 0.0), ("bfp", 4.2745)])
def test_a_forward_pass_alone_is_charged_q0(format_name, overhead):
    precision = PrecisionConfig((2, 4, 8, 16), format_name)
    alone = PROFILE.dram_relative(precision, training=False)
    assert alone == pytest.approx((2 + overhead) / 32)
    training = PROFILE.dram_relative(precision, training=True)
    assert training == pytest.approx((30 / 4 + overhead) / 32)
    # What q1, q2 and q3 are makes no difference to validation.
    assert step_cost(format_name, [2, 4, 8, 16], False) == step_cost(format_name, [2] * 4, False)


def test_float32_is_charged_as_32_bit_fixed_point():
    assert step_cost("float32", [32] * 4) == step_cost("fixed", [32] * 4) == (1.0, 1.0)


def test_dram_is_charged_for_operands_and_result():
    gemm = Gemm("output", 2, 3, 5, batch=7)
    cost = PROFILE.cost(gemm, PrecisionConfig((16, 16, 16, 16), "fixed"), training=True)
    assert cost.dram_baseline_bytes == 4 * 7 * (2 * 3 + 3 * 5 + 2 * 5)
    assert cost.dram_bytes == cost.dram_baseline_bytes / 2
    assert cost.arithmetic_baseline == 7 * 2 * 3 * 5
    assert cost.arithmetic == cost.arithmetic_baseline / 4


def test_costs_add_up():
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)
    assert Cost(1, 2, 3, 4) * 3 == Cost(3, 6, 9, 12)
    assert Cost() + Cost(1, 2, 3, 4) == Cost(1, 2, 3, 4)


def test_the_total_is_the_sum_over_gemms_times_their_counts():
    low = PrecisionConfig((2, 2, 2, 16), "fixed")
    high = PrecisionConfig((16, 4, 4, 16), "fixed")
    gemms = [((LAYER[0], low, True), 3), ((LAYER[1], high, True), 2), ((LAYER[0], low, False), 1)]
    expected = Cost()
    for (gemm, precision, training), count in gemms:
        for _ in range(count):
            expected = expected + PROFILE.cost(gemm, precision, training)
    assert total_cost(PROFILE, gemms) == expected
    assert total_cost(PROFILE, []) == Cost()
