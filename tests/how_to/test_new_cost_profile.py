"""How to add a cost profile: a file whose ``kind`` says how costs are counted, with the coefficients of each format."""

import json

import pytest

from fairseq_dsq.cli import main

PROFILE = """
kind: setting
name: adders
derivation: a MAC of a and b bits costs a*b/1024 fixed-point MACs of 32 bits; an element moves its q bits and 0.5 more
formats:
  bfp: {product: 1.0, overhead_bits: 0.5}
  "*": {product: 1.0} # any other format
"""


def test_a_new_cost_profile(tmp_path, capsys):
    path = tmp_path / "adders.yaml"
    path.write_text(PROFILE)
    assert main(["cost", "--profile", str(path), "--precision", "8,8,8,8", "--json"]) == 0
    priced = json.loads(capsys.readouterr().out)
    assert priced["arithmetic_relative"] == pytest.approx(8 * 8 / 1024)
    assert priced["dram_relative"] == pytest.approx(8.5 / 32)
