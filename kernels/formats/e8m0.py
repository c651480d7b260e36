"""E8M0, the scale of the MX formats: a power of two in a byte, exponent + 127; 255 is NaN.

Two rules choose the exponent e of a block whose largest magnitude is amax, for elements whose largest value is
``largest`` = m * 2**emax with 1 <= m < 2:

- "floor" (OCP MX 1.0): ``e = floor(log2(amax)) - emax``; elements above ``largest * 2**e`` saturate;
- "rceil" (cuBLAS, torchao's and modelopt's MXFP4): ``e = ceil(log2(amax / largest))``; no element saturates.

Both are computed on the bits of amax, so they are exact on any device. torchao takes a float32 logarithm outside of
Blackwell: a quotient that lies less than the logarithm's rounding above a power of two gets the smaller exponent
there, which the hardware's conversion (round towards +infinity) and this module do not give.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["floor", "rceil"]

BIAS = 127
NAN = 255
"""The byte that stands for NaN; a block that holds NaN or an infinity has it."""

_MANTISSA_BITS = 23


def encode(amax: Tensor, largest: float, rule: Rule) -> Tensor:
    """The scale bytes, uint8, of blocks with magnitudes up to ``amax`` (float32, any shape, not negative).

    Zero and whatever would need an exponent below -127 get byte 0.

    Raises:
        ValueError: the rule is unknown.
    """
    mantissa, exponent = math.frexp(largest)  # largest = mantissa * 2**exponent, 1/2 <= mantissa < 1
    bits = amax.view(torch.int32)
    if rule == "rceil":
        # a mantissa above that of `largest` carries into the exponent: amax / largest is rounded up to a power of two
        bits = bits + ((1 << _MANTISSA_BITS) - 1 - int((2 * mantissa - 1) * (1 << _MANTISSA_BITS)))
    elif rule != "floor":
        raise ValueError(f"an E8M0 scale follows rule 'floor' or 'rceil', got {rule!r}")
    byte = ((bits >> _MANTISSA_BITS) - (exponent - 1)).clamp(min=0)
    return torch.where(torch.isfinite(amax), byte, NAN).to(torch.uint8)


def decode(scale: Tensor) -> Tensor:
    """The float32 powers of two of scale bytes: exact, 2**-127 (a subnormal) for 0 and NaN for 255."""
    byte = scale.to(torch.int32)
    bits = torch.where(byte == 0, 1 << (_MANTISSA_BITS - 1), byte << _MANTISSA_BITS)
    return torch.where(byte == NAN, 0x7FC00000, bits).view(torch.float32)


def reciprocal(scale: Tensor) -> Tensor:
    """``1 / decode(scale)`` in float32 for bytes 0..253, all that :func:`encode` gives to numbers; exact.

    Byte 255 gives zero, so that what is multiplied by it stays NaN or becomes zero.
    """
    return ((2 * BIAS - scale.to(torch.int32)).clamp(min=0) << _MANTISSA_BITS).view(torch.float32)
