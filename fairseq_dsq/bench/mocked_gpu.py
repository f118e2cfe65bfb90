"""A GPU that is not there: what a training step launches on one, and the Python time that this takes.

Launches are counted and nothing is computed: results are what memory held. The rest of torch runs on the CPU, or, where
it is counted how often a step waits for the GPU, on the meta device.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fairseq_dsq import gemm
from fairseq_dsq.kernels import ops
from fairseq_dsq.plugin import probe


class _Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Compiled:
    """A kernel that counts its launches."""

    function = packed_metadata = None

    def __init__(self, name: str, launches: Counter[str]) -> None:
        self.name, self.launches = name, launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self.launches[self.name] += 1


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.matmul(a.float(), b.float())


def _no_product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=out_dtype)


@contextlib.contextmanager
def engines_of_a_gpu(multiplies: bool = True) -> Iterator[None]:
    """Products are planned for any device as for an NVIDIA GPU with tensor cores; the CPU multiplies too, or pretends.

    Args:
        multiplies: the CPU gives the products of half precision into float32, and not just their shapes.
    """
    with contextlib.ExitStack() as stack:
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        for name in ("mm.dtype", "bmm.dtype"):
            library.impl(name, _product if multiplies else _no_product, "CPU")
        stack.enter_context(mock.patch.object(gemm.cuda, "has_tensor_cores", lambda device: True))
        for engine in (gemm.NativeEngine, gemm.Int8Engine):
            stack.enter_context(mock.patch.object(engine, "accepts", lambda *_: False))
        stack.callback(gemm.base.forget_plans)  # that models hold: they are of another machine
        gemm.base.forget_plans()
        yield


@contextlib.contextmanager
def mocked_gpu(meta: bool = False) -> Iterator[Counter[str]]:
    """Launches by kernel, of what is quantized while this lasts; ``meta``: on the meta device, not the CPU.

    Raises:
        ImportError: Triton is not installed.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fairseq_dsq.kernels import triton_kernels

    launches: Counter[str] = Counter()

    def compile_(function: Any, key: Any, signature: Any, device: Any, *_: Any) -> Any:
        compiled = _Compiled(function.__name__.removeprefix("_"), launches)
        function.device_caches[device][0][key] = compiled
        return compiled

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(engines_of_a_gpu(multiplies=False))
        stack.enter_context(patch(JITFunction, "_do_compile", compile_))
        stack.enter_context(patch(ops, "_kernels", lambda device: triton_kernels))
        stack.enter_context(patch(ops, "_row_kernels", lambda *_: None))
        if meta:  # there the dispatcher asks for shapes alone
            for name, (_, run, _) in ops._OPERATORS.items():
                stack.enter_context(patch(ops, name, run))
        stack.enter_context(patch(triton_kernels, "_launches", {}))
        stack.enter_context(patch(triton_kernels, "_direct", True))  # whatever check() found here
        caches = [kernel.device_caches for kernel in vars(triton_kernels).values() if isinstance(kernel, JITFunction)]
        for held in caches:
            stack.callback(held.clear)
            held.clear()
        stack.enter_context(patch(driver, "_active", _Driver()))
        yield launches


class Waits(probe.NoData):
    """Counts how often the host waits for the device, here the meta device.

    Attributes:
        count: reads of a value, copies between host and device, and operators whose result has as many elements as the
            values say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def __enter__(self) -> Any:
        self.uploads = _Uploads(self)
        self.uploads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.uploads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.count += 1
        indexes = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        masked = indexes and any(index is not None and index.dtype is torch.bool for index in args[1])
        if masked or func in (aten.nonzero.default, aten.masked_select.default):
            self.count += 1
        if func is aten._to_copy.default:
            device = torch.device(kwargs.get("device") or args[0].device)
            self.count += args[0].is_meta != (device.type == "meta")
        if func is aten.copy_.default:
            self.count += args[0].is_meta != args[1].is_meta
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Uploads(TorchFunctionMode):
    """Counts the tensors that are made of numbers of the host; no operator tells of these."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor) and result.is_meta:
            self.waits.count += 1
        return result
