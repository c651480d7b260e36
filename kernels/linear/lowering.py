"""What a compiler puts in the place of the linear ops: traceable ATen around ``aten._int_mm``.

INT8 is decomposed, so that inductor fuses the scales and the bias into whatever reads the output; hidden in an op,
they would not fuse. The other formats stay calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..formats import format_of
from ..opaque import opaque
from .op import (
    INT8_MAX_K,
    check_quantized_linear,
    check_weight_linear,
    epilogue,
    quantized_linear,
    weight_linear,
)

_CUDA_MIN_ROWS = 17
# torch._int_mm on CPU trusts the stride of a single row, which may be anything; padding writes a fresh matrix
_CPU_MIN_ROWS = 2
_FEW_ROWS = 4
_CUDA_MULTIPLE = 8

_QUANTIZED_LINEAR, _WEIGHT_LINEAR = opaque(quantized_linear), opaque(weight_linear)


def supported(device: torch.device | str, format: str, K: int, N: int) -> str | None:
    """Why a linear layer ``[K] -> [N]`` cannot run quantised to ``format`` on ``device``; ``None`` when it can.

    The number of tokens is no reason: where a GEMM wants a least number of rows, the lowering pads.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"no quantised GEMM for device {kind!r}"
    if K < 1 or N < 1:
        return f"the weight [{N}, {K}] is empty"
    reason = format_of(format).unsupported(K)
    if reason is not None:
        return reason
    if format == "int8" and K > INT8_MAX_K:
        return f"K = {K} is beyond {INT8_MAX_K}: an int32 sum of int8 products could overflow"
    if format == "int8" and kind == "cuda" and (K % _CUDA_MULTIPLE or N % _CUDA_MULTIPLE):
        return f"the CUDA integer GEMM needs K and N divisible by {_CUDA_MULTIPLE}, got K = {K}, N = {N}"
    return None


def int8_linear(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
    *,
    min_rows: int = _CPU_MIN_ROWS,
) -> Any:
    """Traceable ``ditc::quantized_linear``: an integer GEMM over flattened tokens, then one pointwise epilogue.

    ``min_rows`` is the least number of rows that the device's integer GEMM takes; fewer are padded with zeros.
    """
    if format != "int8":
        return _QUANTIZED_LINEAR(x, weight, bias, gate, residual, format, out_dtype)
    check_quantized_linear(x, weight, bias, gate, residual, format, out_dtype)
    (q, scale), (weight_q, weight_scale) = x, weight
    K, N = q.shape[-1], weight_q.shape[0]
    accumulator = _multiply(q.reshape(scale.numel(), K), weight_q, min_rows)
    y = accumulator.to(torch.float32) * (scale.reshape(-1, 1) * weight_scale.reshape(1, -1))
    return epilogue(y.reshape(*q.shape[:-1], N), bias, gate, residual, out_dtype)


def _multiply(rows: Tensor, weight_q: Tensor, min_rows: int) -> Tensor:
    """``rows [M, K] @ weight_q.T [K, N]`` in int32."""
    M, (N, K) = rows.shape[0], weight_q.shape
    if K == 0 or N == 0:
        return rows.new_zeros((M, N), dtype=torch.int32)
    if K == 1:  # torch._int_mm takes a matrix [1, N] whose strides are (1, 1) for another one
        return rows.to(torch.int32) * weight_q.t().to(torch.int32)
    if N == 1:
        return (rows.to(torch.int32) * weight_q.to(torch.int32)).sum(-1, keepdim=True, dtype=torch.int32)
    if statically_known_true(min_rows <= M):
        return torch._int_mm(rows, weight_q.t())
    missing = torch.sym_max(min_rows - M, 0)  # type: ignore[no-untyped-call]
    return torch._int_mm(torch.constant_pad_nd(rows, (0, 0, 0, missing)), weight_q.t())[:M]


def int8_weight_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str) -> Any:
    """Traceable ``ditc::weight_linear``: for few rows a product and a sum that inductor makes one reading loop of
    (3.7 times as fast as a float32 GEMM for one row, twice for four), beyond that a float GEMM.
    """
    if format != "int8":
        return _WEIGHT_LINEAR(x, weight, bias, format)
    check_weight_linear(x, weight, bias, format)
    weight_q, weight_scale = weight
    K, N = weight_q.shape[1], weight_q.shape[0]
    wide, rows = x.to(torch.float32), x.numel() // max(K, 1)
    if statically_known_true(rows <= _FEW_ROWS):
        y = (wide.unsqueeze(-2) * weight_q.to(torch.float32)).sum(dim=-1) if K else wide.new_zeros((*x.shape[:-1], N))
    else:
        y = wide @ weight_q.to(torch.float32).t()
    return epilogue(y * weight_scale.reshape(-1), bias, None, None, x.dtype)


def lowerings(device: torch.device | str = "cpu") -> dict[OpOverload, Callable[..., Any]]:
    """Decompositions for ``device``, to be passed to ``compile_fx(..., decompositions=...)``."""
    min_rows = _CUDA_MIN_ROWS if torch.device(device).type == "cuda" else _CPU_MIN_ROWS
    ops = torch.ops.ditc
    return {
        ops.quantized_linear.default: partial(int8_linear, min_rows=min_rows),
        ops.weight_linear.default: int8_weight_linear,
    }
