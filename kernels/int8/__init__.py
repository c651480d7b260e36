"""INT8 with dynamic scales: one scale per token of the input, one per output channel of the weight.

``op`` is the meaning, ``cpu`` what CPU lowering uses, ``lowering`` what a compiler puts in the place of the ops.
Importing this package registers ``torch.ops.ditc.{quantize_int8, quantize_int8_weight, int8_linear,
int8_weight_linear}``.
"""

from . import cpu as _cpu  # registers the CPU implementations  # noqa: F401
from .lowering import lowerings, supported
from .op import (
    MAX_K,
    TOLERANCE,
    int8_linear,
    int8_linear_reference,
    int8_weight_linear,
    int8_weight_linear_reference,
    quantize_int8,
    quantize_int8_reference,
    quantize_int8_weight,
    quantize_int8_weight_reference,
)

__all__ = [
    "MAX_K",
    "TOLERANCE",
    "int8_linear",
    "int8_linear_reference",
    "int8_weight_linear",
    "int8_weight_linear_reference",
    "lowerings",
    "quantize_int8",
    "quantize_int8_reference",
    "quantize_int8_weight",
    "quantize_int8_weight_reference",
    "supported",
]
