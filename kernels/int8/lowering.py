"""What a compiler puts in the place of the INT8 ops: traceable ATen around ``aten._int_mm``.

Every function here decomposes an op into ATen nodes, so that inductor fuses the quantisation into whatever produces
the input and the scales and the bias into whatever reads the output; hidden in a custom op, neither would fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .op import MAX_K, check_int8_linear, check_int8_weight_linear, quantize_rows

_CUDA_MIN_ROWS = 17
# torch._int_mm on CPU trusts the stride of a single row, which may be anything; padding writes a fresh matrix
_CPU_MIN_ROWS = 2
_FEW_ROWS = 4
_CUDA_MULTIPLE = 8


def supported(device: torch.device | str, K: int, N: int) -> str | None:
    """Why a linear layer ``[K] -> [N]`` cannot run on integers on ``device``; ``None`` when it can.

    The number of tokens is no reason: where the GEMM wants at least 17 rows, the lowering pads.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"no integer GEMM for device {kind!r}"
    if K > MAX_K:
        return f"K = {K} is beyond {MAX_K}: an int32 sum of int8 products could overflow"
    if K < 1 or N < 1:
        return f"the weight [{N}, {K}] is empty"
    if kind == "cuda" and (K % _CUDA_MULTIPLE or N % _CUDA_MULTIPLE):
        return f"the CUDA integer GEMM needs K and N divisible by {_CUDA_MULTIPLE}, got K = {K}, N = {N}"
    return None


def quantize_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """Traceable ``ditc::quantize_int8_weight``."""
    q, scale = quantize_rows(w)
    return q, scale.squeeze(-1)


def linear(
    q: Tensor,
    scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    min_rows: int = _CPU_MIN_ROWS,
) -> Tensor:
    """Traceable ``ditc::int8_linear``: an integer GEMM over flattened tokens, then one pointwise epilogue.

    ``min_rows`` is the least number of rows that the device's integer GEMM takes; fewer are padded with zeros.
    """
    check_int8_linear(q, scale, weight_q, weight_scale, bias, out_dtype)
    K, N = q.shape[-1], weight_q.shape[0]
    accumulator = _multiply(q.reshape(scale.numel(), K), weight_q, min_rows)
    y = accumulator.to(torch.float32) * (scale.reshape(-1, 1) * weight_scale)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype).reshape(*q.shape[:-1], N)


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


def weight_linear(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Traceable ``ditc::int8_weight_linear``: for few rows a product and a sum that inductor makes one reading loop of
    (3.7 times as fast as a float32 GEMM for one row, twice for four), beyond that a float GEMM.
    """
    check_int8_weight_linear(x, weight_q, weight_scale, bias)
    K, N = weight_q.shape[1], weight_q.shape[0]
    wide, rows = x.to(torch.float32), x.numel() // max(K, 1)
    if statically_known_true(rows <= _FEW_ROWS):
        y = (wide.unsqueeze(-2) * weight_q.to(torch.float32)).sum(dim=-1) if K else wide.new_zeros((*x.shape[:-1], N))
    else:
        y = wide @ weight_q.to(torch.float32).t()
    y = y * weight_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def lowerings(device: torch.device | str = "cpu") -> dict[OpOverload, Callable[..., Any]]:
    """Decompositions of the INT8 ops for ``device``, to be passed to ``compile_fx(..., decompositions=...)``."""
    min_rows = _CUDA_MIN_ROWS if torch.device(device).type == "cuda" else _CPU_MIN_ROWS
    ops = torch.ops.ditc
    return {
        ops.quantize_int8.default: quantize_rows,
        ops.quantize_int8_weight.default: quantize_weight,
        ops.int8_linear.default: partial(linear, min_rows=min_rows),
        ops.int8_weight_linear.default: weight_linear,
    }
