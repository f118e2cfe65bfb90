"""The CPU kernels: loads the library that setup.py built of the C++ files here and calls it through ctypes.

``kernels`` are those of the best instruction set that this CPU has, or None; ``unavailable`` then says why, and
:mod:`fairseq_dsq.kernels.ops` runs the definition. The environment variable FAIRSEQ_DSQ_ISA forces one of
``avx512``, ``avx2``, ``baseline`` (any CPU) or ``torch`` (no kernels, on GPUs neither).
"""

from __future__ import annotations

import ctypes
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_dsq.formats import Format, KernelSpec

ISAS = ("avx512", "avx2", "baseline")
NO_KERNELS = "torch"
VARIABLE = "FAIRSEQ_DSQ_ISA"
# Fewer values than this are not worth waking a thread for.
VALUES_PER_THREAD = 1 << 16

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "_kernels.so"
SOURCES = sorted(path for pattern in ("*.cpp", "*.h") for path in FOLDER.glob(pattern))

Shape = tuple[int, int, int]
_POINTER, _INT32, _INT64, _UINT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
_SHAPE = (_INT64, _INT64, _INT64)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "fake_quantize": (_POINTER, _POINTER, _INT32, *_SHAPE, _POINTER, _INT32, _UINT64, _INT32),
    "pack": (_POINTER, _POINTER, *_SHAPE, _POINTER, _INT32, _UINT64, _INT32),
    "unpack": (_POINTER, _POINTER, _INT32, *_SHAPE, _POINTER, _INT32),
    "quantize_and_pack": (
        *(_POINTER, _POINTER, _INT32, _POINTER, *_SHAPE),
        *(_POINTER, _POINTER, _INT32),
    ),
    "factorize": (_POINTER, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32, _UINT64, _INT32),
    "pack_int8": (_POINTER, _POINTER, _INT64, _INT64, _INT32, _UINT64, _INT32),
    "pack_log8": (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT32, _INT32, _INT32, _UINT64, _INT32),
    "unpack_bytes": (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32),
    "dropout": (_POINTER, _POINTER, _INT64, ctypes.c_float, ctypes.c_float, _UINT64, _INT32),
    "pack_positive": (_POINTER, _POINTER, _INT64, _INT32),
    "mask": (_POINTER, _POINTER, _POINTER, _INT64, _INT32),
}


_KINDS: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "box_size": _INT64,
    "min_code": ctypes.c_float,
    "max_code": ctypes.c_float,
    "headroom": ctypes.c_uint32,
}


class _Format(ctypes.Structure):
    """DsqFormat of encode.h: a :class:`~fairseq_dsq.formats.KernelSpec`."""

    _fields_ = tuple((name, _KINDS.get(name, _INT32)) for name in KernelSpec._fields)


@cache
def _format(spec: KernelSpec) -> Any:
    """A pointer to a format as the library reads it."""
    return ctypes.pointer(_Format(*spec))


class _Operand(ctypes.Structure):
    """DsqOperand of gemm.cpp."""

    _fields_ = (
        ("data", _POINTER),
        ("row_stride", _INT64),
        ("batch_stride", _INT64),
        ("k_outer", _INT32),
        ("bits", _INT32),
        ("terms", _INT32),
    )


_GEMM_ARGUMENTS = (
    *(_POINTER, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32),
    *(_INT64, _INT64, _INT64, _INT64, _INT32),
)
# A GEMM of fewer MACs is not worth waking a thread for.
MACS_PER_THREAD = 1 << 21


class Unavailable(Exception):
    """Why the kernels cannot be used, in one line."""


