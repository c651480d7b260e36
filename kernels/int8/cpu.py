"""INT8 ops on CPU, eagerly: oneDNN's integer GEMM instead of the reference's float64 one."""

from __future__ import annotations

import torch
from torch import Tensor

from .lowering import linear
from .op import check_int8_linear, int8_linear


@int8_linear.register_kernel("cpu")
def int8_linear_cpu(
    q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As :func:`ditc.kernels.int8.int8_linear_reference`, with the same integers and the same rounding."""
    check_int8_linear(q, scale, weight_q, weight_scale, bias, out_dtype)
    if q.numel() == 0 or weight_q.numel() == 0:
        empty = scale.new_zeros((*q.shape[:-1], weight_q.shape[0]))
        return (empty if bias is None else empty + bias.to(torch.float32)).to(out_dtype)
    return linear(q, scale, weight_q, weight_scale, bias, out_dtype).contiguous()
