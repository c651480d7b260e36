"""The quantising kernel: one program reads a row, applies what stands before the quantiser, scales, rounds and packs.

One source serves five formats behind seven producers; what a call does not use is not compiled. The row stays in
registers, so a norm's two passes and both levels of NVFP4 scales cost one read of the input. All arithmetic is
float32. The launcher forbids fusing multiplications and additions, and divisions by scales are correctly rounded:
behind no producer the results are those of :mod:`ditc.kernels.formats`, bit for bit.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from ..formats.triton_encode import (
    e8m0_of_amax,
    e8m0_reciprocal,
    f32_to_e2m1,
    f32_to_e4m3,
    f32_to_int8,
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


@triton.jit(do_not_specialize=["x_inner", "multiplier_inner", "shift_inner"])
def quantize_kernel(
    x_ptr,
    q_ptr,  # bytes, contiguous
    scale_ptr,  # float32 for a row scale, bytes for block scales; contiguous
    outer_ptr,  # float32, nvfp4 only
    static_ptr,  # one float32, or None
    weight_ptr,  # [K], contiguous, or None; so is bias
    bias_ptr,
    multiplier_ptr,  # or None; so is shift
    shift_ptr,
    x_inner,  # row r of x begins at (r // inner) * outer + (r % inner) * row; so it does in multiplier and shift
    x_outer,
    x_row,
    x_col,
    multiplier_inner,
    multiplier_outer,
    multiplier_row,
    multiplier_col,
    shift_inner,
    shift_outer,
    shift_row,
    shift_col,
    K,
    eps,
    FORMAT: tl.constexpr,
    PRODUCER: tl.constexpr,  # "layer", "rms", or an activation
    BLOCK_K: tl.constexpr,  # the whole row, unless each block stands for itself
):
    GROUP: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    row = tl.program_id(0).to(tl.int64)
    group_G = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k_GB = group_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask_GB = k_GB < K

    start = (row // x_inner) * x_outer + (row % x_inner) * x_row
    y_GB = to_f32(tl.load(x_ptr + start + k_GB * x_col, mask=mask_GB, other=0.0))
    if PRODUCER == "layer" or PRODUCER == "rms":
        y_GB = _normalize(y_GB, mask_GB, K, eps, PRODUCER)
        if weight_ptr is not None:
            y_GB *= to_f32(tl.load(weight_ptr + k_GB, mask=mask_GB, other=0.0))
        if bias_ptr is not None:
            y_GB += to_f32(tl.load(bias_ptr + k_GB, mask=mask_GB, other=0.0))
    else:
        y_GB = _activate(y_GB, PRODUCER)
    if multiplier_ptr is not None:
        start = (row // multiplier_inner) * multiplier_outer + (row % multiplier_inner) * multiplier_row
        y_GB *= to_f32(tl.load(multiplier_ptr + start + k_GB * multiplier_col, mask=mask_GB, other=0.0))
    if shift_ptr is not None:
        start = (row // shift_inner) * shift_outer + (row % shift_inner) * shift_row
        y_GB += to_f32(tl.load(shift_ptr + start + k_GB * shift_col, mask=mask_GB, other=0.0))

    amax_G = tl.max(magnitude_bits(y_GB), axis=1)
    if FORMAT == "int8" or FORMAT == "fp8":
        q_GB = _encode_row(y_GB, amax_G, row, scale_ptr, static_ptr, FORMAT)
    else:
        byte_G, reciprocal_G = _scale_blocks(amax_G, row, outer_ptr, static_ptr, FORMAT)
        tl.store(scale_ptr + row * (K // GROUP) + group_G, byte_G.to(tl.uint8), mask=group_G * GROUP < K)
        y_GB *= reciprocal_G[:, None]
        q_GB = f32_to_e4m3(y_GB).to(tl.uint8) if FORMAT == "mxfp8" else f32_to_e2m1(y_GB)
    if FORMAT == "mxfp4" or FORMAT == "nvfp4":
        PAIRS: tl.constexpr = GROUP // 2
        even_GP, odd_GP = tl.split(tl.reshape(q_GB, [GROUPS, PAIRS, 2]))
        k_GP = group_G[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
        tl.store(q_ptr + row * (K // 2) + k_GP, (even_GP | (odd_GP << 4)).to(tl.uint8), mask=k_GP < K // 2)
    else:
        tl.store(q_ptr + row * K + k_GB, q_GB, mask=mask_GB)


@triton.jit
def _encode_row(y_GB, amax_G, row, scale_ptr, static_ptr, FORMAT: tl.constexpr):
    """Codes of a row with one scale, which is stored: NaN where the row holds what is no number."""
    amax = tl.max(amax_G, axis=0)
    scale = _range(amax, static_ptr, 127.0 if FORMAT == "int8" else 448.0, 1.1754943508222875e-38)  # 2**-126
    tl.store(scale_ptr + row, tl.where(is_finite(amax), scale, float("nan")))
    y_GB *= tl.div_rn(1.0, scale)
    if FORMAT == "int8" and static_ptr is not None:  # a dynamic scale lets nothing exceed 127 but by rounding
        y_GB = tl.minimum(tl.maximum(y_GB, -127.0), 127.0)
    return f32_to_int8(y_GB) if FORMAT == "int8" else f32_to_e4m3(y_GB).to(tl.uint8)


@triton.jit
def _scale_blocks(amax_G, row, outer_ptr, static_ptr, FORMAT: tl.constexpr):
    """Bytes of the block scales, int32, and what to multiply each block by; stores the outer scale of nvfp4."""
    if FORMAT == "nvfp4":
        amax = tl.max(amax_G, axis=0)
        outer = _range(amax, static_ptr, 2688.0, 6.018531076210112e-36)  # 6 * 448, 2**-117
        tl.store(outer_ptr + row, tl.where(is_finite(amax), outer, float("nan")))
        scale_G = tl.div_rn(tl.div_rn(amax_G.to(tl.float32, bitcast=True), 6.0), outer)
        byte_G = f32_to_e4m3(tl.maximum(scale_G, 0.015625))  # 2**-6, the smallest normal
        reciprocal_G = tl.div_rn(tl.div_rn(1.0, outer), normal_e4m3_to_f32(byte_G))
    else:
        byte_G = e8m0_of_amax(amax_G, 0x43E00000 if FORMAT == "mxfp8" else 0x40C00000, True)  # 448 or 6
        reciprocal_G = e8m0_reciprocal(byte_G)
    return byte_G, reciprocal_G


@triton.jit
def _range(amax, static_ptr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """The row's scale: ``amax / LARGEST`` or the static one, at least ``SMALLEST``; a static NaN stays."""
    scale = tl.load(static_ptr) if static_ptr is not None else tl.div_rn(amax.to(tl.float32, bitcast=True), LARGEST)
    return tl.where(scale < SMALLEST, SMALLEST, scale)


@triton.jit
def _normalize(x_GB, mask_GB, K, eps, NORM: tl.constexpr):
    """The row without its mean (layer norm) and over its root mean square, both taken from registers."""
    if NORM == "layer":
        mean = tl.sum(tl.sum(x_GB, axis=1), axis=0) / K
        x_GB = tl.where(mask_GB, x_GB - mean, 0.0)
    square = tl.sum(tl.sum(x_GB * x_GB, axis=1), axis=0) / K
    return x_GB * tl.div_rn(1.0, tl.sqrt_rn(square + eps))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """``x`` behind an activation; the sigmoid forms overflow to their limits."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        x = x / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481282636973 * x * x)))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    return x
