"""What a compiler puts in the place of the quantising ops: traceable ATen, so that inductor fuses it with what is near.

Only INT8 is taken apart: its codes are made by arithmetic that inductor fuses well on every device. The other
formats pack bits and stay calls: of a Triton kernel on CUDA, of the reference on CPU, where they only store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..formats import format_of
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

TRACED = frozenset({"int8"})
"""Formats that are taken apart into ATen."""


_QUANTIZE, _QUANTIZE_WEIGHT, _NORM_QUANTIZE, _ACTIVATION_QUANTIZE, _DEQUANTIZE = (
    opaque(op) for op in (quantize, quantize_weight, norm_quantize, activation_quantize, dequantize)
)


def _quantize(x: Tensor, format: str, static: Tensor | None = None) -> Any:
    return format_of(format).quantize(x, static=static) if format in TRACED else _QUANTIZE(x, format, static)


def _quantize_weight(w: Tensor, format: str) -> Any:
    return format_of(format).quantize(w) if format in TRACED else _QUANTIZE_WEIGHT(w, format)


def _norm_quantize(
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
    if format not in TRACED:
        return _NORM_QUANTIZE(x, norm, eps, weight, bias, multiplier, shift, format, static)
    return _quantize(modulated(normalized(x, norm, eps, weight, bias), multiplier, shift), format, static)


def _activation_quantize(
    x: Tensor, activation: str, multiplier: Tensor | None, format: str, static: Tensor | None = None
) -> Any:
    if format not in TRACED:
        return _ACTIVATION_QUANTIZE(x, activation, multiplier, format, static)
    y = activated(x, activation)
    return _quantize(y if multiplier is None else y * multiplier, format, static)


def _dequantize(parts: list[Tensor], format: str, dtype: torch.dtype) -> Any:
    return format_of(format).dequantize(parts, dtype) if format in TRACED else _DEQUANTIZE(parts, format, dtype)


def lowerings(device: torch.device | str = "cpu") -> dict[OpOverload, Callable[..., Any]]:
    """Decompositions for ``device``, to be passed to ``compile_fx(..., decompositions=...)``."""
    ops = torch.ops.ditc
    return {
        ops.quantize.default: _quantize,
        ops.quantize_weight.default: _quantize_weight,
        ops.norm_quantize.default: _norm_quantize,
        ops.activation_quantize.default: _activation_quantize,
        ops.dequantize.default: _dequantize,
    }
