"""Quantising: bare, behind a norm with modulation, behind an activation; and back.

``op`` is the meaning, ``lowering`` what a compiler puts in the place of the ops. Importing this package registers
``torch.ops.ditc.{quantize, quantize_weight, norm_quantize, activation_quantize, dequantize}``.
"""

from . import cuda as _cuda  # registers the CUDA implementations  # noqa: F401
from .lowering import lowerings
from .op import (
    ACTIVATIONS,
    NORMS,
    activation_quantize,
    activation_quantize_reference,
    dequantize,
    dequantize_reference,
    norm_quantize,
    norm_quantize_reference,
    quantize,
    quantize_reference,
    quantize_weight,
    quantize_weight_reference,
)

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "activation_quantize",
    "activation_quantize_reference",
    "dequantize",
    "dequantize_reference",
    "lowerings",
    "norm_quantize",
    "norm_quantize_reference",
    "quantize",
    "quantize_reference",
    "quantize_weight",
    "quantize_weight_reference",
]
