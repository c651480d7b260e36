"""Flash attention on quantised operands in Triton: one source for every recipe.

A program takes ``BLOCK_M`` queries of one head and walks over the keys, ``KEYS`` at a time. Tiles behind the diagonal,
outside the window or not on the block map cost no product; those whose borders need no look are walked by a loop of
their own. Recipes differ in how a tile's scores are made (:func:`scores_of`) and in how weights meet values
(:func:`add_values`). NVFP4 has two ways in both: native block-scaled products (Blackwell), or tiles decoded to float16
once, when they are loaded.

Scores are in units of log2, as the hardware's exponential takes them.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the CUDA kernels need triton: pip install 'ditc[triton]'") from error

from ..formats.triton_decode import decode_tile, e4m3_to_f16
from ..formats.triton_encode import to_f32
from .triton_weights import fp8_weights, nvfp4_weights

LOG2E = tl.constexpr(1.4426950408889634)
LOG2_448 = tl.constexpr(8.807354922057604)
LOG2_2688 = tl.constexpr(11.39231742277876)
KEYS = tl.constexpr(64)
SPARSE_BLOCK = tl.constexpr(64)


@triton.jit
def load_tile(
    corner, stride, row_limit, column_limit, R: tl.constexpr, C: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """``[R, C]`` from ``corner`` on, rows ``stride`` apart; zero from the limits on, where they are looked at."""
    row_R, column_C = tl.arange(0, R), tl.arange(0, C)
    tile = corner + row_R.to(tl.int64)[:, None] * stride + column_C[None, :]
    # no early return: Triton would compile what follows it
    if MASK_ROWS and MASK_COLUMNS:
        loaded = tl.load(tile, mask=(row_R < row_limit)[:, None] & (column_C < column_limit)[None, :], other=0.0)
    elif MASK_ROWS:
        loaded = tl.load(tile, mask=(row_R < row_limit)[:, None], other=0.0)
    elif MASK_COLUMNS:
        loaded = tl.load(tile, mask=(column_C < column_limit)[None, :], other=0.0)
    else:
        loaded = tl.load(tile)
    return loaded


@triton.jit
def load_tokens(rows, first, L, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr):
    """``[R, C]`` of the tokens from ``first`` on, contiguous rows of ``WIDTH``; zero beyond, and beyond token ``L``."""
    corner = rows + tl.cast(first, tl.int64) * WIDTH
    return load_tile(corner, WIDTH, L - first, WIDTH, R, C, MASKED, WIDTH < C)


@triton.jit
def operand_of(codes, scales, FORMAT: tl.constexpr, NATIVE: tl.constexpr, FP8: tl.constexpr):
    """What tensor cores multiply in the place of a tile of codes: the codes, or float16 with NVFP4's block scales."""
    if FORMAT == "nvfp4" and not NATIVE:
        tile = decode_tile(codes, scales, "nvfp4", tl.float16)
    elif FORMAT == "fp8" and FP8 == "decode":
        tile = e4m3_to_f16(codes)
    else:
        tile = codes
    return tile


@triton.jit
def as_e4m3(byte):
    return byte.to(tl.float8e4nv, bitcast=True)


