"""The smoothing kernels: tokens as projections left them become NVFP4 codes, and what smoothing took is kept.

Queries take one kernel: a program walks over :data:`QUERIES` tokens of one head twice, for their mean and for their
codes; the second walk finds them in the cache. Keys take two, because their mean needs all of them: sums of parts of
the tokens, and codes. The second of them also multiplies its keys with the queries' means, so that nobody else needs
them in float32.

A rotated feature needs its partner, which is read a second time, from the cache: no thread asks another for it.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from ..formats.triton_encode import (
    f32_to_e2m1,
    f32_to_e4m3,
    is_finite,
    magnitude_bits,
    normal_e4m3_to_f32,
    to_f32,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the CUDA kernels need triton: pip install 'ditc[triton]'") from error

QUERIES = tl.constexpr(128)
MEANS = tl.constexpr(16)
"""Means of queries that meet a tile of keys at once."""


@triton.jit
def rows_of(x, y, row_M, L_x, x_row, y_row):
    """Where the tokens ``row_M`` lie: in ``x``, and from token ``L_x`` on in ``y``."""
    row = row_M.to(tl.int64)
    at_M = x + row * x_row
    if y is not None:
        at_M = tl.where(row_M < L_x, at_M, y + (row - L_x) * y_row)
    return at_M


@triton.jit
def load_vector(first, second, row_M, feature_D, L_x, D: tl.constexpr):
    """A norm's own vector for each token, float32 ``[M or 1, D]``: that of its piece."""
    vector = to_f32(tl.load(first + feature_D, mask=feature_D < D, other=0.0))[None, :]
    if second is not None:
        other = to_f32(tl.load(second + feature_D, mask=feature_D < D, other=0.0))[None, :]
        vector = tl.where((row_M < L_x)[:, None], vector, other)
    return vector


