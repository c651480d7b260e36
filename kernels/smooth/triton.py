"""Launching the smoothing kernels: from tensors of any strides to the parts of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.recipe import QUERIES
from .op import MAX_HEAD, check_means, check_smooth, empty_parts
from .triton_kernel import smooth_keys_kernel, smooth_queries_kernel, sum_keys_kernel

PARTS = 32
"""The most sums that the mean of a head's keys is made of."""


def smooth_queries_triton(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
) -> list[Tensor]:
    """As :func:`.op.smooth_queries_reference`, in one kernel; sums are taken in another order.

    Raises:
        TypeError, ValueError: as the reference; heads above :data:`MAX_HEAD`.
    """
    B, H, L, D = check_smooth(x, norm, weight, bias, tables, distance)
    parts = empty_parts(x[0], B, H, L, D)
    count = -(-L // QUERIES)
    means = x[0].new_empty((B, H, count, D), dtype=torch.float32)
    if not means.numel():
        return [*parts, means]
    tensors, numbers, constants = _tokens(x, norm, eps, weight, bias, tables, distance)
    with torch.cuda.device_of(x[0]):  # type: ignore[no-untyped-call]
        smooth_queries_kernel[(B * H * count,)](
            *tensors, *_bytes(parts), means, *numbers, **constants, **tile_for(D, products=False)
        )
    return [*parts, means]


def smooth_keys_triton(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
    means: Tensor,
) -> list[Tensor]:
    """As :func:`.op.smooth_keys_reference`, in two kernels; sums are taken in another order.

    Raises:
        TypeError, ValueError: as the reference; heads above :data:`MAX_HEAD`.
    """
    B, H, L, D = check_smooth(x, norm, weight, bias, tables, distance)
    check_means(means, B, H, D)
    parts = empty_parts(x[0], B, H, L, D)
    n = means.shape[2]
    product = means.new_empty((B, means.shape[1], n, L))
    if not B * H * L:
        return [*parts, product]
    tensors, numbers, constants = _tokens(x, norm, eps, weight, bias, tables, distance)
    sums_tile, tile = tile_for(D, products=False), tile_for(D, products=True)
    span = sums_tile["ROWS"] * -(-L // (sums_tile["ROWS"] * PARTS))
    count = -(-L // span)
    sums = means.new_empty((B, H, count, D))
    with torch.cuda.device_of(x[0]):  # type: ignore[no-untyped-call]
        sum_keys_kernel[(B * H * count,)](*tensors, sums, *numbers, span, count, **constants, **sums_tile)
        smooth_keys_kernel[(B * H * -(-L // tile["ROWS"]),)](
            *tensors, sums, means.contiguous(), *_bytes(parts), product, *numbers, count, n,
            GROUP=means.shape[1] // H, PARTS=PARTS, **constants, **tile,
        )  # fmt: skip
    return [*parts, product]


def tile_for(D: int, *, products: bool) -> dict[str, int]:
    """Tokens of a tile and warps, as launch options: chosen by what compiles without spills, not tuned by measurement.

    ``products`` is the kernel that multiplies keys with the queries' means.

    Raises:
        ValueError: heads above :data:`MAX_HEAD`.
    """
    if D > MAX_HEAD:
        raise ValueError(f"heads of {D} features, the kernel takes {MAX_HEAD}")
    if D > 128:
        return {"ROWS": 32, "num_warps": 8} if products else {"ROWS": 16, "num_warps": 4}
    if D > 64:
        return {"ROWS": 32, "num_warps": 8}
    return {"ROWS": 64, "num_warps": 8} if products else {"ROWS": 32, "num_warps": 4}


def block_of(D: int) -> int:
    """The power of two that holds a head's features, and what a product of matrices needs at least."""
    return max(16, 1 << (D - 1).bit_length())


def _tokens(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
) -> tuple[list[Tensor | None], list[Any], dict[str, Any]]:
    """What all kernels take: tensors, numbers, and constants by name."""
    # that of a single feature is any
    columns = {1 if piece.shape[3] == 1 else piece.stride(3) for piece in x}
    pieces = [*(x if len(columns) == 1 else (piece.contiguous() for piece in x)), None][:2]
    vectors = [vector for own in (weight, bias) for vector in (*(v.contiguous() for v in own), None, None)[:2]]
    first, second = (table.contiguous() for table in tables) if tables else (None, None)
    _, H, L_x, D = x[0].shape
    strides = [stride for piece in pieces for stride in ((0,) * 3 if piece is None else piece.stride()[:3])]
    table_strides = (0, 0) if first is None else [0 if first.shape[i] == 1 else first.stride(i) for i in range(2)]
    numbers = [
        H,
        L_x,
        sum(piece.shape[2] for piece in x),
        *strides,
        max(columns) if len(columns) == 1 else 1,
        *table_strides,
        eps,
    ]
    constants = {"NORM": norm, "DISTANCE": distance, "D": D, "BLOCK_D": block_of(D), "enable_fp_fusion": False}
    return [*pieces, *vectors, first, second], numbers, constants


def _bytes(parts: Sequence[Tensor]) -> list[Tensor]:
    return [part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part for part in parts]
