"""Linear ops on CUDA: which implementation runs where. Importing this module registers them.

Triton is imported when a call needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..formats import format_of
from ..hardware import ADA, AMPERE, BLACKWELL, NVFP4_TRITON, installed_triton
from .op import (
    check_quantized_linear,
    check_weight_linear,
    epilogue,
    quantized_linear,
    quantized_linear_reference,
    weight_linear,
)

Implementation = Literal["int_mm", "scaled_mm", "native", "triton", "dequantize"]


def implementation(
    format: str,
    M: int,
    N: int,
    K: int,
    capability: tuple[int, int],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    triton_version: tuple[int, int] = NVFP4_TRITON,
) -> Implementation:
    """How ``[M, K] x [N, K]``, both quantised to ``format``, are multiplied on a device of ``capability``.

    ============  ===================  ====================  ====================  ============
    format        sm_100 and later     sm_89, sm_90          sm_80, sm_86          before
    ============  ===================  ====================  ====================  ============
    int8          int_mm, triton (1)   int_mm, triton (1)    int_mm, triton (1)    dequantize
    fp8           scaled_mm, triton    scaled_mm, triton     dequantize            dequantize
                  (2)                  (2)
    mxfp8         native               triton                dequantize            dequantize
    mxfp4         native               triton                triton                dequantize
    nvfp4         native, triton (3)   triton                triton                dequantize
    ============  ===================  ====================  ====================  ============

    - ``int_mm``: ``torch._int_mm``, then one Triton kernel for the rest.
      (1) Where M > 16, and K and N are multiples of 8.
    - ``scaled_mm``: ``torch._scaled_mm`` with row-wise scales, whose result is bfloat16, then one Triton kernel.
      (2) Where K and N are positive multiples of 16 and the result is bfloat16; else the Triton GEMM rounds once.
    - ``native``: Triton, tiles multiplied with their block scales by the tensor cores. (3) From Triton 3.8 on.
    - ``triton``: Triton, int8 and fp8 codes multiplied as they are, block formats decoded tile by tile.
    - ``dequantize``: torch's matmul on float32 matrices (on float64 ones for int8, whose sums are exact), where the
      hardware has no such numbers.
    """
    if capability < AMPERE or (capability < ADA and format in ("fp8", "mxfp8")):
        return "dequantize"
    if format == "int8":
        return "int_mm" if M > 16 and K > 0 and K % 8 == 0 and N % 8 == 0 else "triton"
    if format == "fp8":
        aligned = K > 0 and K % 16 == 0 and N % 16 == 0
        return "scaled_mm" if aligned and out_dtype == torch.bfloat16 else "triton"
    if capability >= BLACKWELL and (format != "nvfp4" or triton_version >= NVFP4_TRITON):
        return "native"
    return "triton"


def weight_implementation(format: str, capability: tuple[int, int]) -> Implementation:
    """How a float matrix is multiplied by a weight quantised to ``format``: by Triton, unless the device has no
    bfloat16 (before sm_80) or no FP8 conversions (before sm_89).
    """
    if capability < AMPERE or (capability < ADA and format in ("fp8", "mxfp8")):
        return "dequantize"
    return "triton"


@quantized_linear.register_kernel("cuda")
def quantized_linear_cuda(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """As :func:`ditc.kernels.linear.quantized_linear_reference`, by the :func:`implementation` for the device.

    Raises:
        ImportError: Triton is wanted and missing.
    """
    check_quantized_linear(x, weight, bias, gate, residual, format, out_dtype)
    capability = torch.cuda.get_device_capability(x[0].device)
    N, K = weight[0].shape[0], weight[0].shape[1] * (2 if format in ("nvfp4", "mxfp4") else 1)
    M = x[0].shape[:-1].numel()
    version = installed_triton() if format == "nvfp4" and capability >= BLACKWELL else NVFP4_TRITON
    chosen = implementation(format, M, N, K, capability, out_dtype=out_dtype, triton_version=version)
    with torch.cuda.device(x[0].device):  # Triton launches on the current one
        return run(chosen, x, weight, bias, gate, residual, format, out_dtype)


def run(
    chosen: Implementation,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """:func:`quantized_linear_cuda` by a ``chosen`` implementation, for operands that fit together."""
    if chosen == "dequantize":
        if format == "int8":
            return quantized_linear_reference(x, weight, bias, gate, residual, format, out_dtype)
        found = format_of(format)
        y = found.dequantize(list(x)) @ found.dequantize(list(weight)).t()
        return epilogue(y, bias, gate, residual, out_dtype).contiguous()
    from .triton import epilogue_triton, quantized_linear_triton, row_scale_of, strided_rows

    if chosen in ("native", "triton"):
        native = chosen == "native"
        return quantized_linear_triton(x, weight, bias, gate, residual, format, out_dtype, native=native)
    x_MK, w_KN = strided_rows(x[0]), weight[0].contiguous().t()
    shape = (*x[0].shape[:-1], weight[0].shape[0])
    if chosen == "int_mm":
        sums = torch._int_mm(x_MK.contiguous(), w_KN).reshape(shape)
        scales = row_scale_of(x, format), row_scale_of(weight, format)
        return epilogue_triton(sums, *scales, bias, gate, residual, out_dtype)
    x_scale, w_scale = x[1].reshape(-1, 1).contiguous(), weight[1].reshape(1, -1).contiguous()
    y = torch._scaled_mm(
        x_MK.contiguous(), w_KN, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=False
    ).reshape(shape)
    if bias is None and gate is None and residual is None:
        return y.to(out_dtype)
    return epilogue_triton(y, None, None, bias, gate, residual, out_dtype)


@weight_linear.register_kernel("cuda")
def weight_linear_cuda(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str) -> Tensor:
    """As :func:`ditc.kernels.linear.weight_linear_reference`, by the :func:`weight_implementation` for the device.

    Raises:
        ImportError: Triton is wanted and missing.
    """
    check_weight_linear(x, weight, bias, format)
    if weight_implementation(format, torch.cuda.get_device_capability(x.device)) == "dequantize":
        y = x.to(torch.float32) @ format_of(format).dequantize(list(weight)).t()
        return epilogue(y, bias, None, None, x.dtype).contiguous()
    from .triton_weight import weight_linear_triton

    with torch.cuda.device(x.device):
        return weight_linear_triton(x, weight, bias, format)
