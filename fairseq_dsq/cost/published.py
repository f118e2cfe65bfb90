"""The numbers that the paper prints, and whether a profile reproduces them."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, cast

from omegaconf import OmegaConf

from fairseq_dsq import data_files
from fairseq_dsq.cost.profiles import CostProfile, total_cost
from fairseq_dsq.ledger import Gemm, LedgerKey
from fairseq_dsq.precision import PrecisionConfig

FOLDER, NAME = "published", "dsq"
FIXED16 = PrecisionConfig((16, 16, 16, 16), "fixed")
_GEMMS = (Gemm("output", 1, 1, 1), Gemm("grad_input", 1, 1, 1), Gemm("grad_weight", 1, 1, 1))


def printed(value: float, places: int, known_places: int = 9) -> str:
    """As the paper prints: rounded half up (0.125 becomes 0.13).

    Args:
        known_places: decimals to which the value is known; a sum of floats may miss 0.125 by its last bit.
    """
    known = Decimal(value).quantize(Decimal(1).scaleb(-known_places), ROUND_HALF_UP)
    return str(known.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))


@dataclass(frozen=True)
class Comparison:
    """One printed row beside a profile's.

    Attributes:
        where: the table, or the headline.
        method: the row's name, format and setting.
        arithmetic, dram: (printed, ours rounded alike).
        misfit: why the two differ, where that is known; empty where they should not.
    """

    where: str
    method: str
    arithmetic: tuple[str, str]
    dram: tuple[str, str]
    misfit: str = ""

    @property
    def equal(self) -> bool:
        """Both numbers come out as printed."""
        return self.arithmetic[0] == self.arithmetic[1] and self.dram[0] == self.dram[1]


def _relative(profile: CostProfile, precision: PrecisionConfig) -> tuple[float, float]:
    cost = total_cost(profile, [(LedgerKey(gemm, precision, True), 1) for gemm in _GEMMS], [])
    return cost.arithmetic_relative, cost.dram_relative


def _beside(text: str, value: float) -> tuple[str, str]:
    return text, printed(value, len(text.partition(".")[2]))


def _tables() -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_object(data_files.read(data_files.find(FOLDER, NAME))))


def compare(profile: CostProfile) -> list[Comparison]:
    """Every printed row beside what ``profile`` gives for one GEMM of each kind."""
    tables = _tables()
    rows = []
    fixed = _relative(profile, FIXED16)
    for row in (*tables["rows"], *tables["headline"]):
        headline = "table" not in row
        precision = PrecisionConfig(tuple(row["q"]), row["format"])
        arithmetic, dram = _relative(profile, precision)
        if headline:
            arithmetic, dram = fixed[0] / arithmetic, fixed[1] / dram
        where = "headline, times below fixed-point 16" if headline else f"Table {row['table']}"
        method = f"{row.get('method', 'DSQ (BFP)')} {precision}"
        rows.append(
            Comparison(
                where,
                method,
                _beside(row["arithmetic"], arithmetic),
                _beside(row["dram"], dram),
                row.get("misfit", ""),
            )
        )
    return rows


def roofline_table() -> dict[str, tuple[float, str]]:
    """Table 7: group: (per cent of latency, what bounds it)."""
    return {name: (row["share"], row["bound"]) for name, row in _tables()["roofline"].items()}
