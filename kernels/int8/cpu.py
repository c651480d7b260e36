"""INT8 ops on CPU, eagerly: oneDNN's integer GEMM instead of the reference's float64 one."""

from __future__ import annotations

import torch
from torch import Tensor

from .lowering import linear, weight_linear
from .op import int8_linear, int8_weight_linear


@int8_linear.register_kernel("cpu")
def int8_linear_cpu(
    q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As :func:`ditc.kernels.int8.int8_linear_reference`, with the same integers and the same rounding."""
    return linear(q, scale, weight_q, weight_scale, bias, out_dtype).contiguous()


@int8_weight_linear.register_kernel("cpu")
def int8_weight_linear_cpu(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`ditc.kernels.int8.int8_weight_linear_reference`, summed in float32."""
    return weight_linear(x, weight_q, weight_scale, bias).contiguous()
