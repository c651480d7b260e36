"""Softmax weights in low precision, inside Triton kernels: rounded as :func:`.quantized.round_weights` does.

Weights come scaled to their format's range (448 in FP8, 448 * 6 in NVFP4), nonnegative or NaN. Each function gives the
operand of the second product and the values that it stands for, whose sum is the normaliser: a NaN, for which E2M1
has no code, stays visible there.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the CUDA kernels need triton: pip install 'ditc[triton]'") from error

from ..formats.triton_encode import f32_to_e2m1, f32_to_e4m3


@triton.jit
def round_nonnegative(x, LARGEST: tl.constexpr, SMALLEST_NORMAL: tl.constexpr, MANTISSA: tl.constexpr):
    """Float32 ``x >= 0`` rounded to a float format of ``MANTISSA`` bits: nearest, ties to even, saturating; NaN stays.

    A power of two is added whose float32 spacing is the format's, and taken away again.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    least = tl.full((), SMALLEST_NORMAL, tl.float32).to(tl.int32, bitcast=True)
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, least) + (SHIFT << 23)
    anchor = power.to(tl.float32, bitcast=True)
    rounded = (tl.minimum(x, LARGEST) + anchor) - anchor
    return tl.where(x == x, rounded, x)


@triton.jit
def round_to_e4m3(x, CAST: tl.constexpr):
    """Float32 ``0 <= x`` rounded to E4M3, float32; NaN stays. ``CAST``: by the hardware's conversion."""
    return x.to(tl.float8e4nv).to(tl.float32) if CAST else round_nonnegative(x, 448.0, 0.015625, 3)


@triton.jit
def fp8_weights(p_MN, FP8: tl.constexpr):
    """Weights of at most 448 as an operand, and their values in float32.

    Args:
        p_MN: float32.
        FP8: "cast", the operand is float8e4nv, made by the hardware's conversion; "encode", the same by integer
            operations; "decode", the operand is float16, for hardware without FP8.
    """
    if FP8 == "cast":
        operand_MN = p_MN.to(tl.float8e4nv)
        value_MN = operand_MN.to(tl.float32)
    else:
        value_MN = round_nonnegative(p_MN, 448.0, 0.015625, 3)
        if FP8 == "encode":
            operand_MN = f32_to_e4m3(value_MN).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        else:
            operand_MN = value_MN.to(tl.float16)
    return operand_MN, value_MN


@triton.jit
def nvfp4_weights(p_MN, NATIVE: tl.constexpr, CAST: tl.constexpr):
    """Weights of at most 2688 in NVFP4 blocks of 16 keys: the operand, its scales and the values in float32.

    Args:
        p_MN: float32.
        NATIVE: the operand is packed E2M1 ``[M, N / 2]``, its scales float8e4nv ``[M, N / 16]``; otherwise the
            values, exact in float16, whose scales are in them already.
        CAST: by the conversions of hardware that has them; otherwise by integer operations.
    """
    M: tl.constexpr = p_MN.shape[0]
    N: tl.constexpr = p_MN.shape[1]
    p_MGB = tl.reshape(p_MN, (M, N // 16, 16))
    scale_MG = tl.div_rn(tl.max(p_MGB, axis=2), 6.0)
    scale_MG = round_to_e4m3(tl.maximum(scale_MG, 0.001953125), CAST)  # 2**-9, the smallest
    x_MGB = p_MGB * tl.div_rn(1.0, scale_MG)[:, :, None]
    value_MN = tl.reshape(round_nonnegative(x_MGB, 6.0, 1.0, 1) * scale_MG[:, :, None], (M, N))
    if NATIVE:
        even_MP, odd_MP = tl.split(tl.reshape(x_MGB, (M, N // 2, 2)))
        operand = pack_e2m1(even_MP, odd_MP, CAST)
        if CAST:
            scales = scale_MG.to(tl.float8e4nv)
        else:
            scales = f32_to_e4m3(scale_MG).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        operand = value_MN.to(tl.float16)
        scales = scale_MG
    return operand, scales, value_MN


@triton.jit
def pack_e2m1(even, odd, CAST: tl.constexpr):
    """Bytes of the E2M1 codes of float32 ``even`` (low nibble) and ``odd``; ``CAST``: by Blackwell's instruction."""
    if CAST:
        packed = tl.inline_asm_elementwise(
            """
            {
            .reg .b8 b0, b1, b2, b3;
            cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1;
            cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2;
            cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3;
            cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4;
            mov.b32 $0, {b0, b1, b2, b3};
            }
            """,
            constraints="=r,r,r,r,r,r,r,r,r",
            args=[even, odd],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        packed = (f32_to_e2m1(even) | (f32_to_e2m1(odd) << 4)).to(tl.uint8)
    return packed
