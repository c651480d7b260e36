"""Linear layers on quantised weights, and on quantised activations too.

``op`` is the meaning, ``cpu`` what runs eagerly on CPU, ``lowering`` what a compiler puts in the place of the ops.
Importing this package registers ``torch.ops.ditc.{quantized_linear, weight_linear, lowrank_split, smoothing_scale}``.
"""

from . import cpu as _cpu  # registers the CPU implementations  # noqa: F401
from . import cuda as _cuda  # registers the CUDA implementations  # noqa: F401
from .lowering import lowerings, supported
from .lowrank import lowrank_split, lowrank_split_reference, smoothing_scale, smoothing_scale_reference
from .op import (
    INT8_MAX_K,
    TOLERANCE,
    broadcasts,
    quantized_linear,
    quantized_linear_reference,
    weight_linear,
    weight_linear_reference,
)

__all__ = [
    "INT8_MAX_K",
    "TOLERANCE",
    "broadcasts",
    "lowerings",
    "lowrank_split",
    "lowrank_split_reference",
    "quantized_linear",
    "quantized_linear_reference",
    "smoothing_scale",
    "smoothing_scale_reference",
    "supported",
    "weight_linear",
    "weight_linear_reference",
]
