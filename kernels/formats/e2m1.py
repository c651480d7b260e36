"""E2M1, the FP4 element: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, two codes in a byte.

A code is ``sign << 3 | magnitude``; the low nibble of a byte is the element with the even index.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
"""The largest value of E2M1."""

_FIRST_NORMAL = 2


def encode(values: Tensor) -> Tensor:
    """The codes, uint8 0..15, of float32 ``values``: nearest, ties to the even code, saturating at 6.

    The sign of zero is kept. E2M1 has no NaN: the code of NaN is unspecified, whoever scales must keep it visible.
    """
    magnitude = values.abs().clamp(max=E2M1_MAX)
    # the spacing is .5 below 2, 1 below 4, 2 above; codes count on over the binades
    per_step = torch.where(magnitude < 2, 2.0, torch.where(magnitude < 4, 1.0, 0.5))
    first = torch.where(magnitude < 2, 0.0, torch.where(magnitude < 4, 2.0, 4.0))
    code = ((magnitude * per_step).round() + first).to(torch.uint8)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """The float32 values of uint8 ``codes`` 0..15; integer arithmetic, exact, -0 for code 8."""
    bits = codes.to(torch.int32)
    magnitude = bits & 7
    # code 2 is 1.0, whose float32 exponent and first mantissa bit are 127 and 0; codes 0 and 1 are subnormal
    normal = ((magnitude + (254 - _FIRST_NORMAL)) << 22).view(torch.float32)
    value = torch.where(magnitude < _FIRST_NORMAL, magnitude * 0.5, normal)
    return value * (1 - (bits >> 3) * 2)


def pack(codes: Tensor) -> Tensor:
    """``codes [..., K]`` uint8 as bytes ``[..., K/2]``, contiguous; K even."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """The codes ``[..., K]`` of bytes ``[..., K/2]``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
