"""NVFP4: blocks of 16 along K with an E4M3 scale s each, and a second, float32 scale g ("outer") per row or tensor.

``g = amax / (6 * 448)``, ``s = e4m3(clamp(amax_block / (6 * g), lo, 448))``, ``q = e2m1(x / (s * g))``. The two public
implementations differ in three places, and the recipe says which to follow, bit for bit:

=================  ==========================  =======================
                   "torchao" (the default)     "modelopt"
=================  ==========================  =======================
s before rounding  (amax_block / 6) / g        amax_block / (6 * g)
lo                 2**-6, E4M3's first normal  2**-9, its smallest
block of zeros     s = lo                      s = 1
x over its scale   x * ((1 / g) / s)           x / (s * g)
=================  ==========================  =======================

The default multiplies: one division a block, none a value, which is what fused kernels do too. The codes of the two
differ in near-ties only, and in blocks that the smaller ``lo`` resolves.

Where they give no useful answer, this module does: g is at least 2**-117, so rows of zeros or of subnormals divide by
no zero; a row (or tensor) with NaN or an infinity has a NaN g, and its blocks and codes are unspecified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import e2m1
from .fp8 import E4M3, E4M3_MAX, to_e4m3
from .ranges import Granularity, check_range, check_rows, spread

Recipe = Literal["torchao", "modelopt"]

BLOCK = 16
SMALLEST_OUTER = 2.0**-117
"""With the smallest block scale, 2**-9, the product is 2**-126: normal, with a finite reciprocal."""

_LARGEST_POWER = 256.0
_MANTISSA, _SIXTEENTH = (1 << 23) - 1, 1 << 19
_LOWEST = {"torchao": 2.0**-6, "modelopt": 2.0**-9}


def quantize_nvfp4(
    x: Tensor,
    *,
    granularity: Granularity = "row",
    static: Tensor | None = None,
    recipe: Recipe = "torchao",
    four_over_six: bool = False,
    pow2_block_scales: bool = False,
) -> list[Tensor]:
    """The parts of a float ``x [..., K]``, contiguous.

    Args:
        x: float32, bfloat16 or float16, any strides.
        granularity: One outer scale per row, or one for the tensor, written at every row.
        static: float32 ``()``: the outer scale, from calibration; block scales stay dynamic and saturate at 448.
        recipe: Whose arithmetic to follow.
        four_over_six: Each block maps its maximum to 6 or to 4, whichever has the smaller squared error (6 in a tie).
        pow2_block_scales: Block scales are powers of two, so that rows convert to FP8 exactly. They are rounded up
            (down from at most 17/16), which leaves four_over_six nothing to choose: one or the other.

        With either option the largest block scale that a dynamic outer aims at is 256 instead of 448.

    Returns:
        ``q`` uint8 ``[..., K/2]`` (low nibble = even index), ``scale`` float8_e4m3fn ``[..., K/16]``, ``outer``
        float32 ``[..., 1]``.

    Raises:
        TypeError: ``x`` or ``static`` has another type.
        ValueError: ``x`` is a scalar, K is not a positive multiple of 16, ``static`` is no scalar, the granularity or
            the recipe is unknown, or both options are asked for.
    """
    check_rows(x)
    check_range(granularity, static)
    if recipe not in _LOWEST:
        raise ValueError(f"an NVFP4 recipe is one of {sorted(_LOWEST)}, got {recipe!r}")
    if four_over_six and pow2_block_scales:
        raise ValueError("four_over_six and pow2_block_scales exclude each other")
    K = x.shape[-1]
    if K < BLOCK or K % BLOCK:
        raise ValueError(f"K = {K} is not a positive multiple of the block of {BLOCK}")
    blocks = torch.unflatten(x.to(torch.float32), -1, (K // BLOCK, BLOCK))
    amax = blocks.abs().amax(dim=-1)
    limit = _LARGEST_POWER if four_over_six or pow2_block_scales else E4M3_MAX
    outer = _outer(amax.amax(dim=-1, keepdim=True), limit, granularity, static)
    scale = _block_scale(amax, outer, e2m1.E2M1_MAX, recipe, pow2_block_scales)
    values = _divide(blocks, scale, outer, recipe)
    codes = e2m1.encode(values)
    if four_over_six:
        scale_4 = _block_scale(amax, outer, 4.0, recipe, pow2_block_scales)
        values_4 = _divide(blocks, scale_4, outer, recipe)
        codes_4 = e2m1.encode(values_4)
        fewer = _squared_error(codes_4, values_4, scale_4) < _squared_error(codes, values, scale)
        codes = torch.where(fewer.unsqueeze(-1), codes_4, codes)
        scale = torch.where(fewer, scale_4, scale)
    return [e2m1.pack(codes.flatten(-2)), scale.to(E4M3).contiguous(), outer]


def dequantize_nvfp4(parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """``(e2m1(q) * s) * g`` in float32: the first product is exact; rounded to ``dtype`` at the end."""
    q, scale, outer = parts
    return (scaled_elements(q, scale) * outer).to(dtype)


def scaled_elements(q: Tensor, scale: Tensor) -> Tensor:
    """``e2m1(q) * s``, float32 ``[..., K]``: exact, six significant bits (float16 holds them too)."""
    blocks = torch.unflatten(e2m1.decode(e2m1.unpack(q)), -1, (scale.shape[-1], BLOCK))
    return (blocks * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)


def _outer(amax: Tensor, limit: float, granularity: Granularity, static: Tensor | None) -> Tensor:
    """The second-level scale ``[..., 1]``, contiguous, of rows whose largest magnitude is ``amax [..., 1]``."""
    if static is None:
        amax = spread(amax, granularity)
        outer = (amax / (e2m1.E2M1_MAX * limit)).clamp(min=SMALLEST_OUTER)
    else:
        outer = static.clamp(min=SMALLEST_OUTER)
    # inf - inf is NaN
    return (outer + (amax - amax)).contiguous()


def _block_scale(amax: Tensor, outer: Tensor, target: float, recipe: Recipe, pow2: bool) -> Tensor:
    """E4M3 values in float32 ``[..., K/16]`` that map a block's ``amax`` to about ``target``."""
    lowest = _LOWEST[recipe]
    if recipe == "torchao":
        scale = (amax / target) / outer
    else:
        scale = amax / (target * outer)
        scale = torch.where(scale == 0, 1.0, scale)
    if not pow2:
        return to_e4m3(scale.clamp(min=lowest)).to(torch.float32)
    # up, but down by as much as E4M3 rounds down: a scale that is a power of two but for rounding stays that one
    bits = scale.clamp(lowest, _LARGEST_POWER).view(torch.int32) + (_MANTISSA - _SIXTEENTH)
    return (bits & ~_MANTISSA).view(torch.float32)


def _divide(blocks: Tensor, scale: Tensor, outer: Tensor, recipe: Recipe) -> Tensor:
    if recipe == "torchao":
        return blocks * ((1.0 / outer) / scale).unsqueeze(-1)
    return blocks / (scale * outer).unsqueeze(-1)


def _squared_error(codes: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Of each block ``[..., K/16]``, in units of the outer scale, so that nothing overflows."""
    return (e2m1.decode(codes) - values).square().sum(dim=-1) * scale.square()
