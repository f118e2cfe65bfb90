"""The CUDA kernels without a GPU: what they give in Triton's interpreter, their machine code, when they are chosen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_dsq import kernels
from fairseq_dsq.formats import BlockFloat, definition
from fairseq_dsq.kernels import native, ops

CPU = torch.device("cpu")
FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def chosen_anew(monkeypatch):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    ops._triton_kernels.cache_clear()
    yield
    ops._triton_kernels.cache_clear()


def test_results_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / "triton_interpreter.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("architecture", "bits", "stochastic"), [(75, 4, False), (80, 16, False), (90, 5, True)])
def test_kernels_compile_without_fusing_or_flushing(architecture, bits, stochastic, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from fairseq_dsq.kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {
        "x_ptr": "*fp32",
        "out_ptr": "*bf16" if bits <= 9 else "*fp32",
        "exponent_ptr": "*u8",
        "code_ptr": "*u8",
    }
    numbers = {"BITS": bits, "BOX_SIZE": 16, "BOX": 16, "BLOCK": 64, "MAX_CODE": 7.0, "STOCHASTIC": stochastic}
    numbers |= {"WIDE": stochastic, "BYTES": triton.next_power_of_2(2 * bits), "TOUCHED": 3}
    for kernel in (triton_kernels._fake_quantize, triton_kernels._pack, triton_kernels._unpack):
        names = kernel.arg_names
        signature = {name: pointers.get(name, "constexpr" if name in numbers else "i32") for name in names}
        constants = {name: numbers[name] for name in names if name in numbers}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options=triton_kernels.OPTIONS)
        assert compiled.asm["cubin"]
        assert "fma." not in compiled.asm["ptx"]
        # floor may: see triton_kernels' docstring.
        assert set(re.findall(r"\S*\bftz\b\S*", compiled.asm["ptx"])) <= {"cvt.rmi.ftz.f32.f32"}


def test_a_device_on_which_they_do_not_work_runs_the_definition(monkeypatch):
    pytest.importorskip("triton")
    x = torch.randn(4, 20)
    # A CPU is one.
    monkeypatch.setattr(ops, "_kernels", ops._triton_kernels)
    with pytest.warns(UserWarning, match="^cpu: no Triton kernels, quantization runs in plain, slow torch: "):
        result = ops.fake_quantize(x, -1, "bfp4", None, torch.float32)
    assert torch.equal(result, definition.fake_quantize(x, BlockFloat(4), -1, None, torch.float32))


def test_the_variable_turns_them_off(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, native.NO_KERNELS)
    assert ops._triton_kernels(CPU) is None


def test_without_triton_the_definition_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fairseq_dsq.kernels.triton_kernels", raising=False)
    monkeypatch.delattr(kernels, "triton_kernels", raising=False)
    assert ops._triton_kernels(CPU) is None
