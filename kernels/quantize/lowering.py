"""What a compiler puts in the place of the quantising ops: traceable ATen, so that inductor fuses it with what is near.

INT8 is taken apart on every device: its codes are made by arithmetic that inductor fuses well. FP8 is taken apart on
CUDA devices that convert to it in hardware (sm_89 and later), where inductor's Triton does the rounding with one
instruction. Everything else packs bits, or is only stored, and stays a call: of a Triton kernel on CUDA, of the
reference on CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..formats import format_of
from ..hardware import ADA
from ..opaque import opaque
from .op import (
    activated,
    activation_quantize,
    dequantize,
    modulated,
    norm_quantize,
    normalized,
    quantize,
    quantize_weight,
)

_QUANTIZE, _QUANTIZE_WEIGHT, _NORM_QUANTIZE, _ACTIVATION_QUANTIZE, _DEQUANTIZE = (
    opaque(op) for op in (quantize, quantize_weight, norm_quantize, activation_quantize, dequantize)
)


def traced(device: torch.device | str) -> frozenset[str]:
    """The formats that are taken apart into ATen on ``device``; with CUDA, that device or the current one."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return frozenset({"int8"})
    fp8 = torch.cuda.get_device_capability(device) >= ADA
    return frozenset({"int8", "fp8"} if fp8 else {"int8"})


@dataclass(frozen=True)
class _Lowering:
    """The ops' decompositions, where :func:`traced` formats are ``traced``."""

    traced: frozenset[str]

    def quantize(self, x: Tensor, format: str, static: Tensor | None = None) -> Any:
        if format not in self.traced:
            return _QUANTIZE(x, format, static)
        return format_of(format).quantize(x, static=static)

    def quantize_weight(self, w: Tensor, format: str) -> Any:
        return format_of(format).quantize(w) if format in self.traced else _QUANTIZE_WEIGHT(w, format)

    def norm_quantize(
        self,
        x: Tensor,
        norm: str,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        multiplier: Tensor | None,
        shift: Tensor | None,
        format: str,
        static: Tensor | None = None,
    ) -> Any:
        if format not in self.traced:
            return _NORM_QUANTIZE(x, norm, eps, weight, bias, multiplier, shift, format, static)
        return self.quantize(modulated(normalized(x, norm, eps, weight, bias), multiplier, shift), format, static)

    def activation_quantize(
        self, x: Tensor, activation: str, multiplier: Tensor | None, format: str, static: Tensor | None = None
    ) -> Any:
        if format not in self.traced:
            return _ACTIVATION_QUANTIZE(x, activation, multiplier, format, static)
        y = activated(x, activation)
        return self.quantize(y if multiplier is None else y * multiplier, format, static)

    def dequantize(self, parts: list[Tensor], format: str, dtype: torch.dtype) -> Any:
        if format not in self.traced:
            return _DEQUANTIZE(parts, format, dtype)
        return format_of(format).dequantize(parts, dtype)


def lowerings(device: torch.device | str = "cpu") -> dict[OpOverload, Callable[..., Any]]:
    """Decompositions for ``device``, to be passed to ``compile_fx(..., decompositions=...)``."""
    return _decompositions(traced(device))


def _decompositions(traced: frozenset[str]) -> dict[OpOverload, Callable[..., Any]]:
    ops, lowering = torch.ops.ditc, _Lowering(traced)
    return {
        ops.quantize.default: lowering.quantize,
        ops.quantize_weight.default: lowering.quantize_weight,
        ops.norm_quantize.default: lowering.norm_quantize,
        ops.activation_quantize.default: lowering.activation_quantize,
        ops.dequantize.default: lowering.dequantize,
    }
