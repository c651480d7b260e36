"""The CUDA implementations of the quantising ops: Triton kernels, compiled when first called.

Importing this module registers them; Triton itself is imported by the first call.
"""

from __future__ import annotations

from torch import Tensor

from .op import activation_quantize, norm_quantize, quantize


@quantize.register_kernel("cuda")
def quantize_cuda(x: Tensor, format: str, static: Tensor | None = None) -> list[Tensor]:
    """``ditc::quantize`` on CUDA, see :func:`.triton.quantize_triton`."""
    from .triton import quantize_triton

    return quantize_triton(x, format, static)


@norm_quantize.register_kernel("cuda")
def norm_quantize_cuda(
    x: Tensor,
    norm: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
    shift: Tensor | None,
    format: str,
    static: Tensor | None = None,
) -> list[Tensor]:
    """``ditc::norm_quantize`` on CUDA, see :func:`.triton.norm_quantize_triton`."""
    from .triton import norm_quantize_triton

    return norm_quantize_triton(x, norm, eps, weight, bias, multiplier, shift, format, static)


@activation_quantize.register_kernel("cuda")
def activation_quantize_cuda(
    x: Tensor, activation: str, multiplier: Tensor | None, format: str, static: Tensor | None = None
) -> list[Tensor]:
    """``ditc::activation_quantize`` on CUDA, see :func:`.triton.activation_quantize_triton`."""
    from .triton import activation_quantize_triton

    return activation_quantize_triton(x, activation, multiplier, format, static)