@triton.jit
def load_turned(
    x, y, x_weight, y_weight, x_bias, y_bias, first, second, row_M, L_x, L, x_row, y_row, col, eps,
    NORM: tl.constexpr, DISTANCE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens ``row_M`` of one head, normalised and rotated: float32 ``[M, BLOCK_D]``, zero outside.

    ``first`` and ``second`` are the tables of this head, contiguous ``[L, D]``, or None.
    """
    own_D = tl.arange(0, BLOCK_D)
    stored = (row_M < L)[:, None] & (own_D < D)[None, :]
    rows_M1 = rows_of(x, y, row_M, L_x, x_row, y_row)[:, None]
    tile = to_f32(tl.load(rows_M1 + own_D[None, :] * col, mask=stored, other=0.0))
    mean_M = tl.zeros_like(row_M).to(tl.float32)
    rstd_M = mean_M + 1.0
    if NORM == "layer":
        mean_M = tl.div_rn(tl.sum(tile, axis=1), D * 1.0)
        tile = tl.where((own_D < D)[None, :], tile - mean_M[:, None], 0.0)
    if NORM != "none":
        square_M = tl.div_rn(tl.sum(tile * tile, axis=1), D * 1.0)
        rstd_M = tl.div_rn(1.0, tl.sqrt_rn(square_M + eps))
        tile *= rstd_M[:, None]
    if x_weight is not None:
        tile *= load_vector(x_weight, y_weight, row_M, own_D, L_x, D)
    if x_bias is not None:
        tile += load_vector(x_bias, y_bias, row_M, own_D, L_x, D)
    if first is not None:
        other_D = tl.where((own_D // DISTANCE) % 2 == 0, own_D + DISTANCE, own_D - DISTANCE)
        other_D = tl.where(other_D < D, other_D, own_D)
        partner = to_f32(tl.load(rows_M1 + other_D[None, :] * col, mask=stored, other=0.0))
        if NORM == "layer":
            partner -= mean_M[:, None]
        if NORM != "none":
            partner *= rstd_M[:, None]
        if x_weight is not None:
            partner *= load_vector(x_weight, y_weight, row_M, other_D, L_x, D)
        if x_bias is not None:
            partner += load_vector(x_bias, y_bias, row_M, other_D, L_x, D)
        at = row_M.to(tl.int64)[:, None] * D + own_D[None, :]
        tile *= tl.load(first + at, mask=stored, other=0.0)
        tile += partner * tl.load(second + at, mask=stored, other=0.0)
    return tl.where(stored, tile, 0.0)


@triton.jit
def store_codes(tile, codes, blocks, outer, row_M, L, DP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the NVFP4 parts of ``[M, BLOCK_D]`` at the tokens ``row_M`` of one head, rows of ``DP`` features."""
    M: tl.constexpr = tile.shape[0]
    G: tl.constexpr = BLOCK_D // 16
    here_M = row_M < L
    row = row_M.to(tl.int64)
    tile_MGB = tl.reshape(tile, (M, G, 16))
    amax_MG = tl.max(magnitude_bits(tile_MGB), axis=2)
    amax_M = tl.max(amax_MG, axis=1)
    scale_M = tl.div_rn(amax_M.to(tl.float32, bitcast=True), 2688.0)  # 6 * 448
    scale_M = tl.where(scale_M < 6.018531076210112e-36, 6.018531076210112e-36, scale_M)  # 2**-117
    tl.store(outer + row, tl.where(is_finite(amax_M), scale_M, float("nan")), mask=here_M)
    scale_MG = tl.div_rn(tl.div_rn(amax_MG.to(tl.float32, bitcast=True), 6.0), scale_M[:, None])
    byte_MG = f32_to_e4m3(tl.maximum(scale_MG, 0.015625))  # 2**-6, the smallest normal
    group_G = tl.arange(0, G)
    here = here_M[:, None] & (group_G < DP // 16)[None, :]
    tl.store(blocks + row[:, None] * (DP // 16) + group_G[None, :], byte_MG.to(tl.uint8), mask=here)
    reciprocal_MG = tl.div_rn(tl.div_rn(1.0, scale_M)[:, None], normal_e4m3_to_f32(byte_MG))
    code = f32_to_e2m1(tile_MGB * reciprocal_MG[:, :, None])
    even, odd = tl.split(tl.reshape(code, (M, BLOCK_D // 2, 2)))
    pair = tl.arange(0, BLOCK_D // 2)
    here = here_M[:, None] & (pair < DP // 2)[None, :]
    tl.store(codes + row[:, None] * (DP // 2) + pair[None, :], (even | (odd << 4)).to(tl.uint8), mask=here)


@triton.jit(do_not_specialize=["H", "L_x", "L"])
def smooth_queries_kernel(
    x, y, x_weight, y_weight, x_bias, y_bias, first, second, codes, blocks, outer, means,
    H, L_x, L, x_batch, x_head, x_row, y_batch, y_head, y_row, col, table_batch, table_head, eps,
    NORM: tl.constexpr, DISTANCE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """:data:`QUERIES` tokens of one head of ``ditc::smooth_queries``, ``ROWS`` at a time.

    Args:
        x, y: with strides of batch, head and token, and one of features, ``col``. ``x`` has ``L_x`` tokens, both
            together ``L``. ``y`` is None where there is one piece; so is what belongs to it.
        x_weight, ...: the norms' vectors ``[D]``, or None.
        first, second: tables, contiguous ``[L, D]`` for each batch and head by its stride, or None.
        codes, blocks, outer: parts as bytes and float32, contiguous, of rows that are padded to a multiple of 16.
        means: float32 ``[B, H, ceil(L / 128), D]``, contiguous.
    """
    DP: tl.constexpr = (D + 15) // 16 * 16
    count = tl.cdiv(L, QUERIES)
    block, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    batch, head_of_batch = head // H, head % H
    x += batch * x_batch + head_of_batch * x_head
    if y is not None:
        y += batch * y_batch + head_of_batch * y_head
    if first is not None:
        first += batch * table_batch + head_of_batch * table_head
        second += batch * table_batch + head_of_batch * table_head
    begin = block * QUERIES
    end = tl.minimum(begin + QUERIES, L)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for row in tl.range(begin, end, ROWS, num_stages=1):
        tile = load_turned(
            x, y, x_weight, y_weight, x_bias, y_bias, first, second, row + tl.arange(0, ROWS), L_x, L,
            x_row, y_row, col, eps, NORM, DISTANCE, D, BLOCK_D,
        )  # fmt: skip
        sum_D += tl.sum(tl.where(is_finite(magnitude_bits(tile)), tile, 0.0), axis=0)
    mean_D = tl.div_rn(sum_D, (end - begin).to(tl.float32))
    feature_D = tl.arange(0, BLOCK_D)
    tl.store(means + (head * count + block) * D + feature_D, mean_D, mask=feature_D < D)
    for row in tl.range(begin, end, ROWS, num_stages=1):
        row_M = row + tl.arange(0, ROWS)
        tile = load_turned(
            x, y, x_weight, y_weight, x_bias, y_bias, first, second, row_M, L_x, L,
            x_row, y_row, col, eps, NORM, DISTANCE, D, BLOCK_D,
        )  # fmt: skip
        store_codes(
            tile - mean_D[None, :], codes + head * L * (DP // 2), blocks + head * L * (DP // 16), outer + head * L,
            row_M, L, DP, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["H", "L_x", "L", "span", "count"])
def sum_keys_kernel(
    x, y, x_weight, y_weight, x_bias, y_bias, first, second, sums,
    H, L_x, L, x_batch, x_head, x_row, y_batch, y_head, y_row, col, table_batch, table_head, eps, span, count,
    NORM: tl.constexpr, DISTANCE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum of ``span`` tokens of one head into ``sums``, float32 ``[B, H, count, D]``; see above for the rest."""
    part, head = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    batch, head_of_batch = head // H, head % H
    x += batch * x_batch + head_of_batch * x_head
    if y is not None:
        y += batch * y_batch + head_of_batch * y_head
    if first is not None:
        first += batch * table_batch + head_of_batch * table_head
        second += batch * table_batch + head_of_batch * table_head
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for row in tl.range(part * span, tl.minimum((part + 1) * span, L), ROWS, num_stages=1):
        tile = load_turned(
            x, y, x_weight, y_weight, x_bias, y_bias, first, second, row + tl.arange(0, ROWS), L_x, L,
            x_row, y_row, col, eps, NORM, DISTANCE, D, BLOCK_D,
        )  # fmt: skip
        sum_D += tl.sum(tile, axis=0)
    feature_D = tl.arange(0, BLOCK_D)
    tl.store(sums + (head * count + part) * D + feature_D, sum_D, mask=feature_D < D)


@triton.jit(do_not_specialize=["H", "L_x", "L", "count", "n"])
def smooth_keys_kernel(
    x, y, x_weight, y_weight, x_bias, y_bias, first, second, sums, means, codes, blocks, outer, bias,
    H, L_x, L, x_batch, x_head, x_row, y_batch, y_head, y_row, col, table_batch, table_head, eps, count, n,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, DISTANCE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` tokens of one head of ``ditc::smooth_keys``.

    Args:
        sums: of :func:`sum_keys_kernel`, ``count`` (at most ``PARTS``) for each head.
        means: of the queries, float32 ``[B, H * GROUP, n, D]``, contiguous.
        bias: float32 ``[B, H * GROUP, n, L]``, contiguous.
        H: heads of keys.
    """
    DP: tl.constexpr = (D + 15) // 16 * 16
    tiles = tl.cdiv(L, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row_M = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    batch, head_of_batch = head // H, head % H
    x += batch * x_batch + head_of_batch * x_head
    if y is not None:
        y += batch * y_batch + head_of_batch * y_head
    if first is not None:
        first += batch * table_batch + head_of_batch * table_head
        second += batch * table_batch + head_of_batch * table_head
    feature_D, part = tl.arange(0, BLOCK_D), tl.arange(0, PARTS)
    stored = (part < count)[:, None] & (feature_D < D)[None, :]
    at = (head * count + part)[:, None] * D + feature_D[None, :]
    sum_D = tl.sum(tl.load(sums + at, mask=stored, other=0.0), axis=0)
    mean_D = tl.div_rn(sum_D, L.to(tl.float32))
    tile = load_turned(
        x, y, x_weight, y_weight, x_bias, y_bias, first, second, row_M, L_x, L, x_row, y_row, col, eps,
        NORM, DISTANCE, D, BLOCK_D,
    )  # fmt: skip
    tile -= mean_D[None, :]
    store_codes(
        tile, codes + head * L * (DP // 2), blocks + head * L * (DP // 16), outer + head * L, row_M, L, DP, BLOCK_D
    )
    keys_DM = tl.trans(tile)
    for query in tl.range(0, GROUP * n, MEANS, num_stages=1):
        # heads that share these keys lie one behind the other
        mean_Q = query + tl.arange(0, MEANS)
        here = (mean_Q < GROUP * n)[:, None] & (feature_D < D)[None, :]
        mean_at = head * GROUP * n + mean_Q
        means_QD = tl.load(means + mean_at[:, None] * D + feature_D[None, :], mask=here, other=0.0)
        bias_QM = tl.dot(means_QD, keys_DM, input_precision="tf32x3", out_dtype=tl.float32)
        here_QM = (mean_Q < GROUP * n)[:, None] & (row_M < L)[None, :]
        tl.store(bias + mean_at[:, None] * L + row_M[None, :], bias_QM, mask=here_QM)
