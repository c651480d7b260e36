"""Encoding of low-bit formats inside Triton kernels: float32 values become codes and scale bytes.

Values are rounded by adding a power of two so large that the sum has no bits left below the format's spacing: the
float addition rounds to nearest with ties to even, and the bits of the sum count the steps. Nothing else is used but
integer operations, so a CPU interpreter computes what a GPU does, bit for bit.

NaN has no code here (it saturates): whoever scales must keep it visible in a scale.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the CUDA kernels need triton: pip install 'ditc[triton]'") from error


@triton.jit
def to_f32(x):
    """``x`` of float32, float16 or bfloat16 in float32, exact.

    A bfloat16 is the upper half of a float32; shifting it says so where an interpreter's cast loses subnormals.
    """
    return (
        (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        if x.dtype == tl.bfloat16
        else x.to(tl.float32)
    )


@triton.jit
def magnitude_bits(x):
    """The bits of ``|x|`` as int32 for float32 ``x``: ordered as the magnitudes are, infinity and then NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def is_finite(bits):
    """Whether :func:`magnitude_bits` stand for a number."""
    return bits < 0x7F800000


@triton.jit
def f32_to_e2m1(x):
    """E2M1 codes, int32 0..15, of float32 ``x``: nearest, ties to even, saturating at 6; keeps the sign of zero."""
    # spacing 2**(e - 1) from 2**e on, and that of e = 0 below
    return _round(x, 0x40C00000, 0x3F800000, 1) | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def f32_to_e4m3(x):
    """E4M3 bytes, int32 0..255, of float32 ``x``: nearest, ties to even, saturating at 448; keeps the sign of zero."""
    # spacing 2**(e - 3) from 2**e on, and that of e = -6 below
    return _round(x, 0x43E00000, 0x3C800000, 3) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def _round(x, LARGEST: tl.constexpr, NORMAL: tl.constexpr, MANTISSA: tl.constexpr):
    """The code of ``|x|`` in a float format of ``MANTISSA`` bits, int32.

    ``LARGEST`` and ``NORMAL`` are the float32 bits of its largest value and of its smallest normal one.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = tl.minimum(magnitude_bits(x), LARGEST)
    # bits of 2**(e + SHIFT), where float32 has the spacing that the format has at 2**e
    anchor = tl.maximum(bits & 0x7F800000, NORMAL) + (SHIFT << 23)
    rounded = bits.to(tl.float32, bitcast=True) + anchor.to(tl.float32, bitcast=True)
    steps = rounded.to(tl.int32, bitcast=True) - anchor
    # a binade has 2**MANTISSA codes
    return steps + ((anchor - (NORMAL + (SHIFT << 23))) >> SHIFT)


@triton.jit
def f32_to_int8(x):
    """``x`` rounded to the nearest integer, ties to even, int8; needs ``|x| < 128``."""
    # 1.5 * 2**23, where float32 counts in ones; its lowest bits are zero
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def normal_e4m3_to_f32(byte):
    """The float32 value of an E4M3 byte (int32) that is positive and not subnormal."""
    return ((byte + 960) << 20).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_of_amax(bits, LARGEST: tl.constexpr, RCEIL: tl.constexpr):
    """E8M0 scale bytes, int32, of blocks whose largest magnitude has :func:`magnitude_bits` ``bits``.

    Args:
        LARGEST: float32 bits of the largest value of the elements.
        RCEIL: the exponent is ``ceil(log2(amax / largest))``; else ``floor(log2(amax)) - floor(log2(largest))``.

    A block that holds NaN or an infinity gets 255, NaN; one that would need an exponent below -127 gets 0.
    """
    # a mantissa above that of `largest` carries into the exponent
    carried = bits + (0x7FFFFF - (LARGEST & 0x7FFFFF)) if RCEIL else bits
    byte = tl.maximum((carried >> 23) - ((LARGEST >> 23) - 127), 0)
    return tl.where(is_finite(bits), byte, 255)


@triton.jit
def e8m0_reciprocal(byte):
    """``2**(127 - byte)``, exact, for the bytes 0..253 of numbers; 0 for 255."""
    return (tl.maximum(254 - byte, 0) << 23).to(tl.float32, bitcast=True)
