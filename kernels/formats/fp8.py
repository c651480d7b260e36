"""FP8 E4M3: one float32 scale per row, ``scale = amax / 448``, ``q = e4m3(x * (1 / scale))``.

The reciprocal is rounded once a row and the values are multiplied, as in INT8. modelopt divides each value instead:
where the quotient lies within rounding of a tie, its byte may be the neighbour of ours. torchao keeps the reciprocal
and derives the scale from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ranges import Granularity, check_range, check_rows, scale_rows

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
"""The largest finite value of E4M3."""


def to_e4m3(values: Tensor) -> Tensor:
    """Rounds to E4M3, ties to even, saturating; NaN stays NaN, an infinity saturates.

    Casts alone disagree about what lies beyond 448: older versions of torch made NaN of it.
    """
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantize_fp8(x: Tensor, *, granularity: Granularity = "row", static: Tensor | None = None) -> list[Tensor]:
    """``q`` float8_e4m3fn ``[..., K]`` and ``scale`` float32 ``[..., 1]`` of a float ``x [..., K]``, contiguous.

    A row that holds NaN or an infinity has a NaN scale; its ``q`` is unspecified.

    Args:
        x: float32, bfloat16 or float16, any strides.
        granularity: One scale per row, or one for the tensor, written at every row.
        static: float32 ``()``: the scale, from calibration, instead of the dynamic range; values beyond it saturate.

    Raises:
        TypeError: ``x`` or ``static`` has another type.
        ValueError: ``x`` is a scalar, ``static`` is none, or the granularity is unknown.
    """
    check_rows(x)
    check_range(granularity, static)
    values, scale = scale_rows(x.to(torch.float32), E4M3_MAX, granularity, static)
    return [to_e4m3(values).contiguous(), scale]


def dequantize_fp8(parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * scale``, multiplied in float32 and rounded once to ``dtype``."""
    q, scale = parts
    return (q.to(torch.float32) * scale).to(dtype)