class Kernels:
    """The kernels of one instruction set.

    Attributes:
        has_gemm: whether there is a GEMM kernel for this CPU: on AVX2, and on AVX-512 with VNNI.
        gemm_takes_values: whether its operands may be values of at most 9 (or 16) bits in any format, which takes
            AVX512-BF16; else both are block floating point, and it multiplies their codes.

    Their tensors are contiguous, on the CPU and not empty: ``x`` float32, ``out`` float32 or bfloat16, packed bytes
    uint8; all seen as ``shape`` (before, length, after) with the boxes along ``length``. ``seed`` None rounds to
    nearest.

    Raises:
        Unavailable: the library is missing, is not of these sources, or this CPU lacks the instructions.
    """

    def __init__(self, isa: str) -> None:
        library = _library()
        runs = getattr(library, f"dsq_{isa}_runs", None)
        if runs is None or not hasattr(library, f"dsq_{isa}_pack"):
            raise Unavailable(f"{isa}: no kernels were built for it")
        if not runs():
            raise Unavailable(f"{isa}: this CPU does not run it")
        self.isa = isa
        self.threaded = _openmp_is_torchs(library)
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"dsq_{isa}_{name}")
            function.argtypes, function.restype = arguments, None
            setattr(self, f"_{name}", function)
        self.has_gemm = bool(getattr(library, f"dsq_{isa}_gemm_runs")())
        self.gemm_takes_values = bool(getattr(library, f"dsq_{isa}_gemm_takes_values")())
        self._gemm = getattr(library, f"dsq_{isa}_gemm")
        self._gemm.argtypes, self._gemm.restype = _GEMM_ARGUMENTS, _INT32

    _fake_quantize: Any
    _pack: Any
    _unpack: Any
    _quantize_and_pack: Any
    _factorize: Any
    _pack_int8: Any
    _pack_log8: Any
    _unpack_bytes: Any
    _dropout: Any
    _pack_positive: Any
    _mask: Any

    def _threads(self, x: Tensor) -> int:
        return self._threads_for(x.numel() // VALUES_PER_THREAD)

    def _threads_for(self, most: int) -> int:
        return min(most, torch.get_num_threads()) if self.threaded and most > 1 else 1

    def gemm(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        bits: tuple[int, int],
        terms: int,
        bias: Tensor | None,
        accumulate: bool,
    ) -> None:
        """Write ``a @ b^T``, plus ``bias``, to ``out``, or add it to what is there.

        Args:
            out: batch x M x N, contiguous along N.
            a, b: batch x M x K, batch x N x K; float32, each contiguous along either of its last two dimensions.
            bits: of each operand's block floating point, rounded on the way; 0 where its values need no rounding.
                Both must be given unless ``gemm_takes_values``.
            terms: bfloat16 terms that a value of ``a`` needs, where its bits are 0.
            bias: N values.

        Raises:
            MemoryError: no room for the packed operands.
        """
        batch, m, k = a.shape
        n = b.shape[1]
        code = self._gemm(
            *(_operand(a, bits[0], terms), _operand(b, bits[1], 1)),
            *(out.data_ptr(), out.stride(1), out.stride(0), None if bias is None else bias.data_ptr(), accumulate),
            *(batch, m, n, k, self._threads_for(batch * m * n * k // MACS_PER_THREAD)),
        )
        if code:
            raise MemoryError(f"gemm of {batch} x {m} x {k} and {n} columns: error {code}")

    def covers(self, spec: KernelSpec) -> bool:
        """Whether the kernels run a format: all that describe themselves so."""
        return True

    def fake_quantize(self, x: Tensor, out: Tensor, shape: Shape, spec: KernelSpec, seed: int | None) -> None:
        """Write the rounded values of ``x`` to ``out``, which may be ``x``."""
        before, length, after = shape
        bfloat16, stochastic, threads = out.dtype is torch.bfloat16, seed is not None, self._threads(x)
        self._fake_quantize(
            x.data_ptr(), out.data_ptr(), bfloat16, before, length, after, _format(spec), stochastic, seed or 0, threads
        )

    def pack(self, x: Tensor, data: Tensor, shape: Shape, spec: KernelSpec, seed: int | None) -> None:
        """Write the packed bytes of ``x`` to ``data``."""
        before, length, after = shape
        stochastic, threads = seed is not None, self._threads(x)
        self._pack(x.data_ptr(), data.data_ptr(), before, length, after, _format(spec), stochastic, seed or 0, threads)

    def unpack(self, data: Tensor, out: Tensor, shape: Shape, spec: KernelSpec) -> None:
        """Write the values of packed bytes to ``out``."""
        before, length, after = shape
        bfloat16, threads = out.dtype is torch.bfloat16, self._threads(out)
        self._unpack(data.data_ptr(), out.data_ptr(), bfloat16, before, length, after, _format(spec), threads)

    def quantize_and_pack(
        self,
        x: Tensor,
        operand: Tensor,
        stash: Tensor,
        shape: Shape,
        operand_spec: KernelSpec,
        stash_spec: KernelSpec,
    ) -> None:
        """Read ``x`` once for ``operand``, boxed along ``after``, and the packed ``stash``, boxed along ``length``."""
        self._quantize_and_pack(
            *(x.data_ptr(), operand.data_ptr(), operand.dtype is torch.bfloat16, stash.data_ptr(), *shape),
            *(_format(operand_spec), _format(stash_spec), self._threads(x)),
        )

    def factorize(self, x: Tensor, elements: Tensor, factors: Tensor, spec: KernelSpec, seed: int | None) -> None:
        """Write the elements of ``x``, whose rows (its last dimension) are one group each, and a factor for each."""
        length, stochastic = x.shape[-1], seed is not None
        rows, threads = x.numel() // length, self._threads(x)
        self._factorize(
            *(x.data_ptr(), elements.data_ptr(), factors.data_ptr(), rows, length),
            *(_format(spec), stochastic, seed or 0, threads),
        )

    def pack_rows(self, x: Tensor, data: Tensor, fmt: Format, seed: int | None) -> None:
        """Write the packed bytes of ``x``, whose rows (its last dimension) are one group each, to ``data``."""
        length = x.shape[-1]
        memory = x.data_ptr(), data.data_ptr(), x.numel() // length, length
        rounding = seed is not None, seed or 0, self._threads(x)
        if fmt.row_kernel == "int8":
            self._pack_int8(*memory, *rounding)
        else:
            elements, starts, shift, base = _search(fmt)
            self._pack_log8(*memory, elements.data_ptr(), starts.data_ptr(), shift, base, *rounding)

    def unpack_rows(self, data: Tensor, out: Tensor, fmt: Format) -> None:
        """Write the values of such bytes to ``out``."""
        length = out.shape[-1]
        self._unpack_bytes(
            *(data.data_ptr(), out.data_ptr(), out.numel() // length, length, _elements(fmt).data_ptr()),
            self._threads(out),
        )

    def dropout(self, x: Tensor, out: Tensor, p: float, scale: float, seed: int) -> None:
        """Write ``x * scale`` where the noise of ``seed`` is at least ``p``, else 0, to ``out``."""
        self._dropout(x.data_ptr(), out.data_ptr(), x.numel(), p, scale, seed, self._threads(x))

    def pack_positive(self, x: Tensor, data: Tensor) -> None:
        """Write a bit per value to ``data``: 0 where ``x <= 0``."""
        self._pack_positive(x.data_ptr(), data.data_ptr(), x.numel(), self._threads(x))

    def mask(self, x: Tensor, data: Tensor, out: Tensor) -> None:
        """Write ``x`` to ``out``, or 0 where its bit in ``data`` is 0."""
        self._mask(x.data_ptr(), data.data_ptr(), out.data_ptr(), x.numel(), self._threads(x))


@cache
def _elements(fmt: Format) -> Tensor:
    """The element of every byte."""
    return fmt.from_codes(torch.arange(256))


@cache
def _search(fmt: Format) -> tuple[Tensor, Tensor, int, int]:
    """What encode_log8 of rows.cpp looks its neighbours up in: elements, starts, shift, base.

    A float's bits without the lowest ``shift`` are its bucket, a sixteenth of an octave: less than between elements.
    """
    elements, shift = _elements(fmt).flip(0).contiguous(), 23 - 4
    first, last = (int(bits) >> shift for bits in elements[[0, -1]].view(torch.int32))
    smallest = (torch.arange(first, last + 1, dtype=torch.int32) << shift).view(torch.float32)
    starts = (torch.bucketize(smallest, elements, right=True) - 1).clamp_(0, len(elements) - 2)
    return elements, starts.to(torch.uint8), shift, first


def _operand(x: Tensor, bits: int, terms: int) -> Any:
    """A pointer to a batch of matrices, seen as rows along the reduction dimension, the last one."""
    batch_stride, row_stride, inner_stride = x.stride()
    outer = inner_stride != 1
    return ctypes.byref(_Operand(x.data_ptr(), inner_stride if outer else row_stride, batch_stride, outer, bits, terms))


def source_number() -> int:
    """Stands for the C++ sources beside this file."""
    return zlib.crc32(b"".join(path.read_bytes() for path in SOURCES))


@cache
def _library() -> ctypes.CDLL:
    if not LIBRARY.exists():
        raise Unavailable("the kernels were not built: was there no C++ compiler when fairseq_dsq was installed?")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        built_of = library.dsq_source() & 0xFFFFFFFF
        library.dsq_openmp.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{LIBRARY.name} cannot be loaded: {error}") from None
    if built_of != source_number():
        raise Unavailable(f"{LIBRARY.name} was built of other sources: install fairseq_dsq again")
    return library


def _openmp_is_torchs(library: ctypes.CDLL) -> bool:
    """Whether the library's OpenMP runtime is torch's own: another one would start threads beside torch's.

    torch's wheels bring theirs along; where there is none in torch's folder, both take the system's.
    """
    runtime = library.dsq_openmp()
    folder = Path(torch.__file__).parent / "lib"
    brought = [path.resolve() for name in ("libgomp*", "libomp*", "libiomp*") for path in folder.glob(name)]
    return bool(runtime) and (not brought or Path(os.fsdecode(runtime)).resolve() in brought)


def _choose() -> tuple[Kernels | None, str]:
    """The kernels to use, or None and why."""
    wanted = os.environ.get(VARIABLE)
    if wanted == NO_KERNELS:
        return None, f"{VARIABLE}={NO_KERNELS}"
    if wanted and wanted not in ISAS:
        raise ValueError(f"{VARIABLE}: got {wanted!r}, expected one of {', '.join((*ISAS, NO_KERNELS))}")
    if wanted:
        try:
            return Kernels(wanted), ""
        except Unavailable as error:
            raise ValueError(f"{VARIABLE}={wanted}: {error}") from None
    reason = ""
    for isa in ISAS:
        try:
            return Kernels(isa), ""
        except Unavailable as error:
            reason = str(error)
    return None, reason


kernels, unavailable = _choose()
