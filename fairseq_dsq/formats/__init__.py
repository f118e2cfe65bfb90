"""Number formats: what a value is rounded to and how many bytes it takes. One file a family.

To add one, write a subclass of :class:`Format` and :func:`register` it; tests/how_to/test_new_format.py shows it.
"""

from fairseq_dsq.formats.base import (
    DEFAULT_BOX_SIZE,
    E4M3_SCALE,
    FIXED_SCALES,
    FLOAT32_SCALE,
    MAX_BITS,
    MAX_BOX_SIZE,
    MIN_BITS,
    POWER_OF_TWO,
    SCALE_RULES,
    Format,
    FormatOptions,
    Group,
    KernelSpec,
    Square,
    examples,
    make_format,
    names,
    parse,
    register,
    unregister,
)
from fairseq_dsq.formats.bfp import BlockFloat
from fairseq_dsq.formats.fixed import FixedPoint
from fairseq_dsq.formats.float32 import Float32
from fairseq_dsq.formats.fp8 import ScaledE4M3, ScaledE5M2
from fairseq_dsq.formats.integer import Integer
from fairseq_dsq.formats.logarithmic import Logarithmic
from fairseq_dsq.formats.mx import MX_RULES, MXFP4, MXFP6E2M3, MXFP6E3M2, MXFP8E4M3, MXFP8E5M2, MXInt8
from fairseq_dsq.formats.nvfp4 import NVFP4
from fairseq_dsq.formats.small_float import SmallFloat
from fairseq_dsq.formats.ternary import Ternary

__all__ = [
    "DEFAULT_BOX_SIZE", "E4M3_SCALE", "FIXED_SCALES", "FLOAT32_SCALE", "MAX_BITS", "MAX_BOX_SIZE", "MIN_BITS", "MXFP4",
    "MXFP6E2M3", "MXFP6E3M2", "MXFP8E4M3", "MXFP8E5M2", "MX_RULES", "NVFP4", "POWER_OF_TWO", "SCALE_RULES",
    "BlockFloat", "FixedPoint", "Float32", "Format", "FormatOptions", "Group", "Integer", "KernelSpec", "Logarithmic",
    "MXInt8", "ScaledE4M3", "ScaledE5M2", "SmallFloat", "Square", "Ternary", "examples", "make_format", "names",
    "parse", "register", "unregister",
]  # fmt: skip
