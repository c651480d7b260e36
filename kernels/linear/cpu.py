"""Linear ops on CPU, eagerly: oneDNN's integer GEMM for INT8, and float32 on dequantised operands for the rest.

CPUs have no units for the other formats: there they save memory and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import format_of
from .lowering import int8_linear, int8_weight_linear
from .op import check_quantized_linear, check_weight_linear, epilogue, quantized_linear, weight_linear


@quantized_linear.register_kernel("cpu")
def quantized_linear_cpu(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """As :func:`ditc.kernels.linear.quantized_linear_reference`: the same integers for INT8, float32 sums else."""
    if format == "int8":
        y: Tensor = int8_linear(x, weight, bias, gate, residual, format, out_dtype)
        return y.contiguous()
    check_quantized_linear(x, weight, bias, gate, residual, format, out_dtype)
    found = format_of(format)
    y = found.dequantize(list(x)) @ found.dequantize(list(weight)).t()
    return epilogue(y, bias, gate, residual, out_dtype).contiguous()


@weight_linear.register_kernel("cpu")
def weight_linear_cpu(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str) -> Tensor:
    """As :func:`ditc.kernels.linear.weight_linear_reference`, summed in float32."""
    if format == "int8":
        y: Tensor = int8_weight_linear(x, weight, bias, format)
        return y.contiguous()
    check_weight_linear(x, weight, bias, format)
    y = x.to(torch.float32) @ format_of(format).dequantize(list(weight)).t()
    return epilogue(y, bias, None, None, x.dtype).contiguous()
