"""The CUDA implementations of the smoothing ops: Triton kernels, compiled when first called.

Importing this module registers them; Triton itself is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .op import smooth_keys, smooth_queries


@smooth_queries.register_kernel("cuda")
def smooth_queries_cuda(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
) -> list[Tensor]:
    """``ditc::smooth_queries`` on CUDA, see :func:`.triton.smooth_queries_triton`."""
    from .triton import smooth_queries_triton

    return smooth_queries_triton(x, norm, eps, weight, bias, tables, distance)


@smooth_keys.register_kernel("cuda")
def smooth_keys_cuda(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
    means: Tensor,
) -> list[Tensor]:
    """``ditc::smooth_keys`` on CUDA, see :func:`.triton.smooth_keys_triton`."""
    from .triton import smooth_keys_triton

    return smooth_keys_triton(x, norm, eps, weight, bias, tables, distance, means)
