"""How to add a cost profile: a file whose ``kind`` says how costs are counted, with the coefficients of each format.

Costs are relative to the baseline's, 32-bit fixed point: the unit of arithmetic is one of its MACs, that of DRAM
traffic a byte. What the kinds that there are cannot say, such as an energy, is a kind of one's own: a class in a
--user-dir, whose fields are keys of the file. It charges the baseline in its unit too.
"""

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

ENERGY = '''
"""All energy, on the chip and of DRAM, in place of arithmetic: picojoules of a MAC of 32-bit fixed point and a byte."""

from dataclasses import dataclass, replace

from fairseq_dsq.cost import register
from fairseq_dsq.cost.profiles import OperandProfile


@dataclass(frozen=True)
class Energy(OperandProfile):
    mac_pj: float = 3.2
    byte_pj: float = 160.0

    def _energy(self, cost):
        return replace(
            cost,
            arithmetic=cost.arithmetic * self.mac_pj + cost.dram_bytes * self.byte_pj,
            arithmetic_baseline=cost.arithmetic_baseline * self.mac_pj + cost.dram_baseline_bytes * self.byte_pj,
        )

    def gemm(self, gemm, precision, training):
        return self._energy(super().gemm(gemm, precision, training))

    def stash(self, stash, precision):
        return self._energy(super().stash(stash, precision))

    def update(self, update):
        return self._energy(super().update(update))


register("energy", Energy)
'''
OF_ENERGY = """
kind: energy
name: energy
derivation: "Horowitz, ISSCC 2014: a 32-bit multiplication and addition, and 32 bits of DRAM, in 45 nm"
formats: {"*": {product: 1.0}}
byte_pj: 200
"""


def priced(capsys, *argv):
    assert main(["cost", *map(str, argv), "--precision", "8,8,8,8", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_new_cost_profile(tmp_path, capsys):
    path = tmp_path / "adders.yaml"
    path.write_text(PROFILE)
    found = priced(capsys, "--profile", path)
    assert found["arithmetic_relative"] == pytest.approx(8 * 8 / 1024)
    assert found["dram_relative"] == pytest.approx(8.5 / 32)


def test_a_new_kind_of_cost_profile(tmp_path, capsys):
    user_dir = tmp_path / "energy_dsq"
    user_dir.mkdir()
    (user_dir / "__init__.py").write_text("import fairseq_dsq\nfrom energy_dsq import energy\n")
    (user_dir / "energy.py").write_text(ENERGY)
    (tmp_path / "energy.yaml").write_text(OF_ENERGY)
    # Of one MAC a GEMM, three elements each and a stash of one.
    argv = ("--layer", "1x1x1", "--format", "fixed", "--user-dir", user_dir)
    macs = priced(capsys, *argv, "--profile", "operands")
    found = priced(capsys, *argv, "--profile", tmp_path / "energy.yaml")
    assert found["arithmetic"] == pytest.approx(3 * 3.2 / 16 + 200 * macs["dram_bytes"])
    assert found["dram_relative"] == macs["dram_relative"]
    baseline = macs["dram_bytes"] / macs["dram_relative"]
    assert found["arithmetic_relative"] == pytest.approx(found["arithmetic"] / (3 * 3.2 + 200 * baseline))
