"""The cost profiles against the numbers that the paper prints, and against shapes worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from fairseq_dsq import data_files
from fairseq_dsq.cost import Cost, load_profile, total_cost
from fairseq_dsq.cost.published import compare, printed
from fairseq_dsq.formats import BlockFloat, Float32, FormatOptions
from fairseq_dsq.ledger import Gemm, LedgerKey, Stash, StashKey, Update, Work
from fairseq_dsq.precision import PrecisionConfig

PAPER, OPERANDS = load_profile("paper"), load_profile("operands")
# One linear layer's three GEMMs.
LAYER = [
    Gemm("output", 64, 32, 16),
    Gemm("grad_input", 64, 16, 32),
    Gemm("grad_weight", 32, 64, 16),
]
STASH = Stash("input", (64, 32), 0)


def ran(*gemms, precision, training=True):
    return [(LedgerKey(gemm, precision, training), 1) for gemm in gemms]


def step_cost(format_name, q, training=True, profile=PAPER):
    """Arithmetic and DRAM of one step of a linear layer, relative to 32-bit fixed point."""
    precision = PrecisionConfig(tuple(q), format_name)
    cost = total_cost(profile, ran(*(LAYER if training else LAYER[:1]), precision=precision, training=training), [])
    return cost.arithmetic_relative, cost.dram_relative


# Profile paper


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
    assert tuple(printed(value, 2) for value in step_cost(format_name, q)) == (arithmetic, dram)


def test_the_published_tables_are_reproduced_but_for_the_known_misfits():
    rows = compare(PAPER)
    for row in rows:
        assert row.equal == (row.misfit == ""), row
    # Six static rows, the DSQ row and the headline; and what is known not to fit.
    assert sum(row.equal for row in rows) == 8
    assert len(rows) == 12
    headline = [row for row in rows if row.where.startswith("headline")]
    assert headline[0].arithmetic == ("20.95", "20.95") and headline[0].dram == ("2.55", "2.55")
    assert headline[1].arithmetic == ("20.95", "7.86") and headline[1].dram == ("2.55", "1.64")


def test_another_profile_does_not_reproduce_the_tables():
    assert not all(row.equal for row in compare(OPERANDS) if not row.misfit)


def test_printing_rounds_half_up():
    assert printed(0.125, 2) == "0.13"
    assert printed(0.1249999, 2) == "0.12"


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
    assert printed(fixed16[0] / here[0], len(arithmetic.split(".")[1])) == arithmetic
    assert printed(fixed16[1] / here[1], 2) == dram


def test_the_mac_formulas():
    fixed, bfp = map(PAPER.format_cost, ("fixed", "bfp"))
    assert fixed.mac(4, 16) == 64 / 1024
    assert bfp.mac(4, 16) == pytest.approx((0.395 * 64 + 5.32 * 8) / 1024)
    assert bfp.mac(4, 16) == bfp.mac(16, 4)


def test_each_gemm_is_charged_its_own_operands():
    # Four different q, so that no operand can stand in for another.
    precision = PrecisionConfig((2, 4, 8, 16), "fixed")
    bits = {"output": 2 * 2, "grad_input": 16 * 8, "grad_weight": 4 * 16}
    for profile in (PAPER, OPERANDS):
        for gemm in LAYER:
            cost = profile.gemm(gemm, precision, training=True)
            assert cost.arithmetic == gemm.macs * bits[gemm.kind] / 1024
            assert cost.arithmetic_baseline == gemm.macs


@pytest.mark.parametrize(("format_name", "overhead"), [("fixed", 0.0), ("bfp", 4.2745)])
def test_a_forward_pass_alone_is_charged_q0(format_name, overhead):
    precision = PrecisionConfig((2, 4, 8, 16), format_name)
    assert PAPER.dram_relative(precision, training=False) == pytest.approx((2 + overhead) / 32)
    assert PAPER.dram_relative(precision, training=True) == pytest.approx((30 / 4 + overhead) / 32)
    # What q1, q2 and q3 are makes no difference to validation.
    for profile in (PAPER, OPERANDS):
        sides = [step_cost(format_name, q, False, profile) for q in ([2, 4, 8, 16], [2] * 4)]
        assert sides[0] == sides[1]


def test_float32_is_charged_as_32_bit_fixed_point():
    assert step_cost("float32", [32] * 4) == step_cost("fixed", [32] * 4) == (1.0, 1.0)
    assert step_cost("float32", [32] * 4, profile=OPERANDS) == (1.0, 1.0)


def test_dram_is_charged_for_operands_and_result():
    gemm = Gemm("output", 2, 3, 5, batch=7)
    cost = PAPER.gemm(gemm, PrecisionConfig((16, 16, 16, 16), "fixed"), training=True)
    assert cost.dram_baseline_bytes == 4 * 7 * (2 * 3 + 3 * 5 + 2 * 5)
    assert cost.dram_bytes == cost.dram_baseline_bytes / 2
    assert cost.arithmetic_baseline == 7 * 2 * 3 * 5
    assert cost.arithmetic == cost.arithmetic_baseline / 4


def test_the_setting_pays_for_stashes_not_the_stash():
    assert PAPER.stash(STASH, PrecisionConfig((2, 2, 2, 16))) == Cost()


# Profile operands


def boxes(count, length, bits):
    """By hand: ``count`` fibres of ``length`` values in boxes of 16, each an exponent and its codes."""
    full, rest = divmod(length, 16)
    return count * (full * (1 + 2 * bits) + (1 + -(-rest * bits // 8) if rest else 0))


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("m", "k", "n"), [(64, 32, 16), (37, 21, 18)])
def test_operands_are_read_and_results_written_once_at_their_own_width(m, k, n, batch):
    precision = PrecisionConfig((2, 3, 5, 11))
    q0, q1, q2, q3 = precision.q

    def dram(kind, *shape):
        return OPERANDS.gemm(Gemm(kind, *shape, batch), precision, training=True).dram_bytes

    rows, columns = batch * m, batch * n
    # input and weight boxed along K, the result along N
    assert dram("output", m, k, n) == boxes(rows, k, q0) + boxes(columns, k, q0) + boxes(rows, n, q0)
    # grad_output and weight boxed along N, the result along K
    assert dram("grad_input", m, n, k) == boxes(rows, n, q3) + boxes(batch * k, n, q2) + boxes(rows, k, q3)
    # stash and grad_output boxed along M, the result in float32
    assert dram("grad_weight", k, m, n) == boxes(batch * k, m, q1) + boxes(columns, m, q3) + 4 * batch * k * n


def test_the_stash_is_written_once_at_q1_and_what_plays_the_weight_at_q2():
    precision = PrecisionConfig((2, 3, 5, 11))
    for role, bits in (("input", 3), ("weight", 5)):
        cost = OPERANDS.stash(Stash(role, (7, 37, 21), 1), precision)
        assert cost.dram_bytes == boxes(7 * 21, 37, bits) == BlockFloat(bits).nbytes((7, 37, 21), 1)
        assert cost.dram_baseline_bytes == 4 * 7 * 37 * 21
        assert cost.arithmetic == cost.arithmetic_baseline == 0


def test_operands_charges_stored_bits():
    # The sign comes on top of q = 2: three bits are stored, and multiplied.
    precision = PrecisionConfig((2, 2, 2, 2), "bfp", FormatOptions(sign_bit_extra=True))
    gemm = Gemm("output", 64, 32, 16)
    cost = OPERANDS.gemm(gemm, precision, training=True)
    assert cost.arithmetic_relative == 9 / 1024
    assert cost.dram_bytes == boxes(64, 32, 3) + boxes(16, 32, 3) + boxes(64, 16, 3)


def test_floats_are_charged_four_bytes():
    gemm = Gemm("grad_weight", 2, 3, 5, batch=7)
    cost = OPERANDS.gemm(gemm, PrecisionConfig((32,) * 4, "float32"), training=True)
    assert cost.dram_bytes == cost.dram_baseline_bytes == Float32().nbytes((7, 31))


def test_an_update_reads_all_and_writes_weights_and_states():
    # Ternary codes, float gradients, a byte of each moment; over 4+4, 4 and 8+8 bytes.
    update = Update(values=1000, weight_bytes=250, gradient_bytes=4000, state_bytes=2000)
    cost = OPERANDS.update(update)
    assert cost.dram_bytes == 250 + 250 + 4000 + 2000 + 2000
    assert cost.dram_baseline_bytes == 1000 * (4 + 4 + 4 + 8 + 8)
    assert cost.arithmetic == cost.arithmetic_baseline == 0
    assert OPERANDS.update(update.in_float32).dram_relative == 1
    assert PAPER.update(update) == Cost() and OPERANDS.prices_updates and not PAPER.prices_updates
    assert total_cost(OPERANDS, [], [], [(update, 0.5)]) == cost * 0.5


# Sums


def test_costs_add_up():
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)
    assert Cost(1, 2, 3, 4) * 3 == Cost(3, 6, 9, 12)
    assert Cost() + Cost(1, 2, 3, 4) == Cost(1, 2, 3, 4)
    assert Cost().arithmetic_relative != Cost().arithmetic_relative  # NaN: nothing ran


@pytest.mark.parametrize("profile", [PAPER, OPERANDS], ids=["paper", "operands"])
def test_the_total_is_the_sum_over_what_ran_times_its_counts(profile):
    low, high = (PrecisionConfig(q, "fixed") for q in ((2, 2, 2, 16), (16, 4, 4, 16)))
    gemms = {
        LedgerKey(LAYER[0], low, True, "a"): 3, LedgerKey(LAYER[1], high, True, "a"): 2,
        LedgerKey(LAYER[0], low, False): 1,
    }  # fmt: skip
    stashes = {StashKey(STASH, low, "a"): 3, StashKey(STASH, high): 1}
    expected = Cost()
    for (gemm, precision, training, *_), count in gemms.items():
        for _ in range(count):
            expected = expected + profile.gemm(gemm, precision, training)
    for (stash, precision, _), count in stashes.items():
        for _ in range(count):
            expected = expected + profile.stash(stash, precision)
    assert total_cost(profile, gemms.items(), stashes.items()) == expected
    assert total_cost(profile, [], []) == Cost()


@pytest.mark.parametrize("profile", [PAPER, OPERANDS], ids=["paper", "operands"])
def test_what_is_repeated_costs_and_the_baseline_does_without(profile):
    level = PrecisionConfig((2, 2, 2, 16))
    first, again = LedgerKey(LAYER[0], level, False), LedgerKey(LAYER[0], level, True, repeated=True)
    stash = Stash("first operand", (64, 32), 1)
    cost = total_cost(profile, [(first, 1), (again, 1)], [(StashKey(stash, level), 1)])
    arithmetic, dram = (profile.gemm(LAYER[0], level, training) for training in (False, True))
    packed = profile.stash(stash, level).dram_bytes
    assert cost.arithmetic == 2 * arithmetic.arithmetic
    assert cost.dram_bytes == arithmetic.dram_bytes + dram.dram_bytes + packed
    assert (cost.arithmetic_baseline, cost.dram_baseline_bytes) == (64 * 32 * 16, 4 * LAYER[0].elements)
    made_again = profile.stash(Stash("recomputed", (64, 32), 1), level)
    assert made_again == replace(profile.stash(Stash("input", (64, 32), 1), level), dram_bytes=0.0)


def test_without_repeats_an_input_that_is_made_again_is_kept():
    level = PrecisionConfig((2, 2, 2, 16))
    stashes = {role: StashKey(Stash(role, (64, 32), 1), level) for role in ("input", "recomputed", "first operand")}
    work = Work(stashes=Counter(dict.fromkeys(stashes.values(), 2)))
    assert work.once().stashes == {stashes["input"]: 4}


# Files


def test_both_profiles_say_where_they_come_from_and_where_they_do_not_fit():
    assert data_files.names("cost") == ["operands", "paper"]
    for profile in (PAPER, OPERANDS):
        assert len(profile.derivation) > 200 and len(profile.misfits) >= 3


def test_a_profile_of_one_s_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "kind: setting\nname: mine\nderivation: guessed\n"
        "formats: {bfp: {product: 2, overhead_bits: 1}, '*': {product: 1}}\n"
    )
    profile = load_profile(str(path))
    assert profile.name == "mine" and profile.misfits == []
    assert profile.gemm(LAYER[0], PrecisionConfig((4,) * 4), True).arithmetic_relative == 2 * 16 / 1024
    assert profile.dram_relative(PrecisionConfig((4,) * 4), True) == 5 / 32
    # A format without an entry takes the one of "*".
    assert profile.gemm(LAYER[0], PrecisionConfig((4,) * 4, "fixed"), True).arithmetic_relative == 16 / 1024


VALID = {"kind": "setting", "name": "x", "derivation": "y", "formats": "{'*': {product: 1}}"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "kind: got 'other', expected one of setting, operands"),
        ({"kind": None}, "kind: got None, expected"),
        ({"name": None}, "name: missing"),
        ({"extra": "1"}, "Key 'extra' not in"),
        ({"formats": "{bfp: {product: 1}}"}, "expected one of them to be '\\*'"),
        ({"formats": "{'*': {product: many}}"}, "formats.*product: Value 'many' of type 'str'"),
        ({"formats": "{'*': {product: -1}}"}, "product: got -1.0, expected a finite number >= 0"),
        ({"formats": "{'*': {root: .nan}}"}, "root: got nan, expected"),
        ({"formats": "{'*': 3}"}, "int is not a subclass of FormatCost"),
        ({"formats": "{"}, "not YAML"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, changes, message):
    path = tmp_path / "bad.yaml"
    entries = {key: value for key, value in (VALID | changes).items() if value is not None}
    path.write_text("".join(f"{key}: {value}\n" for key, value in entries.items()))
    with pytest.raises(ValueError, match=message) as error:
        load_profile(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"got 'nix', expected operands, paper or the path of a \.yaml file"):
        load_profile("nix")
