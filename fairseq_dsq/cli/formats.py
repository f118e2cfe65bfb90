"""Number formats side by side: bits per value, range, accuracy, and whether bfloat16 multiplies them exactly."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fairseq_dsq import formats
from fairseq_dsq.cli import blame
from fairseq_dsq.formats import Format, definition
from fairseq_dsq.gemm.native import MOST_TERMS
from fairseq_dsq.kernels.ops import terms
from fairseq_dsq.quantized import fake_quantize

ROWS, COLUMNS = 256, 4096
SEED = 0
# Of Student's t: few enough for heavy tails, with infinite kurtosis, and more than two, with a finite variance.
DEGREES = 3
# The bits of a float32.
_INFINITE = 0x7F800000
_LEAST = 2.0**-149
_EXACT = {1: "yes", 2: "as a sum of two", None: "no"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "formats", nargs="*", metavar="FORMAT",
        help="family, bits, /GROUP (values, row, tensor or a square) and -RULE, such as bfp6/32 or mxfp4-rceil; "
        "fairseq_dsq/formats/README.md has a table of all (default: some of every family)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    texts = args.formats or [text for texts in formats.examples().values() for text in texts]
    with blame("FORMAT"):
        chosen = [formats.parse(text) for text in texts]
    samples = _samples()
    rows = [_row(fmt, samples) for fmt in chosen]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"of a matrix of {ROWS} x {COLUMNS}, groups along its rows; SQNR of N(0, 1) and of Student's t with")
    print(f"{DEGREES} degrees of freedom, seed {SEED}, rounded to nearest\n")
    headers = ("format", "bits/value", "largest", "smallest > 0", "SQNR N dB", "SQNR t dB", "exact in bfloat16")
    cells = [[*list(row.values())[:-1], _EXACT[row["bfloat16_terms"]]] for row in rows]
    print(tabulate(cells, headers, floatfmt=("", ".3f", ".3g", ".3g", ".1f", ".1f", ""), missingval="-"))
    return 0


def _samples() -> tuple[Tensor, Tensor]:
    """Values of N(0, 1), and of Student's t: a normal number over the root of a mean of others' squares."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    squares = torch.randn(DEGREES, ROWS, COLUMNS, generator=generator).square_()
    return normal, torch.randn(ROWS, COLUMNS, generator=generator) / squares.mean(0).sqrt_()


def _row(fmt: Format, samples: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What the table says of a format; None for the SQNR of what is not rounded."""
    smallest, largest = _range(fmt)
    normal, heavy = (_sqnr(fmt, x if fmt.signed else x.abs()) for x in samples)
    return {
        "format": fmt.text,
        "bits_per_value": 8 * fmt.nbytes((ROWS, COLUMNS)) / (ROWS * COLUMNS),
        "largest": largest,
        "smallest": smallest,
        "sqnr_normal_db": normal,
        "sqnr_student_t_db": heavy,
        "bfloat16_terms": count if (count := terms(fmt.significand_bits)) <= MOST_TERMS else None,
    }


def _range(fmt: Format) -> tuple[float, float]:
    """The smallest positive value and the largest, under whichever scale.

    Steps are powers of two, or the scale is any float32. The largest is that of one value alone. The smallest is what a
    power of two becomes, or the least float32 beside another value of its group: of a few between powers of two, since
    a scale that is next to the least float32 is rounded itself.
    """
    powers = [(2.0**exponent,) for exponent in range(-149, 1)]
    pairs = [(quarters / 4 * 2.0**exponent, _LEAST) for exponent in range(-149, -124) for quarters in range(4, 8)]
    found = [value for values in powers + pairs for value in _rounded(values, fmt)]
    # What is rounded to Inf is larger than what is not: bisect the bits of float32.
    finite, infinite = 0, _INFINITE
    while infinite - finite > 1:
        middle = (finite + infinite) // 2
        finite, infinite = (middle, infinite) if math.isfinite(_of_bits(middle, fmt)) else (finite, middle)
    return min(value for value in found if value > 0), _of_bits(finite, fmt)


def _of_bits(bits: int, fmt: Format) -> float:
    """What the float32 of these bits becomes by itself."""
    return _rounded((float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)),), fmt)[0]


def _rounded(values: Sequence[float], fmt: Format) -> list[float]:
    return definition.fake_quantize(torch.tensor(values), fmt, 0, None, torch.float32).tolist()


def _sqnr(fmt: Format, x: Tensor) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow without a kernel
        error = (fake_quantize(x, fmt) - x).double().square().sum()
    return 10 * math.log10(x.double().square().sum() / error) if error else None
