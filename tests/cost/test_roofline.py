"""The Roofline against groups worked out by hand, and the paper's Table 7."""

import pytest
import torch

from fairseq_dsq import data_files
from fairseq_dsq.cost.hardware import Hardware, load_hardware, measure
from fairseq_dsq.cost.published import roofline_table
from fairseq_dsq.cost.roofline import Group, groups_of_step, total
from fairseq_dsq.ledger import Gemm, Stash
from fairseq_dsq.plugin import probe
from fairseq_dsq.precision import PrecisionConfig

# 1e12 MACs/s at 32 bits, 2e12 at 16, 4e12 at 8; 1e11 bytes/s
MACHINE = Hardware("by hand", {32: 2.0, 16: 4.0, 8: 8.0}, 100.0, "made up")
FIXED = PrecisionConfig((8, 8, 16, 16), "fixed")


@pytest.mark.parametrize(
    ("bits", "macs_per_s"), [(2, 4e12), (8, 4e12), (9, 2e12), (16, 2e12), (17, 1e12), (32, 1e12), (33, 1e12)]
)
def test_operands_run_on_the_narrowest_unit_that_holds_them(bits, macs_per_s):
    assert MACHINE.macs_per_s(bits) == macs_per_s


def test_a_step_by_hand():
    gemms = {
        (Gemm("output", 100, 200, 300), FIXED, True, "a"): 2,
        (Gemm("grad_input", 100, 300, 200), FIXED, True, "a"): 1,
        (Gemm("output", 10, 20, 30, 4), FIXED, True, "b"): 1,
    }
    stashes = {(Stash("input", (100, 200), 0), FIXED, "a"): 2, (Stash("weight", (4, 20, 30), 1), FIXED, "b"): 1}
    # of the two precisions this one counts
    precision = PrecisionConfig((16, 8, 8, 32), "fixed")
    attention, linear, others = groups_of_step(gemms.items(), stashes.items(), (1000, 3000), precision, MACHINE, 32)
    assert [group.name for group in (attention, linear, others)] == ["attention", "fully connected", "others"]
    assert linear.macs == 3 * 100 * 200 * 300
    # two outputs at 16 x 16 bits, one grad_input at 32 x 8
    assert linear.compute_s == pytest.approx(2 * 6e6 / 2e12 + 6e6 / 1e12)
    output = 2 * (100 * 200 + 200 * 300 + 100 * 300) + 3  # a fixed-point tensor has one exponent
    grad_input = 4 * 100 * 300 + 200 * 300 + 4 * 100 * 200 + 3
    assert linear.dram_bytes == 2 * output + grad_input + 2 * (100 * 200 + 1)
    assert attention.macs == 4 * 10 * 20 * 30
    assert attention.dram_bytes == 4000 + 2 * 4 * (10 * 20 + 20 * 30 + 10 * 30) + 3 + 4 * 20 * 30 + 1
    assert (others.macs, others.dram_bytes, others.bound) == (0, 12000, "memory")
    assert others.latency_s == pytest.approx(12000 / 1e11)
    without = groups_of_step(gemms.items(), stashes.items(), (1000, 3000), precision, MACHINE, 32, quantized=False)
    assert linear.dram_bytes - without[1].dram_bytes == 2 * (100 * 200 + 1)


def test_bound_and_attainable_performance():
    memory = Group("a", macs=1000, dram_bytes=100, compute_s=1.0, memory_s=2.0)
    compute = Group("b", macs=1000, dram_bytes=100, compute_s=4.0, memory_s=2.0)
    assert (memory.bound, memory.macs_per_s, memory.intensity) == ("memory", 500, 10)
    assert (compute.bound, compute.macs_per_s) == ("compute", 250)
    together = total([memory, compute])
    assert (together.macs, together.compute_s, together.memory_s, together.bound) == (2000, 5.0, 4.0, "compute")


def test_the_bounds_of_the_paper_s_table_7():
    spec = probe.find_model("opt-1.3b")
    work, elements = probe.trace(spec), probe.traffic(spec)
    unquantized = PrecisionConfig((16,) * 4, "fixed")
    ran, machine = (work.gemms.items(), work.stashes.items(), elements), load_hardware("a100-sxm-80gb")
    groups = groups_of_step(*ran, unquantized, machine, 16, False)
    assert {group.name: group.bound for group in groups} == {
        name: bound for name, (_, bound) in roofline_table().items()
    }
    # DSQ's levels take less time than standard quantization.
    levels = [PrecisionConfig(q) for q in ((16, 16, 16, 16), (16, 4, 4, 16), (2, 2, 2, 16))]
    times = [total(groups_of_step(*ran, level, machine, 16)).latency_s for level in levels]
    assert times == sorted(times, reverse=True) and len(set(times)) == 3


def test_every_machine_names_its_source():
    names = data_files.names("hardware")
    assert {"a100-sxm-80gb", "h100-sxm", "jetson-orin-nano"} <= set(names) and len(names) >= 4
    for name in names:
        hardware = load_hardware(name)
        assert len(hardware.source) > 60 and 32 in hardware.tera_ops_per_s


def test_this_machine_can_be_measured():
    threads = torch.get_num_threads()
    hardware = measure(size=256, copy_bytes=2**24)
    assert f"{threads} thread" in hardware.name
    assert 0.001 < hardware.tera_ops_per_s[32] <= hardware.tera_ops_per_s[16] < 1000
    assert 0.1 < hardware.gigabytes_per_s < 10000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{16: 1}", "expected 32 among them"),
        ("{32: 0}", "expected numbers above 0"),
        ("{}", "expected numbers above 0"),
        ("{wide: 1}", "wide"),
    ],
)
def test_a_file_that_is_no_machine_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(f"name: x\ntera_ops_per_s: {text}\ngigabytes_per_s: 1\nsource: y\n")
    with pytest.raises(ValueError, match=message) as error:
        load_hardware(str(path))
    assert str(error.value).startswith(str(path))