@triton.jit
def scores_of(
    q_MD, q_scales, factor_M, k, k_blocks, k_scale, bias, begin, Lk, scale,
    QK: tl.constexpr, NATIVE: tl.constexpr, FP8: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Scores ``[M, KEYS]`` of the keys from ``begin`` on; ``bias`` is one row for all queries here.

    ``factor_M`` is what the queries' scales and ``|scale|`` make together. It is left out where it is to follow the
    largest score (``LATE``): the multiplication then costs nothing.
    """
    M: tl.constexpr = q_MD.shape[0]
    PACK: tl.constexpr = 2 if QK == "nvfp4" else 1
    key_N = begin + tl.arange(0, KEYS)
    k_ND = load_tokens(k, begin, Lk, D // PACK, KEYS, BLOCK_D // PACK, EDGE)
    k_scales = load_tokens(k_blocks, begin, Lk, D // 16, KEYS, BLOCK_D // 16, EDGE) if QK == "nvfp4" else None
    k_ND = operand_of(k_ND, k_scales, QK, NATIVE, FP8)
    factor_N = tl.load(k_scale + key_N, mask=key_N < Lk, other=1.0) if EDGE else tl.load(k_scale + key_N)
    if QK == "int8":
        s_MN = tl.dot(q_MD, tl.trans(k_ND), out_dtype=tl.int32).to(tl.float32)
    elif QK == "nvfp4" and NATIVE:
        start_MN = tl.zeros((M, KEYS), tl.float32)
        if EDGE:
            start_MN = tl.where((key_N < Lk)[None, :], start_MN, float("-inf"))
        s_MN = tl.dot_scaled(
            q_MD, as_e4m3(q_scales), "e2m1", tl.trans(k_ND), as_e4m3(k_scales), "e2m1", acc=start_MN
        )  # fmt: skip
    else:
        s_MN = tl.dot(q_MD, tl.trans(k_ND), out_dtype=tl.float32)
    s_MN = s_MN * tl.where(scale < 0, -factor_N, factor_N)[None, :]
    if not LATE:
        s_MN = s_MN * factor_M[:, None]
    if bias is not None:
        s_MN += (tl.load(bias + key_N, mask=key_N < Lk, other=0.0) * scale)[None, :]
    return s_MN


@triton.jit
def hide(
    s_MN, mask, blocks, row_M, begin, Lq, Lk, mask_q, mask_k, window, seen_M,
    MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores with a mask added, -inf where a key is not seen: the semantics of :func:`.visible.hidden`."""
    key_N = begin + tl.arange(0, KEYS)
    inside_N = key_N < Lk
    if mask is not None:
        columns_N = mask + key_N.to(tl.int64) * mask_k
        if MASK_ROWS:
            cells = columns_N[None, :] + row_M.to(tl.int64)[:, None] * mask_q
            part = tl.load(cells, mask=(row_M < Lq)[:, None] & inside_N[None, :], other=0.0)
        else:
            part = tl.load(columns_N, mask=inside_N, other=0.0)[None, :]
        if mask.dtype.element_ty == tl.uint8:
            s_MN = tl.where(part != 0, s_MN, float("-inf"))
        else:
            s_MN += to_f32(part) * LOG2E
    if blocks is not None:
        s_MN = tl.where((seen_M != 0)[:, None], s_MN, float("-inf"))
    if EDGE:
        if CAUSAL:
            s_MN = tl.where(key_N[None, :] <= row_M[:, None], s_MN, float("-inf"))
        if BANDED:
            s_MN = tl.where(tl.abs(key_N[None, :] - row_M[:, None]) <= window, s_MN, float("-inf"))
        s_MN = tl.where(inside_N[None, :], s_MN, float("-inf"))
    return s_MN


@triton.jit
def add_values(
    acc_MD, total_M, p_MN, v, v_blocks, v_stride, begin, Lk,
    PV: tl.constexpr, NATIVE: tl.constexpr, FP8: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """``acc + p @ v`` and ``total + sum(p)`` for weights ``p`` rounded to the recipe's format."""
    at = tl.cast(begin, tl.int64)
    # rows of values along the tokens are multiples of 16 long, and seen to be so: wide loads need no more
    length = (Lk + 15) // 16 * 16
    if PV == "fp16":
        v_ND = load_tile(v + at * v_stride, v_stride, Lk - begin, D, KEYS, BLOCK_D, EDGE, D < BLOCK_D)
        operand_MN = p_MN.to(tl.float16)
        value_MN = operand_MN.to(tl.float32)
        acc_MD = tl.dot(operand_MN, v_ND, acc_MD, out_dtype=tl.float32)
    elif PV == "fp8":
        codes = load_tile(v + begin, length, D, length - begin, BLOCK_D, KEYS, D < BLOCK_D, EDGE)
        v_DN = operand_of(codes, None, "fp8", False, FP8)
        operand_MN, value_MN = fp8_weights(p_MN, FP8)
        # Hopper's FP8 units sum with 14 bits: leave them after each tile
        acc_MD = tl.dot(operand_MN, tl.trans(v_DN), acc_MD, max_num_imprecise_acc=KEYS, out_dtype=tl.float32)
    else:
        rest = length - begin
        codes = load_tile(v + begin // 2, length // 2, D, rest // 2, BLOCK_D, KEYS // 2, D < BLOCK_D, EDGE)
        corner = v_blocks + begin // 16
        scales = load_tile(corner, length // 16, D, rest // 16, BLOCK_D, KEYS // 16, D < BLOCK_D, EDGE)
        v_DN = operand_of(codes, scales, "nvfp4", NATIVE, FP8)
        operand_MN, p_scales, value_MN = nvfp4_weights(p_MN, NATIVE, FP8 == "cast")
        if NATIVE:
            acc_MD = tl.dot_scaled(
                operand_MN, p_scales, "e2m1", tl.trans(v_DN), as_e4m3(scales), "e2m1", acc=acc_MD
            )  # fmt: skip
        else:
            acc_MD = tl.dot(operand_MN, tl.trans(v_DN), acc_MD, out_dtype=tl.float32)
    return acc_MD, total_M + tl.sum(value_MN, axis=1)


@triton.jit
def attend_tile(
    acc_MD, total_M, top_M, q_MD, q_scales, factor_M, row_M, k, k_blocks, k_scale, v, v_blocks, bias, mask, blocks,
    begin, seen_M, Lq, Lk, v_stride, mask_q, mask_k, scale, window,
    QK: tl.constexpr, PV: tl.constexpr, NATIVE: tl.constexpr, FP8: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr,
    BANDED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the sums over all keys before ``begin + KEYS``, relative to the new maximum."""
    FULL: tl.constexpr = LOG2_448 if PV == "fp8" else LOG2_2688 if PV == "nvfp4" else 0.0
    ADDED: tl.constexpr = mask is not None and mask.dtype.element_ty != tl.uint8
    LATE: tl.constexpr = bias is None and not ADDED
    s_MN = scores_of(
        q_MD, q_scales, factor_M, k, k_blocks, k_scale, bias, begin, Lk, scale, QK, NATIVE, FP8, D, BLOCK_D, EDGE, LATE
    )  # fmt: skip
    s_MN = hide(
        s_MN, mask, blocks, row_M, begin, Lq, Lk, mask_q, mask_k, window, seen_M, MASK_ROWS, CAUSAL, BANDED, EDGE
    )  # fmt: skip
    largest_M = tl.max(s_MN, axis=1)
    now_M = tl.maximum(top_M, largest_M * factor_M if LATE else largest_M)
    # a row that has seen nothing yet has no largest score
    base_M = tl.where(now_M == float("-inf"), 0.0, now_M)
    share_M = tl.exp2(top_M - base_M)
    # weights fill the range of their format; what is too much in them is too much in their sum
    lift_M = FULL - base_M
    if LATE:
        p_MN = tl.exp2(
            tl.fma(s_MN, tl.broadcast_to(factor_M[:, None], s_MN.shape), tl.broadcast_to(lift_M[:, None], s_MN.shape))
        )
    else:
        p_MN = tl.exp2(s_MN + lift_M[:, None])
    acc_MD, total_M = add_values(
        acc_MD * share_M[:, None], total_M * share_M, p_MN, v, v_blocks, v_stride, begin, Lk,
        PV, NATIVE, FP8, DV, BLOCK_DV, EDGE,
    )  # fmt: skip
    return acc_MD, total_M, now_M


@triton.jit(do_not_specialize=["H", "Lq", "window"])
def attention_kernel(
    q, k, v, q_blocks, k_blocks, v_blocks, q_scale, k_scale, v_scale, bias, mask, blocks, out,
    H, Lq, Lk, v_batch, v_head, v_stride, mask_b, mask_h, mask_q, mask_k, scale, window,
    GROUP: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, NATIVE: tl.constexpr, FP8: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` queries of one head of ``ditc::attention_quantized``.

    Args:
        q, k: codes ``[B, H, Lq, D]`` and ``[B, G, Lk, D]`` (NVFP4: two in a byte), contiguous.
        v: float16 ``[B, G, Lk, DV]``, whose strides of batch, head and token are given; or codes along the tokens,
            ``[B, G, DV, Lk]`` with ``Lk`` padded to a multiple of 16 (NVFP4: two in a byte), contiguous.
        q_blocks, k_blocks, v_blocks: bytes of NVFP4's block scales, contiguous.
        q_scale, k_scale, v_scale: float32, one for each token of q and k and each feature of v.
        bias: float32 ``[B, H, ceil(Lq / 128), Lk]``, contiguous, or None.
        mask: uint8 (0: not seen) or float, with strides, or None.
        blocks: uint8 ``[B, H, ceil(Lq / 64), ceil(Lk / 64)]``, contiguous, or None.
        out: ``[B, Lq, H, DV]``, contiguous.
        H: heads of q, each ``GROUP`` of which share one of k and v.
        scale: of the attention, times log2(e).
        QK, PV: the recipe's. NATIVE: NVFP4 by block-scaled products.
        FP8: see :func:`.triton_weights.fp8_weights`; with "decode" FP8 codes come as uint8.
        BLOCK_M: divides 128, so that one row of the bias serves the program.
        RAGGED: ``Lk`` is no multiple of ``KEYS``.
    """
    tiles = tl.cdiv(Lq, BLOCK_M)
    # the last queries of a causal attention see most: they start first
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles
    batch, head_of_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    kv_head = (head // GROUP).to(tl.int64)
    head = head.to(tl.int64)
    row_M = first_row + tl.arange(0, BLOCK_M)
    PACK: tl.constexpr = 2 if QK == "nvfp4" else 1
    q += head * Lq * (D // PACK)
    k += kv_head * Lk * (D // PACK)
    if QK == "nvfp4":
        q_blocks += head * Lq * (D // 16)
        k_blocks += kv_head * Lk * (D // 16)
    k_scale += kv_head * Lk
    length = (Lk + 15) // 16 * 16
    if PV == "fp16":
        v += batch * v_batch + (head_of_batch // GROUP) * v_head
    elif PV == "fp8":
        v += kv_head * DV * length
    else:
        v += kv_head * DV * (length // 2)
        v_blocks += kv_head * DV * (length // 16)
    if bias is not None:
        bias += (head * tl.cdiv(Lq, 128) + first_row // 128) * Lk
    if mask is not None:
        mask += batch * mask_b + head_of_batch * mask_h
    sparse_columns = tl.cdiv(Lk, SPARSE_BLOCK)
    if blocks is not None:
        blocks += head * tl.cdiv(Lq, SPARSE_BLOCK) * sparse_columns

    q_MD = load_tokens(q, first_row, Lq, D // PACK, BLOCK_M, BLOCK_D // PACK, True)
    q_scales = load_tokens(q_blocks, first_row, Lq, D // 16, BLOCK_M, BLOCK_D // 16, True) if QK == "nvfp4" else None
    q_MD = operand_of(q_MD, q_scales, QK, NATIVE, FP8)
    factor_M = tl.load(q_scale + head * Lq + row_M, mask=row_M < Lq, other=0.0) * tl.abs(scale)
    # never zero: it meets the scores of hidden keys, -inf
    factor_M = tl.where(factor_M < 1.1754943508222875e-38, 1.1754943508222875e-38, factor_M)  # 2**-126

    # tiles up to `full` need no look at their borders, those up to `end` do
    start, end, full = 0, Lk, Lk // KEYS * KEYS
    if CAUSAL:
        end = tl.minimum(end, first_row + BLOCK_M)
        full = tl.minimum(full, (first_row + 1) // KEYS * KEYS)
    if BANDED:
        start = tl.maximum(first_row - window, 0) // KEYS * KEYS
        end = tl.minimum(end, first_row + BLOCK_M + window)
        full = start
    acc_MD = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for EDGE in tl.static_range(2):
        if (RAGGED or CAUSAL or BANDED) if EDGE else not BANDED:
            for begin in range(full if EDGE else start, end if EDGE else full, KEYS):
                if blocks is not None:
                    cells = blocks + (row_M // SPARSE_BLOCK) * sparse_columns + begin // KEYS
                    seen_M = tl.load(cells, mask=row_M < Lq, other=0).to(tl.int32)
                    if tl.max(seen_M, axis=0) != 0:
                        acc_MD, total_M, top_M = attend_tile(
                            acc_MD, total_M, top_M, q_MD, q_scales, factor_M, row_M, k, k_blocks, k_scale, v,
                            v_blocks, bias, mask, blocks, begin, seen_M, Lq, Lk, v_stride, mask_q, mask_k, scale,
                            window, QK, PV, NATIVE, FP8, D, DV, BLOCK_D, BLOCK_DV, MASK_ROWS, CAUSAL, BANDED, EDGE,
                        )  # fmt: skip
                else:
                    acc_MD, total_M, top_M = attend_tile(
                        acc_MD, total_M, top_M, q_MD, q_scales, factor_M, row_M, k, k_blocks, k_scale, v,
                        v_blocks, bias, mask, blocks, begin, None, Lq, Lk, v_stride, mask_q, mask_k, scale,
                        window, QK, PV, NATIVE, FP8, D, DV, BLOCK_D, BLOCK_DV, MASK_ROWS, CAUSAL, BANDED, EDGE,
                    )  # fmt: skip

    y_MD = acc_MD / tl.where(total_M == 0, 1.0, total_M)[:, None]
    feature_D = tl.arange(0, BLOCK_DV)
    y_MD *= tl.load(v_scale + kv_head * DV + feature_D, mask=feature_D < DV, other=0.0)[None, :]
    rows = out + ((batch * Lq + row_M) * H + head_of_batch) * DV
    stored = (row_M < Lq)[:, None] & (feature_D < DV)[None, :]
    tl.store(rows[:, None] + feature_D[None, :], y_MD.to(out.dtype.element_ty), mask=stored)
