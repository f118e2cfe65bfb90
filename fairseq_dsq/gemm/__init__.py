"""GEMM engines, one a file. No process-wide setting of torch is changed, and none changes a product."""

from fairseq_dsq.gemm.base import AUTO, Engine, Operand, Plan, Side, check_mode, names, plan, register, unregister
from fairseq_dsq.gemm.cuda import CudaEngine
from fairseq_dsq.gemm.float32 import Float32Engine
from fairseq_dsq.gemm.int8 import Int8Engine
from fairseq_dsq.gemm.native import NativeEngine

# Cheapest first; float32 takes everything.
for _engine in (Int8Engine(), NativeEngine(), CudaEngine(), Float32Engine()):
    register(_engine)

__all__ = [
    "AUTO", "CudaEngine", "Engine", "Float32Engine", "Int8Engine", "NativeEngine", "Operand", "Plan", "Side",
    "check_mode", "names", "plan", "register", "unregister",
]  # fmt: skip
