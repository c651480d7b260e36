"""MXFP8 and MXFP4 (OCP Microscaling 1.0): blocks of 32 along K, one E8M0 scale each.

Elements saturate. A block that holds NaN or an infinity has scale byte 255, so all of it is NaN (torchao gives the
scale 2**127 to an infinity, which then reads as a large number); its elements are unspecified. Blocks so small that
their scale is byte 0 keep their values, where torchao flushes them to zero. A magnitude within rounding of 2**128 may
round up to it, which float32 reads as an infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import e2m1, e8m0
from .fp8 import E4M3_MAX, to_e4m3
from .ranges import check_rows

BLOCK = 32


def quantize_mxfp8(x: Tensor, *, rule: e8m0.Rule = "rceil") -> list[Tensor]:
    """``q`` float8_e4m3fn ``[..., K]`` and E8M0 bytes ``[..., K/32]`` of a float ``x [..., K]``, contiguous.

    Raises:
        TypeError: ``x`` is not float32, bfloat16 or float16.
        ValueError: ``x`` is a scalar, K is not a positive multiple of 32, or the rule is unknown.
    """
    values, scale = _scale_blocks(x, E4M3_MAX, rule)
    return [to_e4m3(values).contiguous(), scale]


def quantize_mxfp4(x: Tensor, *, rule: e8m0.Rule = "rceil") -> list[Tensor]:
    """``q`` uint8 ``[..., K/2]`` (low nibble = even index) and E8M0 bytes ``[..., K/32]`` of ``x [..., K]``.

    Raises:
        TypeError: ``x`` is not float32, bfloat16 or float16.
        ValueError: ``x`` is a scalar, K is not a positive multiple of 32, or the rule is unknown.
    """
    values, scale = _scale_blocks(x, e2m1.E2M1_MAX, rule)
    return [e2m1.pack(e2m1.encode(values)), scale]


def dequantize_mxfp8(parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * 2**e`` in float32, exact but for float32's own range, rounded once to ``dtype``."""
    q, scale = parts
    return _apply_scale(q.to(torch.float32), scale).to(dtype)


def dequantize_mxfp4(parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """``e2m1(q) * 2**e`` in float32, exact but for float32's own range, rounded once to ``dtype``."""
    q, scale = parts
    return _apply_scale(e2m1.decode(e2m1.unpack(q)), scale).to(dtype)


def _scale_blocks(x: Tensor, largest: float, rule: e8m0.Rule) -> tuple[Tensor, Tensor]:
    check_rows(x)
    K = x.shape[-1]
    if K < BLOCK or K % BLOCK:
        raise ValueError(f"K = {K} is not a positive multiple of the block of {BLOCK}")
    blocks = torch.unflatten(x.to(torch.float32), -1, (K // BLOCK, BLOCK))
    scale = e8m0.encode(blocks.abs().amax(dim=-1), largest, rule).contiguous()
    return (blocks * e8m0.reciprocal(scale).unsqueeze(-1)).flatten(-2), scale


def _apply_scale(elements: Tensor, scale: Tensor) -> Tensor:
    blocks = torch.unflatten(elements, -1, (scale.shape[-1], BLOCK))
    return (blocks * e8m0.decode(scale).unsqueeze(-1)).flatten(-2)
