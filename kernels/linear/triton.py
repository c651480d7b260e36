"""Scaled GEMM in Triton: both operands quantised, scales and what follows the layer in the epilogue.

Two kernels. ``row_scaled_kernel`` multiplies int8 or fp8 codes on the tensor cores and scales the sums.
``block_scaled_kernel`` takes the formats whose scales vary along K: natively (``tl.dot_scaled``, Blackwell), or by
decoding each tile and multiplying floats. Both read tiles in the linear layout of the formats, mask what lies beyond
M, N and K, and compute addresses in 64 bits.
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
from .triton_tiles import Kind, tile_for


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Which tile this program computes. ``GROUP`` rows of tiles are walked together, so that those which run at the
    same time share weights in the L2 cache."""
    program = tl.program_id(0)
    width = GROUP * tl.cdiv(N, BLOCK_N)
    first = program // width * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    return first + program % width % height, program % width // height


@triton.jit
def store_result(
    y_MN, row_scale, column_scale, bias, gate, residual, out, rows_M, first_column, M, N,
    gate_rows, gate_stride, residual_stride,
):  # fmt: skip
    """``residual + gate * (y * row_scale * column_scale + bias)`` in float32, rounded once; any of them ``None``.

    A wide tile is stored in parts, since with its gate and residual it would not fit into registers.
    """
    left, right = halves(y_MN)
    parts = halves(left) + halves(right)
    for i in tl.static_range(4):
        store_columns(
            parts[i], row_scale, column_scale, bias, gate, residual, out, rows_M,
            first_column + i * (y_MN.shape[1] // 4), M, N, gate_rows, gate_stride, residual_stride,
        )  # fmt: skip


@triton.jit
def halves(y_MN):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = y_MN.shape[0]
    N: tl.constexpr = y_MN.shape[1]
    return tl.split(tl.permute(tl.reshape(y_MN, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def store_columns(
    y_MN, row_scale, column_scale, bias, gate, residual, out, rows_M, first_column, M, N,
    gate_rows, gate_stride, residual_stride,
):  # fmt: skip
    """As :func:`store_result`, for columns from ``first_column`` on."""
    y_MN = y_MN.to(tl.float32)
    columns_N = first_column + tl.arange(0, y_MN.shape[1])
    row_mask, column_mask = rows_M < M, columns_N < N
    mask = row_mask[:, None] & column_mask[None, :]
    if column_scale is not None:
        scale_N = tl.load(column_scale + columns_N, mask=column_mask, other=0.0)
        if row_scale is not None:
            scale_M = tl.load(row_scale + rows_M, mask=row_mask, other=0.0)
            y_MN = y_MN * (scale_M[:, None] * scale_N[None, :])
        else:
            y_MN = y_MN * scale_N[None, :]
    if bias is not None:
        y_MN += tl.load(bias + columns_N, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        gates = gate + (rows_M // gate_rows)[:, None] * gate_stride + columns_N[None, :]
        y_MN *= tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        residuals = residual + rows_M[:, None] * residual_stride + columns_N[None, :]
        y_MN += tl.load(residuals, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows_M[:, None] * N + columns_N[None, :], y_MN.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(rows, start, end, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """``[R, SIZE]`` from column ``start`` on, where ``rows`` points at the first column; beyond ``end`` come zeros."""
    columns = start + tl.arange(0, SIZE)
    # no early return: Triton would compile what follows it
    if MASKED:
        tile = tl.load(rows[:, None] + columns[None, :], mask=columns[None, :] < end, other=0.0)
    else:
        tile = tl.load(rows[:, None] + columns[None, :])
    return tile


@triton.jit
def row_scaled_kernel(
    x, w, row_scale, column_scale, bias, gate, residual, out, M, N, K, x_stride, w_stride,
    gate_rows, gate_stride, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of ``out [M, N]``; ``x [M, K]`` and ``w [N, K]`` are int8 or float8e4nv, scales float32."""
    row_tile, column_tile = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows_M = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = column_tile.to(tl.int64) * BLOCK_N
    columns_N = first_column + tl.arange(0, BLOCK_N)
    # rows beyond the end read others again, whose results are not stored
    x_rows = x + (rows_M % M) * x_stride
    w_rows = w + (columns_N % N) * w_stride
    INTEGER: tl.constexpr = x.dtype.element_ty == tl.int8
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, BLOCK_K):
        x_MK = load_columns(x_rows, start, K, BLOCK_K, MASKED)
        w_NK = load_columns(w_rows, start, K, BLOCK_K, MASKED)
        if INTEGER:
            y_MN = tl.dot(x_MK, tl.trans(w_NK), y_MN, out_dtype=tl.int32)
        else:
            # Hopper's FP8 units sum with 14 bits: leave them after each tile
            y_MN = tl.dot(x_MK, tl.trans(w_NK), y_MN, max_num_imprecise_acc=BLOCK_K, out_dtype=tl.float32)
    store_result(
        y_MN, row_scale, column_scale, bias, gate, residual, out, rows_M, first_column, M, N,
        gate_rows, gate_stride, residual_stride,
    )  # fmt: skip


@triton.jit
def block_scaled_kernel(
    x, w, x_scale, w_scale, row_scale, column_scale, bias, gate, residual, out, M, N, K,
    x_stride, w_stride, x_scale_stride, w_scale_stride, gate_rows, gate_stride, residual_stride,
    FORMAT: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of ``out [M, N]`` from block-scaled operands.

    ``x`` and ``w`` are packed E2M1 uint8 ``[rows, K / 2]`` ("nvfp4", "mxfp4") or float8e4nv ``[rows, K]`` ("mxfp8").
    Block scales are bytes, uint8 ``[rows, K / 16 or K / 32]``. ``row_scale`` and ``column_scale`` are NVFP4's outer
    scales. ``DTYPE`` is what decoded tiles are multiplied in, unless ``NATIVE``.
    """
    PACK: tl.constexpr = 1 if FORMAT == "mxfp8" else 2
    BLOCK: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    ELEMENT: tl.constexpr = "e4m3" if FORMAT == "mxfp8" else "e2m1"
    row_tile, column_tile = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows_M = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = column_tile.to(tl.int64) * BLOCK_N
    columns_N = first_column + tl.arange(0, BLOCK_N)
    # rows beyond the end read others again, whose results are not stored
    x_rows = x + (rows_M % M) * x_stride
    w_rows = w + (columns_N % N) * w_stride
    x_scale_rows = x_scale + (rows_M % M) * x_scale_stride
    w_scale_rows = w_scale + (columns_N % N) * w_scale_stride
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        codes, blocks = step * (BLOCK_K // PACK), step * (BLOCK_K // BLOCK)
        x_MK = load_columns(x_rows, codes, K // PACK, BLOCK_K // PACK, MASKED)
        w_NK = load_columns(w_rows, codes, K // PACK, BLOCK_K // PACK, MASKED)
        x_scale_MG = load_columns(x_scale_rows, blocks, K // BLOCK, BLOCK_K // BLOCK, MASKED)
        w_scale_NG = load_columns(w_scale_rows, blocks, K // BLOCK, BLOCK_K // BLOCK, MASKED)
        if NATIVE:
            if FORMAT == "nvfp4":
                x_scale_MG = x_scale_MG.to(tl.float8e4nv, bitcast=True)
                w_scale_NG = w_scale_NG.to(tl.float8e4nv, bitcast=True)
            y_MN = tl.dot_scaled(x_MK, x_scale_MG, ELEMENT, tl.trans(w_NK), w_scale_NG, ELEMENT, acc=y_MN)
        else:
            x_float_MK = decode_tile(x_MK, x_scale_MG, FORMAT, DTYPE)
            w_float_NK = decode_tile(w_NK, w_scale_NG, FORMAT, DTYPE)
            y_MN = tl.dot(x_float_MK, tl.trans(w_float_NK), y_MN, out_dtype=tl.float32)
    store_result(
        y_MN, row_scale, column_scale, bias, gate, residual, out, rows_M, first_column, M, N,
        gate_rows, gate_stride, residual_stride,
    )  # fmt: skip


@triton.jit
def epilogue_kernel(
    y, row_scale, column_scale, bias, gate, residual, out, M, N, gate_rows, gate_stride, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the GEMMs above do at their end, for a contiguous ``y [M, N]`` (int32 or float) that is there already."""
    columns = tl.cdiv(N, BLOCK_N)
    rows_M = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = (tl.program_id(0) % columns).to(tl.int64) * BLOCK_N
    columns_N = first_column + tl.arange(0, BLOCK_N)
    mask = (rows_M < M)[:, None] & (columns_N < N)[None, :]
    y_MN = tl.load(y + rows_M[:, None] * N + columns_N[None, :], mask=mask, other=0.0)
    store_columns(
        y_MN, row_scale, column_scale, bias, gate, residual, out, rows_M, first_column, M, N,
        gate_rows, gate_stride, residual_stride,
    )  # fmt: skip


def quantized_linear_triton(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
    native: bool = False,
) -> Tensor:
    """``residual + gate * (x @ w.T + bias)``, as :func:`ditc.kernels.linear.quantized_linear_reference`.

    Args:
        x: parts of ``[..., K]``, on a CUDA device, or on the CPU in Triton's interpreter.
        weight: parts of ``[N, K]``, of the same format.
        bias: ``[N]``, float, or ``None``.
        gate: float, broadcasting against ``[..., N]``, or ``None``.
        residual: float ``[..., N]``, or ``None``.
        format: a name of ``ditc.kernels.formats``.
        out_dtype: float32, float16 or bfloat16.
        native: multiply mx and nvfp4 tiles by the tensor core's block scaling (sm_100, sm_120; NVFP4 from Triton
            3.8) rather than decode them. int8 and fp8 are always multiplied as they are.

    Returns:
        ``[..., N]`` contiguous. INT8 sums are exact. The others are summed in float32: NVFP4's decoded values are
        exact in float16, those of the mx formats in bfloat16 (but that magnitudes below 2**-133 become zero there).
        Products of two row scales are assumed to be normal float32 numbers.
    """
    leading, N = x[0].shape[:-1], weight[0].shape[0]
    out = torch.empty((*leading, N), dtype=out_dtype, device=x[0].device)
    if out.numel() == 0:
        return out
    M, K = leading.numel(), weight[0].shape[1] * (2 if format in ("nvfp4", "mxfp4") else 1)
    if format in ("int8", "fp8"):
        kernel = row_scaled_kernel
        scales, options = [], {}
    else:
        kernel = block_scaled_kernel
        scales = [strided_rows(part.view(torch.uint8)) for part in (x[1], weight[1])]
        options = {"FORMAT": format, "NATIVE": native, "DTYPE": _multiplied_in(format, out)}
    operands = [strided_rows(x[0]), strided_rows(weight[0]), *scales]
    tensors, strides = _epilogue(row_scale_of(x, format), row_scale_of(weight, format), bias, gate, residual, out)
    tile = tile_for(_kind(format, native), M, capability(out))
    kernel[(tile.programs(M, N),)](
        *operands, *tensors, M, N, K, *(operand.stride(0) for operand in operands), *strides,
        **options, **tile.constants(K), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def epilogue_triton(
    y: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``residual + gate * (y * row_scale * column_scale + bias)``, in float32, rounded once to ``out_dtype``.

    Args:
        y: ``[..., N]``, int32 or float, contiguous.
        row_scale: float32 of one value a row, contiguous, or ``None``; with it comes a ``column_scale``.
        column_scale: float32 of ``N`` values, contiguous, or ``None``.
        bias: ``[N]``, float, or ``None``.
        gate: float, broadcasting against ``y``, or ``None``.
        residual: float, like ``y``, or ``None``.
    """
    out = torch.empty_like(y, dtype=out_dtype)
    if out.numel() == 0:
        return out
    M, N = y.shape[:-1].numel(), y.shape[-1]
    tensors, strides = _epilogue(row_scale, column_scale, bias, gate, residual, out)
    BLOCK_M, BLOCK_N = 16, 128
    grid = (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)
    epilogue_kernel[grid](y, *tensors, M, N, *strides, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return out


def _epilogue(
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Arguments that end all kernels: pointers up to ``out``, then ``gate_rows, gate_stride, residual_stride``."""
    gate_RN, gate_rows = gate_by_rows(gate, out.shape[:-1], out.shape[-1])
    residual_MN = None if residual is None else strided_rows(residual)
    bias_N = None if bias is None else bias.contiguous()
    strides = (0 if gate_RN is None else gate_RN.stride(0), 0 if residual_MN is None else residual_MN.stride(0))
    return (row_scale, column_scale, bias_N, gate_RN, residual_MN, out), (gate_rows, *strides)


def row_scale_of(parts: Sequence[Tensor], format: str) -> Tensor | None:
    """The float32 scale of each row, contiguous; ``None`` for the mx formats, which have none."""
    if format in ("mxfp8", "mxfp4"):
        return None
    return parts[-1].reshape(-1).contiguous()


def _kind(format: str, native: bool) -> Kind:
    match format:
        case "int8" | "fp8":
            return format
        case _:
            return "native" if native else "blocks"


def _multiplied_in(format: str, out: Tensor) -> Any:
    """The type of decoded tiles. In the interpreter bfloat16 products are wrong; float32 holds the same values."""
    if format == "nvfp4":
        return tl.float16
    return tl.float32 if out.is_cpu else tl.bfloat16


def strided_rows(x: Tensor) -> Tensor:
    """``[..., K]`` as a matrix of rows, of any stride, whose values lie next to each other; copied only if need be."""
    rows_MK = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows_MK if rows_MK.stride(1) == 1 else rows_MK.contiguous()


def gate_by_rows(gate: Tensor | None, leading: torch.Size, N: int) -> tuple[Tensor | None, int]:
    """A gate that broadcasts against ``[*leading, N]`` as a matrix, and how many rows of the result use one of its.

    Gates ``[N]``, ``[B, 1, N]`` against ``[B, T, N]``, and whole ones are read as they are; a gate that repeats along
    an outer dimension is written out.
    """
    if gate is None:
        return None, 1
    shape = (1,) * (len(leading) + 1 - gate.dim()) + tuple(gate.shape)
    own = len(leading)
    while own and shape[own - 1] == 1:
        own -= 1
    rows = gate.reshape(shape).expand(*leading[:own], *shape[own:-1], N)
    return strided_rows(rows), leading[own:].numel()
