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

from .op import MAX_K, check_int8_linear, quantize_rows

_CUDA_MIN_ROWS = 17
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
    min_rows: int = 1,
) -> Tensor:
    """Traceable ``ditc::int8_linear``: ``aten._int_mm`` over flattened tokens, then one pointwise epilogue.

    ``min_rows`` is the least number of rows that the device's integer GEMM takes; fewer are padded with zeros.
    """
    check_int8_linear(q, scale, weight_q, weight_scale, bias, out_dtype)
    K, N = q.shape[-1], weight_q.shape[0]
    rows = q.reshape(-1, K)
    M = rows.shape[0]
    padding = torch.sym_max(min_rows - M, 0)  # type: ignore[no-untyped-call]
    if isinstance(padding, int) and padding == 0:
        accumulator = torch._int_mm(rows, weight_q.t())
    else:
        accumulator = torch._int_mm(torch.constant_pad_nd(rows, (0, 0, 0, padding)), weight_q.t())[:M]
    y = accumulator.to(torch.float32) * (scale.reshape(-1, 1) * weight_scale)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype).reshape(*q.shape[:-1], N)


def lowerings(device: torch.device | str = "cpu") -> dict[OpOverload, Callable[..., Any]]:
    """Decompositions of the INT8 ops for ``device``, to be passed to ``compile_fx(..., decompositions=...)``."""
    min_rows = _CUDA_MIN_ROWS if torch.device(device).type == "cuda" else 1
    ops = torch.ops.ditc
    return {
        ops.quantize_int8.default: quantize_rows,
        ops.quantize_int8_weight.default: quantize_weight,
        ops.int8_linear.default: partial(linear, min_rows=min_rows),
    }
