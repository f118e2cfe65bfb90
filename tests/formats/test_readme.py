"""The table of this room's README, against the formats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fairseq_dsq import formats
from fairseq_dsq.formats import FLOAT32_SCALE, FixedPoint
from fairseq_dsq.gemm.base import Side
from fairseq_dsq.gemm.native import MOST_TERMS
from fairseq_dsq.kernels import triton_kernels
from fairseq_dsq.kernels.ops import terms
from fairseq_dsq.quantized import fake_quantize

TEXT = (Path(formats.__file__).parent / "README.md").read_text(encoding="utf-8")
TABLE = TEXT[TEXT.index("| family |") :].split("\n\n")[0].splitlines()
COLUMNS, _, *ROWS = ([cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE)
TEXTS = [
    (text, dict(zip(COLUMNS, row, strict=True))) for row in ROWS for text in re.findall("`([^`]+)`", row[1])
]  # fmt: skip


def test_every_example_has_a_row():
    found = [text for text, _ in TEXTS]
    assert set(found) >= {text for texts in formats.examples().values() for text in texts}
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("text", "row"), TEXTS, ids=[text for text, _ in TEXTS])
def test_a_row_says_what_its_formats_are(text, row):
    fmt = formats.parse(text)
    assert fmt.text == text
    assert row["its bytes"] == ", ".join(map(str, [fmt.scale_bytes, fmt.tensor_bytes][: 1 + bool(fmt.tensor_bytes)]))
    cpp = fmt.row_kernel or (fmt.spec is not None and fmt.spec.scale != FLOAT32_SCALE)
    triton = fmt.spec is not None and triton_kernels.covers(fmt.spec)
    assert ("C++" in row["CPU"], "Triton" in row["GPU"]) == (bool(cpp), triton)
    side = Side(fmt, along=True)
    exact = fmt.signed and terms(side.significand_bits) <= MOST_TERMS
    integers = fmt.integer_elements and (side.factored or (isinstance(fmt, FixedPoint) and fmt.group == "tensor"))
    assert [f"`{name}`" in row["engine"] for name in ("int8", "native", "float32")] == [
        integers, exact, fmt.signed and not exact,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["bfp4", "mxfp8e4m3", "int8/row", "fp8e4m3/tensor", "ternary", "nvfp4"])
def test_a_group_that_holds_infinity_is_nan_as_the_rows_say(text):
    x = torch.ones(2, 64)
    x[0, 0] = torch.inf
    fmt = formats.parse(text)
    values = {"row": 64, "tensor": 128}.get(fmt.group, fmt.group)
    assert int(fake_quantize(x, fmt).isnan().sum()) == values
