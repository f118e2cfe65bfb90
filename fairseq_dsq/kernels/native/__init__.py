"""The CPU kernels: loads the library that setup.py built of the C++ files here and calls it through ctypes.

``kernels`` are those of the best instruction set that this CPU has, or None; ``unavailable`` then says why, and
:mod:`fairseq_dsq.kernels.ops` runs the definition. The environment variable FAIRSEQ_DSQ_ISA forces one of
``amx``, ``avx512``, ``avx2``, ``baseline`` (any CPU) or ``torch`` (no kernels, on GPUs neither). ``amx_emulated`` is
AMX's GEMM without the tiles, bit for bit and slowly, on any CPU with AVX-512.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_dsq.formats import E4M3_SCALE, FLOAT32_SCALE, MAX_BOX_SIZE, POWER_OF_TWO, Format, KernelSpec
from fairseq_dsq.kernels import memory

ISAS = ("amx", "avx512", "avx2", "baseline")
EMULATED = "amx_emulated"
NO_KERNELS = "torch"
VARIABLE = "FAIRSEQ_DSQ_ISA"
# float32 numbers in a vector of the widest instruction set.
MOST_LANES = 16
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
    "pack_log8": (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32, _UINT64, _INT32),
    "unpack_bytes": (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32),
    "adam": (_POINTER, _INT32, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT32),
    "adam_of_codes": (_POINTER, _INT32, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT32),
    "subtract": (_POINTER, _POINTER, _INT32, _INT64, _INT64, _INT32),
    "dropout": (_POINTER, _POINTER, _INT64, ctypes.c_float, ctypes.c_float, _UINT64, _INT32),
    "pack_positive": (_POINTER, _POINTER, _INT64, _INT32),
    "mask": (_POINTER, _POINTER, _POINTER, _INT64, _INT32),
    "tensor_scale": (_POINTER, _INT64, _INT32),
}
_RESULTS: dict[str, Any] = {"tensor_scale": ctypes.c_float}


_KINDS: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "box_size": _INT64,
    "min_code": ctypes.c_float,
    "max_code": ctypes.c_float,
    "headroom": ctypes.c_uint32,
    "element_exponent": ctypes.c_uint32,
    "least_exponent": ctypes.c_uint32,
}


class _Format(ctypes.Structure):
    """DsqFormat of encode.h: a :class:`~fairseq_dsq.formats.KernelSpec`."""

    _fields_ = (
        *((name, _KINDS.get(name, _INT32)) for name in KernelSpec._fields),
        *(("tensor_scale", ctypes.c_float), ("elements", _INT32)),
    )


@cache
def _format(spec: KernelSpec, elements: bool = False) -> Any:
    """A pointer to a format as the library reads it; ``elements``: values go without the scale of the tensor."""
    return ctypes.pointer(_Format(*spec, elements=elements))


def _is_bfloat16(out: Tensor, fmt: Any) -> bool:
    bfloat16 = out.dtype is torch.bfloat16
    assert not (bfloat16 and fmt.contents.exponent_bits), "minifloats are written as float32"
    return bfloat16


class AdamStep(NamedTuple):
    """What an update of Adam multiplies by: DsqAdam of adam.cpp, in this order, which says what each field means."""

    beta1: float
    rest1: float
    beta2: float
    rest2: float
    eps: float
    decay: float
    size: float
    residual: float = 0.0


class _Adam(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_float) for name in AdamStep._fields)


@lru_cache(maxsize=64)
def _adam_step(step: AdamStep) -> Any:
    """A pointer to a step as the library reads it."""
    return ctypes.pointer(_Adam(*step))


class AdamMoments(NamedTuple):
    """Two moments that an update changes in place; contiguous.

    Attributes:
        m, v: uint8, packed in ``int8/row`` (m / sqrt(v), that is) and in ``fmt``.
        fmt: ``log8/row``.
        stochastic: how they round.
        seeds: of the noise of each.
        first: they count as zero, whatever they hold.
    """

    m: Tensor
    v: Tensor
    fmt: Format
    stochastic: bool
    seeds: tuple[int, int]
    first: bool


class _Moments(ctypes.Structure):
    """DsqMoments of adam.cpp."""

    _fields_ = (
        *(("m", _POINTER), ("v", _POINTER), ("log8", _POINTER)),
        *(("m_seed", _UINT64), ("v_seed", _UINT64), ("scratch", _POINTER), ("stochastic", _INT32), ("first", _INT32)),
    )


class Codes(NamedTuple):
    """A weight, N x K, of 8-bit integers, which an update changes in place; contiguous.

    Attributes:
        codes: uint8, N x K, two's complement.
        scale: float32, N x 1 or 1 x 1; becomes NaN where a step holds Inf or NaN.
        limits: the smallest and the largest code.
    """

    codes: Tensor
    scale: Tensor
    limits: tuple[int, int]


class _Codes(ctypes.Structure):
    """DsqCodes of adam.cpp."""

    _fields_ = (
        *(("codes", _POINTER), ("scales", _POINTER), ("scale_stride", _INT64)),
        *(("min_code", ctypes.c_float), ("max_code", ctypes.c_float), ("seed", _UINT64)),
        *(("changed", _INT64), ("bad", _INT64)),
    )


def _codes(weight: Codes, seed: int) -> _Codes:
    codes, scale, limits = weight
    return _Codes(codes.data_ptr(), scale.data_ptr(), scale.numel() > 1, *limits, seed, 0, 0)


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
# DSQ_NO_MEMORY of gemm.h.
_NO_MEMORY = 1
# A GEMM of fewer MACs is not worth waking a thread for.
MACS_PER_THREAD = 1 << 21


class Unavailable(Exception):
    """Why the kernels cannot be used, in one line."""


class Kernels:
    """The kernels of one instruction set.

    Attributes:
        has_gemm: whether there is a GEMM kernel for this CPU: with AMX, on AVX2, and on AVX-512 with VNNI.
        gemm_takes_values: whether its operands may be values of one or two bfloat16 terms in any format, which takes
            AMX or AVX512-BF16; else both are block floating point, and it multiplies their codes.

    Their tensors are contiguous, on the CPU and not empty: ``x`` float32, ``out`` float32, or bfloat16 of formats of
    integers, packed bytes uint8; all seen as ``shape`` (before, length, after) with the boxes along ``length``.
    ``seed`` None rounds to nearest.

    Raises:
        Unavailable: the library is missing, is not of these sources, or this CPU lacks the instructions.
    """

    def __init__(self, isa: str) -> None:
        library = _library()
        # AMX has a GEMM; whatever else there is to do, AVX-512 does.
        tiles = isa in ("amx", EMULATED)
        vectors = "avx512" if tiles else isa
        runs, gemm_runs = (getattr(library, f"dsq_{name}_runs", None) for name in (vectors, f"{isa}_gemm"))
        if runs is None or gemm_runs is None:
            raise Unavailable(f"{isa}: no kernels were built for it")
        if not runs() or (tiles and not gemm_runs()):
            raise Unavailable(f"{isa}: this CPU does not run it")
        self.isa = isa
        self.threaded = _openmp_is_torchs(library)
        self._library = SimpleNamespace(gemm=getattr(library, f"dsq_{isa}_gemm"))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"dsq_{vectors}_{name}")
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
            setattr(self._library, name, function)
        self.has_gemm = bool(gemm_runs())
        self.gemm_takes_values = bool(getattr(library, f"dsq_{isa}_gemm_takes_values")())
        self._library.gemm.argtypes, self._library.gemm.restype = _GEMM_ARGUMENTS, _INT32

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
        terms: tuple[int, int],
        bias: Tensor | None,
        accumulate: bool,
    ) -> None:
        """Write ``a @ b^T``, plus ``bias``, to ``out``, or add it to what is there.

        Args:
            out: batch x M x N, contiguous along N.
            a, b: batch x M x K, batch x N x K; float32, each contiguous along either of its last two dimensions.
            bits: of each operand's block floating point, rounded on the way; 0 where its values need no rounding.
                Both must be given unless ``gemm_takes_values``.
            terms: bfloat16 terms, 1 or 2, that a value of each needs, where its bits are 0.
            bias: N values.

        Raises:
            MemoryError: no room for the packed operands.
            RuntimeError: operands that this CPU's kernel does not take.
        """
        batch, m, k = a.shape
        n = b.shape[1]
        code = self._library.gemm(
            *(_operand(a, bits[0], terms[0]), _operand(b, bits[1], terms[1])),
            *(out.data_ptr(), out.stride(1), out.stride(0), None if bias is None else bias.data_ptr(), accumulate),
            *(batch, m, n, k, self._threads_for(batch * m * n * k // MACS_PER_THREAD)),
        )
        if code:
            kind = MemoryError if code == _NO_MEMORY else RuntimeError
            raise kind(f"gemm of {batch} x {m} x {k} and {n} columns: error {code}")

    def covers(self, spec: KernelSpec) -> bool:
        """Whether the kernels run a format: but for those of float32 scales."""
        return spec.scale != FLOAT32_SCALE

    def packs_with(self, operand: KernelSpec, stash: KernelSpec) -> bool:
        """Whether :meth:`quantize_and_pack` knows both."""
        return operand.scale == stash.scale == POWER_OF_TWO

    def _format_for(self, x: Tensor, spec: KernelSpec, elements: bool = False) -> Any:
        """The format of one tensor of float32 values."""
        if spec.scale != E4M3_SCALE:
            return _format(spec)
        scale = self._library.tensor_scale(x.data_ptr(), x.numel(), self._threads(x))
        return ctypes.pointer(_Format(*spec, tensor_scale=scale, elements=elements))

    def fake_quantize(self, x: Tensor, out: Tensor, shape: Shape, spec: KernelSpec, seed: int | None) -> None:
        """Write the rounded values of ``x`` to ``out``, which may be ``x``."""
        self._round(x, out, shape, self._format_for(x, spec), seed)

    def _round(self, x: Tensor, out: Tensor, shape: Shape, fmt: Any, seed: int | None) -> None:
        stochastic, threads = seed is not None, self._threads(x)
        self._library.fake_quantize(
            *(x.data_ptr(), out.data_ptr(), _is_bfloat16(out, fmt), *shape, fmt, stochastic, seed or 0, threads),
        )

    def pack(self, x: Tensor, data: Tensor, shape: Shape, spec: KernelSpec, seed: int | None) -> None:
        """Write the packed bytes of ``x`` to ``data``."""
        fmt, stochastic, threads = self._format_for(x, spec), seed is not None, self._threads(x)
        self._library.pack(x.data_ptr(), data.data_ptr(), *shape, fmt, stochastic, seed or 0, threads)

    def unpack(self, data: Tensor, out: Tensor, shape: Shape, spec: KernelSpec) -> None:
        """Write the values of packed bytes to ``out``."""
        self._unpack_to(data, out, shape, _format(spec))

    def unpack_factors(self, data: Tensor, elements: Tensor, factors: Tensor, shape: Shape, spec: KernelSpec) -> None:
        """Write what :meth:`factorize` gave of what was packed."""
        self._unpack_to(data, elements, shape, _format(spec, elements=True))
        factors.fill_(ctypes.c_float.from_address(data.data_ptr()).value)

    def _unpack_to(self, data: Tensor, out: Tensor, shape: Shape, fmt: Any) -> None:
        bfloat16 = _is_bfloat16(out, fmt)
        self._library.unpack(data.data_ptr(), out.data_ptr(), bfloat16, *shape, fmt, self._threads(out))

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
        fmt = _format(operand_spec)
        self._library.quantize_and_pack(
            *(x.data_ptr(), operand.data_ptr(), _is_bfloat16(operand, fmt), stash.data_ptr(), *shape),
            *(fmt, _format(stash_spec), self._threads(x)),
        )

    def factorizes(self, spec: KernelSpec, shape: Shape, packed: bool) -> bool:
        """Whether :meth:`factorize`, or :meth:`unpack_factors`, knows the format: a number for the tensor over scales
        of boxes; one scale for each row in one piece, but not packed."""
        rows = spec.scale == POWER_OF_TWO and spec.box_size == MAX_BOX_SIZE and shape[2] == 1
        return spec.scale == E4M3_SCALE or (rows and not packed)

    def factorize(
        self, x: Tensor, elements: Tensor, factors: Tensor, shape: Shape, spec: KernelSpec, seed: int | None
    ) -> None:
        """Write the elements of ``x``, and the factor of each row, or of the tensor."""
        if spec.scale == E4M3_SCALE:
            fmt = self._format_for(x, spec, elements=True)
            self._round(x, elements, shape, fmt, seed)
            factors.fill_(fmt.contents.tensor_scale)
            return
        rows, length, _ = shape
        stochastic, threads = seed is not None, self._threads(x)
        self._library.factorize(
            *(x.data_ptr(), elements.data_ptr(), factors.data_ptr(), rows, length),
            *(_format(spec), stochastic, seed or 0, threads),
        )

    def pack_rows(self, x: Tensor, data: Tensor, fmt: Format, seed: int | None) -> None:
        """Write the packed bytes of ``x``, whose rows (its last dimension) are one group each, to ``data``."""
        length = x.shape[-1]
        memory = x.data_ptr(), data.data_ptr(), x.numel() // length, length
        rounding = seed is not None, seed or 0, self._threads(x)
        if fmt.row_kernel == "int8":
            self._library.pack_int8(*memory, *rounding)
        else:
            self._library.pack_log8(*memory, _log8(fmt).data_ptr(), *rounding)

    def unpack_rows(self, data: Tensor, out: Tensor, fmt: Format) -> None:
        """Write the values of such bytes to ``out``."""
        length = out.shape[-1]
        self._library.unpack_bytes(
            *(data.data_ptr(), out.data_ptr(), out.numel() // length, length, _elements(fmt).data_ptr()),
            self._threads(out),
        )

    def adam(self, step: AdamStep, fused: bool, values: Tensor, grad: Tensor, moments: AdamMoments) -> None:
        """Update ``values`` and ``moments``; ``fused`` rounds once where a product is added to a number."""
        rows, length, threads = self._cut(values)
        held, _scratch = _held(moments, length, threads)
        self._library.adam(_adam_step(step), fused, values.data_ptr(), grad.data_ptr(), held, rows, length, threads)

    def adam_of_codes(
        self, step: AdamStep, fused: bool, weight: Codes, seed: int, grad: Tensor, moments: AdamMoments
    ) -> int:
        """Update the codes and ``moments``; gives how many codes changed."""
        rows, length, threads = self._cut(weight.codes)
        held, _scratch = _held(moments, length, threads)
        codes = _codes(weight, seed)
        self._library.adam_of_codes(
            _adam_step(step), fused, ctypes.byref(codes), grad.data_ptr(), held, rows, length, threads
        )
        return int(codes.changed)

    def subtract(self, weight: Codes, step: Tensor, seed: int, leave_rest: bool) -> int:
        """Subtract ``step`` from a weight; leave in it what rounding left undone; gives how many codes changed."""
        codes = _codes(weight, seed)
        self._library.subtract(ctypes.byref(codes), step.data_ptr(), leave_rest, *self._cut(step))
        return int(codes.changed)

    def _cut(self, x: Tensor) -> tuple[int, int, int]:
        """The rows of its first dimension (one, of a vector), their length, and threads for them."""
        count = x.numel()
        rows = x.shape[0] if x.dim() > 1 else 1
        return rows, count // rows, self._threads_for(count // VALUES_PER_THREAD)

    def dropout(self, x: Tensor, out: Tensor, p: float, scale: float, seed: int) -> None:
        """Write ``x * scale`` where the noise of ``seed`` is at least ``p``, else 0, to ``out``."""
        self._library.dropout(x.data_ptr(), out.data_ptr(), x.numel(), p, scale, seed, self._threads(x))

    def pack_positive(self, x: Tensor, data: Tensor) -> None:
        """Write a bit per value to ``data``: 0 where ``x <= 0``."""
        self._library.pack_positive(x.data_ptr(), data.data_ptr(), x.numel(), self._threads(x))

    def mask(self, x: Tensor, data: Tensor, out: Tensor) -> None:
        """Write ``x`` to ``out``, or 0 where its bit in ``data`` is 0."""
        self._library.mask(x.data_ptr(), data.data_ptr(), out.data_ptr(), x.numel(), self._threads(x))


def _held(moments: AdamMoments, length: int, threads: int) -> tuple[Any, Tensor]:
    """A pointer to the moments as the library reads them, and memory that has to live as long."""
    m, v, fmt, stochastic, seeds, first = moments
    scratch = torch.empty(threads * 2 * (length + MOST_LANES))
    log8, memory = _log8(fmt).data_ptr(), scratch.data_ptr()
    return ctypes.byref(_Moments(m.data_ptr(), v.data_ptr(), log8, *seeds, memory, stochastic, first)), scratch


@cache
def _elements(fmt: Format) -> Tensor:
    """The element of every byte."""
    return fmt.from_codes(torch.arange(256))


@cache
def _log8(fmt: Format) -> Tensor:
    """Log8 of rows.h: the elements, smallest first, and two factors of each, of which one is the same for 16."""
    elements = _elements(fmt).flip(0)
    smallest = float(elements[0])
    fine = smallest ** -(torch.arange(18, dtype=torch.float64) / 255)
    coarse = smallest ** (1 - torch.arange(0, 256, 16, dtype=torch.float64) / 255)
    parts = [part for factor in (coarse, fine) for part in (factor.float(), (factor - factor.float()).float())]
    return torch.cat([elements, *parts])


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
    if wanted and wanted not in (*ISAS, EMULATED):
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
if os.name == "posix":
    memory.keep_freed(os.environ, ctypes.CDLL(None))
