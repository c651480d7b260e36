"""What a compiler puts in the place of the quantising ops: traceable ATen, so that inductor fuses it with what is near.

Only INT8 is taken apart: its codes are made by arithmetic that inductor fuses well on every device. The other
formats pack bits and stay calls of an op: a Triton kernel on CUDA, the reference on CPU, where they only store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..formats import format_of
from .op import activated, modulated, normalized

TRACED = frozenset({"int8"})
"""Formats that are taken apart into ATen."""


def _quantize(x: Tensor, format: str, static: Tensor | None = None) -> Any:
    return format_of(format).quantize(x, static=static) if format in TRACED else NotImplemented


def _quantize_weight(w: Tensor, format: str) -> Any:
    return format_of(format).quantize(w) if format in TRACED else NotImplemented


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
        return NotImplemented
    return _quantize(modulated(normalized(x, norm, eps, weight, bias), multiplier, shift), format, static)


def _activation_quantize(
    x: Tensor, activation: str, multiplier: Tensor | None, format: str, static: Tensor | None = None
) -> Any:
    if format not in TRACED:
        return NotImplemented
    y = activated(x, activation)
    return _quantize(y if multiplier is None else y * multiplier, format, static)


def _dequantize(parts: list[Tensor], format: str, dtype: torch.dtype) -> Any:
    return format_of(format).dequantize(parts, dtype) if format in TRACED else NotImplemented


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
