"""FP4 tensors as row-wise FP8, for hardware that multiplies FP8 and stores FP4.

An FP4 value times its block scale has few significant bits, so a row scale that is a power of two times the outer
scale only moves exponents: E4M3 then holds

- MXFP4 exactly, where the magnitudes of a row span at most what E4M3 does: 0.5 * 2**d needs d >= -8, 6 * 2**d needs
  d <= 6, so blocks whose scales lie within a factor of 2**14 always fit;
- NVFP4 exactly under the same condition where block scales are powers of two (which those of ``pow2_block_scales``
  between the default recipe's 2**-6 and 256 always meet); otherwise the products with 1.5, 3 and 6 may need five or six
  significant bits and are rounded to four. A row scale of ``amax / 448`` would round them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import e2m1, e8m0
from .fp8 import E4M3_MAX, to_e4m3
from .mx import BLOCK
from .nvfp4 import scaled_elements

_SMALLEST_SHIFT, _LARGEST_SHIFT = -9, 3  # 6 * 448 <= 448 * 2**3; only a block scale of NaN asks for more
# beyond any exponent that fits into E4M3 beside the row's largest, and far from float32's own limits
_FAR_BELOW = -100


def fp8_from_mxfp4(parts: Sequence[Tensor], *, exact: bool = True) -> list[Tensor]:
    """MXFP4 parts as FP8 ones: ``q`` float8_e4m3fn ``[..., K]``, ``scale`` float32 ``[..., 1]``, a power of two.

    The scale of a row is the smallest that makes its largest magnitude fit, and at least 2**-126. A row that holds
    the scale byte 255 gets the scale NaN.

    Args:
        parts: ``q`` and ``scale`` of an MXFP4 tensor.
        exact: Refuse what E4M3 would round. This looks at values, so it cannot be traced; ``False`` can.

    Raises:
        ValueError: ``exact``, and a row has values that E4M3 rounds beside its largest.
    """
    relative, top = _relative_mxfp4(parts)
    # the row scale 2**(top + shift) must be a normal number
    shift = torch.maximum(_shift(relative), 1 - e8m0.BIAS - top)
    values = relative * _power_of_two(-shift)
    invalid = (parts[1] == e8m0.NAN).any(dim=-1, keepdim=True)
    scale = torch.where(invalid, torch.nan, _power_of_two(top + shift))
    if exact:
        _refuse_rounding(values, invalid)
    return [to_e4m3(values).contiguous(), scale]


def fp8_from_nvfp4(parts: Sequence[Tensor], *, exact: bool = False) -> list[Tensor]:
    """NVFP4 parts as FP8 ones: ``q`` float8_e4m3fn ``[..., K]``, ``scale`` float32 ``[..., 1]`` = outer * 2**n.

    n is the smallest, from -9 up, that makes the row's largest magnitude fit. Values that need more than E4M3's four
    significant bits, or lie below its range, are rounded to nearest.

    Args:
        parts: ``q``, ``scale`` and ``outer`` of an NVFP4 tensor.
        exact: Refuse what E4M3 would round. This looks at values, so it cannot be traced; ``False`` can.

    Raises:
        ValueError: ``exact``, and a row has values that E4M3 rounds.
    """
    q, scale, outer = parts
    elements = scaled_elements(q, scale)
    # not below 2**-9, so that the smallest outer scale stays normal; E4M3 loses nothing by it
    shift = _shift(elements).clamp(_SMALLEST_SHIFT, _LARGEST_SHIFT)
    values = elements * _power_of_two(-shift)
    if exact:
        _refuse_rounding(values, outer.isnan())
    return [to_e4m3(values).contiguous(), (outer * _power_of_two(shift)).contiguous()]


def _relative_mxfp4(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Values over ``2**top``, and ``top`` int32 ``[..., 1]``: the largest exponent of a row's blocks that are not zero.

    Relative, because the values themselves may exceed float32.
    """
    q, scale = parts
    blocks = torch.unflatten(e2m1.decode(e2m1.unpack(q)), -1, (scale.shape[-1], BLOCK))
    exponent = scale.to(torch.int32) - e8m0.BIAS
    counts = (blocks != 0).any(dim=-1) & (scale != e8m0.NAN)
    top = torch.where(counts, exponent, -e8m0.BIAS).amax(dim=-1, keepdim=True)
    below = torch.where(counts, (exponent - top).clamp(min=_FAR_BELOW), 0)
    return (blocks * _power_of_two(below).unsqueeze(-1)).flatten(-2), top


def _shift(values: Tensor) -> Tensor:
    """int32 ``[..., 1]``: the least n for which a row's largest magnitude is at most ``448 * 2**n``."""
    amax = values.abs().amax(dim=-1, keepdim=True)
    return e8m0.encode(amax, E4M3_MAX, "rceil").to(torch.int32) - e8m0.BIAS


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` in float32 for int32 exponents from -126 to 127; exact."""
    return ((exponent + e8m0.BIAS) << 23).view(torch.float32)


def _refuse_rounding(values: Tensor, invalid: Tensor) -> None:
    """Raises for rows with ``values`` that are not E4M3's; rows that are ``invalid`` anyway are not looked at."""
    rounded = (to_e4m3(values).to(torch.float32) != values).any(dim=-1, keepdim=True) & ~invalid
    if bool(rounded.any()):
        row = int(rounded.flatten().nonzero()[0, 0])
        magnitudes = values.flatten(0, -2)[row].abs()
        span = f"{float(magnitudes[magnitudes > 0].min())} to {float(magnitudes.max())}"
        raise ValueError(
            f"{int(rounded.sum())} of {rounded.numel()} rows do not fit into FP8 exactly; row {row} holds {span} "
            "times its scale, where E4M3 has four significant bits down to 2**-6 and multiples of 2**-9 below"
        )
