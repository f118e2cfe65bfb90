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
from fairseq_dsq.formats import BlockFloat, definition, parse
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


def arguments_of(call, monkeypatch):
    """(kernel, names of the tensors, numbers, constants) of each launch of a call."""
    triton_kernels = pytest.importorskip("fairseq_dsq.kernels.triton_kernels")
    launches = []

    def note(key, tensors, seed, prepare):
        kernel, _, rest = prepare()
        launches.append((kernel, tensors, seed, rest))

    monkeypatch.setattr(triton_kernels, "_start", note)
    call(triton_kernels)
    return launches


POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}


def compiled(launch, architecture):
    """A launch's kernel as it would be compiled for it, sizes and addresses that 16 divides said to be so."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fairseq_dsq.kernels import triton_kernels

    kernel, tensors, seed, rest = launch
    given = dict(zip(kernel.arg_names, (*tensors, *seed), strict=False)) | rest
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=triton_kernels.OPTIONS)


def calls(triton_kernels, text, seed, dtype, shape):
    fmt = parse(text)
    size = (shape[0], shape[1], shape[2])
    x, out = torch.empty(size, dtype=dtype), torch.empty(size)
    data = torch.empty(fmt.nbytes(size, 1), dtype=torch.uint8)
    triton_kernels.fake_quantize(x, out, shape, fmt.spec, seed)
    triton_kernels.pack(x, data, shape, fmt.spec, seed)
    triton_kernels.unpack(data, torch.empty((2, *size), dtype=torch.bfloat16), shape, fmt.spec, 2)


def both(triton_kernels, dtype):
    x, shape = torch.empty(1, 4096, 512, dtype=dtype), (1, 4096, 512)
    spec, stash = parse("bfp16").spec, parse("bfp2")
    terms = torch.empty(2, *x.shape, dtype=torch.bfloat16)
    data = torch.empty(stash.nbytes(x.shape, 1), dtype=torch.uint8)
    triton_kernels.quantize_both([x], shape, (terms, spec, 2), (terms, spec, 2), (data, stash.spec))
    triton_kernels.quantize_both([x[0]] * 3, (3, 4096, 512), (terms, spec, 2), (terms, spec, 2), None)
    table = torch.empty(9, 7, dtype=torch.int64)
    triton_kernels.quantize_many(table, 3, terms, dtype, True, spec, 2)
    whole, stash = parse("fixed16").spec, parse("fixed4")
    triton_kernels.quantize_both([x], shape, (terms, whole, 2), None, (data, stash.spec))
    triton_kernels.quantize_many(table, 3, terms, dtype, True, whole, 2)
    triton_kernels.pack_positive(x, data)
    triton_kernels.mask(x, data, x)
    triton_kernels.dropout(x, x, 0.1, 1 / 0.9, 5)


@pytest.mark.parametrize(
    ("architecture", "call"),
    [
        (80, lambda kernels: calls(kernels, "bfp4", None, torch.float32, (4096, 512, 1))),
        (75, lambda kernels: calls(kernels, "bfp16", 5, torch.float32, (1, 4096, 512))),
        (90, lambda kernels: calls(kernels, "fixed16", None, torch.bfloat16, (1, 4097, 510))),
        (80, lambda kernels: calls(kernels, "mxfp8e4m3", None, torch.float32, (4096, 512, 1))),
        (80, lambda kernels: calls(kernels, "fp8e4m3/row", None, torch.float32, (4096, 512, 1))),
        (90, lambda kernels: calls(kernels, "int8/row", 5, torch.bfloat16, (1, 4096, 512))),
        (80, lambda kernels: both(kernels, torch.float32)),
        (90, lambda kernels: both(kernels, torch.float16)),
    ],
    ids=["rows", "columns", "tensor", "minifloats", "floats", "integers", "both", "both of half precision"],
)
def test_kernels_compile_without_fusing_flushing_or_spilling(architecture, call, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in arguments_of(call, monkeypatch):
        machine = compiled(launch, architecture)
        name, ptx = launch[0].__name__, machine.asm["ptx"]
        assert machine.asm["cubin"]
        assert "fma." not in ptx, name
        # floor may: see triton_kernels' docstring.
        assert set(re.findall(r"\S*\bftz\b\S*", ptx)) <= {"cvt.rmi.ftz.f32.f32"}, name
        assert "ld.local" not in ptx and "st.local" not in ptx, name
        if name in ("_fake_quantize", "_both") and launch[1][0].dtype is torch.float32 and architecture >= 80:
            assert re.search(r"ld\.global\.v4", ptx), name


@pytest.mark.parametrize(
    ("text", "shape", "terms"),
    [("bfp24", (1 << 26, 16, 1), 3), ("int8/2", (1 << 29, 2, 1), 2), ("bfp32/row", (4, 1 << 29, 1), 4)],
)
def test_no_product_of_a_size_is_cut_to_32_bits_where_offsets_have_64(text, shape, terms, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fmt = parse(text)
    x = torch.empty(shape, device="meta")
    data = torch.empty(fmt.nbytes(shape, 1), dtype=torch.uint8, device="meta")
    of_terms = torch.empty((terms, *shape), dtype=torch.bfloat16, device="meta")

    def call(kernels):
        kernels.fake_quantize(x, of_terms, shape, fmt.spec, None, terms)
        kernels.pack(x, data, shape, fmt.spec, None)
        kernels.unpack(data, of_terms, shape, fmt.spec, terms)

    for launch in arguments_of(call, monkeypatch):
        assert launch[3]["WIDE"]
        code = compiled(launch, 80).asm["ttir"]
        assert not re.findall(r"arith\.muli .*%(?:plane|total|shorts|length)\b.* : i32", code), launch[0].__name__


def test_a_device_on_which_they_do_not_work_runs_the_definition(monkeypatch):
    pytest.importorskip("triton")
    x = torch.randn(4, 20)
    # A CPU is one.
    monkeypatch.setattr(ops, "_kernels", ops._triton_kernels)
    with pytest.warns(
        UserWarning, match="^cpu: no Triton kernels, quantization runs in plain torch, .*: Triton wants a C"
    ):
        result = ops.fake_quantize(x, -1, "bfp4", None, torch.float32)
    assert torch.equal(result, definition.fake_quantize(x, BlockFloat(4), -1, None, torch.float32))


def test_the_variable_turns_them_off(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, native.NO_KERNELS)
    assert ops._triton_kernels(CPU) is None


def test_without_triton_the_definition_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fairseq_dsq.kernels.triton_kernels", raising=False)
    monkeypatch.delattr(kernels, "triton_kernels", raising=False)
    with pytest.warns(
        UserWarning, match=r"^cpu: no Triton kernels, .* about ten times slower: .*: pip install triton$"
    ):
        assert ops._triton_kernels(CPU) is None
