"""Decoding of low-bit formats inside Triton kernels: bytes become floats, exactly.

Only integer operations, casts and multiplications by powers of two are used, so that the same code runs on every
architecture that Triton compiles for and in its interpreter.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the CUDA kernels need triton: pip install 'ditc[triton]'") from error


@triton.jit
def e2m1_to_f16(code):
    """The value of E2M1 codes (integers 0..15), float16.

    The three low bits, put where a float16 has the end of its exponent and the start of its mantissa, are the value
    times 2**-14, subnormals included.
    """
    code = code.to(tl.uint16)
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def e4m3_to_f32(byte):
    """The value of E4M3 bytes (uint8), float32; 0x7F and 0xFF are NaN."""
    byte = byte.to(tl.uint32)
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2**120
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e4m3_to_f16(byte):
    """The value of E4M3 bytes (uint8), float16; those of NaN, 0x7F and 0xFF, become 480.

    The seven low bits, put where a float16 has the end of its exponent and the start of its mantissa, are the value
    times 2**-8, subnormals included.
    """
    byte = byte.to(tl.uint16)
    bits = ((byte & 0x7F) << 7) | ((byte & 0x80) << 8)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def e8m0_to_f32(byte):
    """The value of E8M0 bytes (uint8), float32: 2**(byte - 127), of which 2**-127 is subnormal; 255 is NaN."""
    byte = byte.to(tl.uint32)
    bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, byte << 23)).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unpack_e2m1(packed_RK):
    """float16 ``[R, K]`` of packed E2M1 codes uint8 ``[R, K / 2]``; the low nibble is the even element."""
    return tl.interleave(e2m1_to_f16(packed_RK & 15), e2m1_to_f16(packed_RK >> 4))


@triton.jit
def decode_tile(codes, scales_RG, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of a quantised tensor as floats ``[R, K]`` of ``DTYPE``, without row and outer scales.

    Args:
        codes: int8 or float8e4nv ``[R, K]``, or packed E2M1 uint8 ``[R, K / 2]``.
        scales_RG: the bytes of the block scales, uint8 ``[R, G]``, where a block has ``K / G`` values; ``None`` for
            "int8" and "fp8".
        FORMAT: a name of ``ditc.kernels.formats``.
        DTYPE: float16 holds all values but those of the mx formats, whose exponents are too large. bfloat16 holds
            all values, but turns those below 2**-133 into zero. float32 holds all.
    """
    # no early return: Triton would compile what follows it
    if FORMAT == "int8" or FORMAT == "fp8":
        tile_RK = codes.to(DTYPE)
    else:
        tile_RK = decode_blocks(codes, scales_RG, FORMAT).to(DTYPE)
    return tile_RK


@triton.jit
def decode_blocks(codes, scales_RG, FORMAT: tl.constexpr):
    """As :func:`decode_tile` for a block format; float16 for NVFP4, float32 for the mx formats."""
    if FORMAT == "nvfp4":
        # two significant bits by four, between 2**-10 and 2688: exact in float16
        values_RK = unpack_e2m1(codes)
        factors_RG = e4m3_to_f32(scales_RG).to(tl.float16)
    elif FORMAT == "mxfp4":
        values_RK = unpack_e2m1(codes).to(tl.float32)
        factors_RG = e8m0_to_f32(scales_RG)
    else:
        tl.static_assert(FORMAT == "mxfp8")
        values_RK = codes.to(tl.float16).to(tl.float32)
        factors_RG = e8m0_to_f32(scales_RG)
    R: tl.constexpr = values_RK.shape[0]
    K: tl.constexpr = values_RK.shape[1]
    G: tl.constexpr = factors_RG.shape[1]
    blocks = tl.reshape(values_RK, (R, G, K // G)) * factors_RG[:, :, None]
    return tl.reshape(blocks, (R, K))
