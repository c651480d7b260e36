"""Weight-only GEMM in Triton: float activations times a quantised weight that is decoded once per tile.

For few rows reading the weight is the whole cost, and the tile is 16 rows high; for many the decoding is shared by 128.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the CUDA kernels need triton: pip install 'ditc[triton]'") from error

from ..formats.triton_decode import decode_tile
from ..hardware import capability
from .triton import load_columns, row_scale_of, store_result, strided_rows, tile_position
from .triton_tiles import tile_for


@triton.jit
def weight_kernel(
    x, w, w_scale, column_scale, bias, out, M, N, K, x_stride, w_stride, w_scale_stride,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of ``out [M, N]``: ``x`` is a float ``[M, K]``, ``w`` the codes ``[N, K]`` (or packed ``[N, K / 2]``).

    ``w_scale`` are bytes of block scales, uint8 ``[N, K / 16 or K / 32]``, ``None`` for "int8" and "fp8";
    ``column_scale`` float32 ``[N]``, ``None`` for the mx formats. Tiles are multiplied in ``DTYPE``.
    """
    PACK: tl.constexpr = 2 if (FORMAT == "nvfp4" or FORMAT == "mxfp4") else 1
    BLOCK: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    row_tile, column_tile = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows_M = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = column_tile.to(tl.int64) * BLOCK_N
    columns_N = first_column + tl.arange(0, BLOCK_N)
    depth_K = tl.arange(0, BLOCK_K)
    x_pointers = x + rows_M[:, None] * x_stride + depth_K[None, :]
    # rows of the weight beyond the end read others again, whose results are not stored; those of x, which may be
    # most of a tile, are not read
    w_rows = w + (columns_N % N) * w_stride
    x_mask = rows_M[:, None] < M
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        start = step * BLOCK_K
        if MASKED:
            x_MK = tl.load(x_pointers + start, mask=x_mask & (depth_K[None, :] < K - start), other=0.0)
        else:
            x_MK = tl.load(x_pointers + start, mask=x_mask, other=0.0)
        w_NK = load_columns(w_rows, step * (BLOCK_K // PACK), K // PACK, BLOCK_K // PACK, MASKED)
        if w_scale is not None:
            w_scale_rows = w_scale + (columns_N % N) * w_scale_stride
            w_scale_NG = load_columns(w_scale_rows, step * (BLOCK_K // BLOCK), K // BLOCK, BLOCK_K // BLOCK, MASKED)
            w_float_NK = decode_tile(w_NK, w_scale_NG, FORMAT, DTYPE)
        else:
            w_float_NK = decode_tile(w_NK, None, FORMAT, DTYPE)
        y_MN = tl.dot(
            x_MK.to(DTYPE), tl.trans(w_float_NK), y_MN, input_precision=PRECISION, out_dtype=tl.float32
        )  # fmt: skip
    store_result(y_MN, None, column_scale, bias, None, None, out, rows_M, first_column, M, N, 1, 0, 0)


def weight_linear_triton(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str) -> Tensor:
    """``x @ w.T + bias``, as :func:`ditc.kernels.linear.weight_linear_reference`.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, on a CUDA device, or on the CPU in Triton's interpreter.
        weight: parts of ``[N, K]``.
        bias: ``[N]``, float, or ``None``.
        format: the weight's format.

    Returns:
        ``[..., N]`` in the type of ``x``, contiguous, summed in float32 and rounded once. Decoded weights are exact in
        the type that tiles are multiplied in (:func:`multiplied_in`), but that bfloat16 turns magnitudes below
        2**-133 into zero.
    """
    leading, N = x.shape[:-1], weight[0].shape[0]
    out = torch.empty((*leading, N), dtype=x.dtype, device=x.device)
    M, K = leading.numel(), x.shape[-1]
    if out.numel() == 0:
        return out
    x_MK, codes = strided_rows(x), strided_rows(weight[0])
    scales = None if format in ("int8", "fp8") else strided_rows(weight[1].view(torch.uint8))
    dtype, precision = multiplied_in(x, format)
    tile = tile_for("weight32" if x.dtype == torch.float32 else "weight", M, capability(x))
    weight_kernel[(tile.programs(M, N),)](
        x_MK, codes, scales, row_scale_of(weight, format), None if bias is None else bias.contiguous(), out, M, N, K,
        x_MK.stride(0), codes.stride(0), 0 if scales is None else scales.stride(0),
        FORMAT=format, DTYPE=dtype, PRECISION=precision,
        **tile.constants(K), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def multiplied_in(x: Tensor, format: str) -> tuple[Any, str]:
    """The type in which tiles of ``x`` and of decoded weights are multiplied, and with what precision.

    ===========  =====================  =============================
    x            int8, fp8, nvfp4       mxfp8, mxfp4
    ===========  =====================  =============================
    float16      float16                TF32: float16 values and the weights' fit, no exponent overflows
    bfloat16     bfloat16               bfloat16
    float32      three TF32 products    three TF32 products
    ===========  =====================  =============================

    In the interpreter bfloat16 products are wrong; float32 holds the same values.
    """
    if x.dtype == torch.float32:
        return tl.float32, "tf32x3"
    if x.dtype == torch.bfloat16:
        return (tl.float32 if x.is_cpu else tl.bfloat16), "tf32"
    return (tl.float32 if format in ("mxfp8", "mxfp4") else tl.float16), "tf32"
