"""fairseq-dsq formats."""

from __future__ import annotations

import json

import pytest
import torch

from fairseq_dsq import formats
from fairseq_dsq.cli import main
from fairseq_dsq.formats import definition


def rows(capsys, *texts):
    assert main(["formats", "--json", *texts]) == 0
    return {row["format"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_registered_family_has_a_row(capsys):
    found = rows(capsys)
    assert set(found) == {text for texts in formats.examples().values() for text in texts}
    assert {formats.parse(text).family for text in found} >= set(formats.names())
    for text, row in found.items():
        assert 0 < row["smallest"] < row["largest"] < float("inf"), text
        assert (row["sqnr_normal_db"] is None) == (row["sqnr_student_t_db"] is None) == (text == "float32")


def test_numbers_that_the_standards_print(capsys):
    found = rows(capsys, "mxfp4", "mxfp8e4m3", "nvfp4", "fp16", "bf16", "e4m3", "e5m2", "fixed8.4", "bfp4")
    assert [found[text]["bits_per_value"] for text in ("mxfp4", "mxfp8e4m3", "bfp4", "e5m2")] == [4.25, 8.25, 4.5, 8]
    assert found["nvfp4"]["bits_per_value"] == 4.5 + 32 / (256 * 4096)
    assert (found["fp16"]["largest"], found["fp16"]["smallest"]) == (65504, 2**-24)
    assert (found["bf16"]["largest"], found["bf16"]["smallest"]) == ((2 - 2**-7) * 2.0**127, 2**-133)
    assert (found["e4m3"]["largest"], found["e4m3"]["smallest"]) == (448, 2**-9)
    assert (found["e5m2"]["largest"], found["e5m2"]["smallest"]) == (57344, 2**-16)
    assert (found["fixed8.4"]["largest"], found["fixed8.4"]["smallest"]) == (127 / 16, 1 / 16)
    assert (found["mxfp4"]["largest"], found["mxfp4"]["smallest"]) == (1.5 * 2.0**127, 2.0**-128)
    assert [found[text]["bfloat16_terms"] for text in ("mxfp4", "nvfp4", "bf16", "fp16")] == [1, 1, 1, 2]


def test_under_a_float_scale_the_smallest_value_is_the_least_float32(capsys):
    texts = ("int8/row", "int4/row", "fp8e4m3/row")
    found = rows(capsys, *texts)
    assert [found[text]["smallest"] for text in texts] == [2.0**-149] * 3
    # A largest magnitude of 180 steps, whose scale of 180 / 127 steps is rounded to one.
    row = torch.tensor([180.0, 1.0]) * 2.0**-149
    assert definition.fake_quantize(row, formats.parse("int8/row"), 0, None, torch.float32)[1] == 2.0**-149


def test_signal_to_noise_of_a_known_format(capsys):
    # A step of a: the error is a^2 / 12.
    found = rows(capsys, "fixed16.10")["fixed16.10"]
    assert found["sqnr_normal_db"] == pytest.approx(10.79 + 60.206, abs=0.05)


def test_a_table_says_the_distributions(capsys):
    assert main(["formats", "mxfp4/16-rceil", "int8/32"]) == 0
    printed = capsys.readouterr().out
    assert "Student's t" in printed and "seed 0" in printed
    lines = printed.splitlines()
    assert lines[-2].split()[:2] == ["mxfp4/16-rceil", "4.500"] and lines[-2].endswith("yes")
    assert lines[-1].split()[:2] == ["int8/32", "9.000"] and lines[-1].endswith("no")


def test_a_text_that_names_no_format_is_refused(capsys):
    assert main(["formats", "mxfp4", "mxfp9"]) == 2
    assert "fairseq-dsq formats: error: FORMAT: format: got 'mxfp9', expected such as bfp4" in capsys.readouterr().err
