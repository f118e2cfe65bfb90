"""What a step's GEMMs, stashes and update cost at a level, over a trajectory of levels, by layer and by GEMM.

Rows are dictionaries of plain numbers: as a notebook tabulates them and ``fairseq-dsq cost --json`` prints them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from fairseq_dsq.cost.gemm import stash_bytes
from fairseq_dsq.cost.hardware import Hardware
from fairseq_dsq.cost.profiles import Cost, CostProfile, total_cost
from fairseq_dsq.cost.published import FIXED16
from fairseq_dsq.cost.roofline import Group, groups_of_step
from fairseq_dsq.ledger import Gemm, LedgerKey, Stash, StashKey, Work
from fairseq_dsq.precision import FLOAT32, GemmKind, PrecisionConfig

STANDARD_BITS, STASHING = 16, (16, 4, 4, 16)


def layer_work(m: int, k: int, n: int, training: bool = True) -> Work:
    """What a linear layer of M rows, K inputs and N outputs runs: all three GEMMs and its stash, or the forward's."""
    kinds: tuple[GemmKind, ...] = ("output", "grad_input", "grad_weight")
    gemms = [Gemm.of_product(kind, m, k, n) for kind in (kinds if training else kinds[:1])]
    stashes: Counter[StashKey] = Counter()
    if training:
        stashes[StashKey(Stash("input", (m, k), 0), FLOAT32)] = 1
    return Work(Counter(LedgerKey(gemm, FLOAT32, training) for gemm in gemms), stashes)


def price(profile: CostProfile, work: Work) -> Cost:
    """The cost of what ran, at the precision it ran at."""
    return total_cost(profile, work.gemms.items(), work.stashes.items(), work.updates.items())


def price_level(profile: CostProfile, work: Work, precision: PrecisionConfig, details: bool = False) -> dict[str, Any]:
    """A step at one level: relative to 32- and 16-bit fixed point, and absolute.

    Args:
        work: of the step, at that level.
        details: also by layer and by GEMM.
    """
    cost = price(profile, work)
    row = {"precision": list(precision.q), **_relative(cost), **_below_fixed16(profile, work, cost)}
    row |= _absolute(work, cost)
    if profile.prices_updates and work.updates:
        row["update_dram_bytes"] = _update_cost(profile, work).dram_bytes
    return row | ({"layers": by_layer(profile, work), "gemms": by_gemm(profile, work)} if details else {})


def price_trajectory(profile: CostProfile, steps: Sequence[tuple[Work, PrecisionConfig, int]]) -> dict[str, Any]:
    """Steps, each (its work, its level, epochs), and the mean over all epochs."""
    costs = [price(profile, work) for work, _, _ in steps]
    epochs = sum(count for _, _, count in steps)
    total = sum((cost * count for cost, (_, _, count) in zip(costs, steps, strict=True)), Cost())
    rows = [
        {"precision": list(precision.q), "epochs": count, **_relative(cost)}
        for cost, (_, precision, count) in zip(costs, steps, strict=True)
    ]
    below = _below_fixed16(profile, steps[0][0], total * (1 / epochs))
    return {"trajectory": rows, "epochs": epochs, **_relative(total), **below}


Step = tuple[str, PrecisionConfig, list[Group]]  # the setting's name, its precision, what its operators take


def price_settings(
    work: Work,
    elements: tuple[int, int],
    levels: Sequence[PrecisionConfig],
    format_name: str,
    hardware: Hardware,
    float_bits: int,
) -> list[Step]:
    """The Roofline's groups of a step without quantization, with standard and stashing quantization, at each level.

    Args:
        elements: moved by the operators other than GEMMs, within attention and elsewhere.
        float_bits: of a float outside of GEMMs and without quantization.
    """
    settings = [
        # Floats of a width move and multiply as fixed-point numbers of that width do.
        ("not quantized", PrecisionConfig((float_bits,) * 4, "fixed"), False),
        ("standard quantization", PrecisionConfig((STANDARD_BITS,) * 4, format_name), True),
        ("stashing", PrecisionConfig(STASHING, format_name), True),
        *((f"DSQ level {number}", level, True) for number, level in enumerate(levels)),
    ]
    gemms, stashes = work.gemms.items(), work.stashes.items()
    return [
        (name, level, groups_of_step(gemms, stashes, elements, level, hardware, float_bits, quantized))
        for name, level, quantized in settings
    ]


def by_layer(profile: CostProfile, work: Work) -> list[dict[str, Any]]:
    """One row per module, in the order in which they first ran, and one of the update where it is priced."""
    parts: defaultdict[str, Work] = defaultdict(Work)
    for key, count in work.gemms.items():
        parts[key.scope].gemms[key] += count
    for stash, count in work.stashes.items():
        parts[stash.scope].stashes[stash] += count
    if profile.prices_updates and work.updates:
        parts["(update)"].updates.update(work.updates)
    return [{"layer": scope, **_absolute(part, price(profile, part))} for scope, part in parts.items()]


def by_gemm(profile: CostProfile, work: Work) -> list[dict[str, Any]]:
    """One row per kind and shape, the most MACs first; writing stashes belongs to none of them."""
    counts: Counter[LedgerKey] = Counter()
    for key, count in work.gemms.items():
        counts[key._replace(scope="", repeated=False)] += count
    rows = []
    for (gemm, precision, training, *_), count in counts.items():
        cost = profile.gemm(gemm, precision, training) * count
        rows.append(
            {
                "kind": gemm.kind, "m": gemm.m, "k": gemm.k, "n": gemm.n, "batch": gemm.batch, "times": count,
                "macs": gemm.macs * count, "arithmetic": cost.arithmetic, "dram_bytes": cost.dram_bytes,
                "macs_per_byte": cost.arithmetic_baseline / cost.dram_bytes,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: -int(row["macs"]))


def _relative(cost: Cost) -> dict[str, float]:
    return {"arithmetic_relative": cost.arithmetic_relative, "dram_relative": cost.dram_relative}


def _below_fixed16(profile: CostProfile, work: Work, cost: Cost) -> dict[str, float]:
    fixed16 = work.once().at_precision(FIXED16)
    # Its weights and states are float32.
    updates = [(update.in_float32, count) for update, count in work.updates.items()]
    fixed = total_cost(profile, fixed16.gemms.items(), fixed16.stashes.items(), updates)
    return {
        "arithmetic_below_fixed16": fixed.arithmetic / cost.arithmetic,
        "dram_below_fixed16": fixed.dram_bytes / cost.dram_bytes,
    }


def _update_cost(profile: CostProfile, work: Work) -> Cost:
    return total_cost(profile, [], [], work.updates.items())


def _absolute(work: Work, cost: Cost) -> dict[str, float]:
    stash = sum(stash_bytes(key.stash, key.precision) * count for key, count in work.stashes.items())
    macs = sum(key.gemm.macs * count for key, count in work.gemms.items())
    return {
        "macs": macs,
        "arithmetic": cost.arithmetic,
        "dram_bytes": cost.dram_bytes,
        "stash_bytes": stash,
        "macs_per_byte": macs / cost.dram_bytes,
    }
