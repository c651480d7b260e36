"""INT8: symmetric, -127..127, one float32 scale per row.

``scale = amax / 127``, ``q = round(x * (1 / scale))`` with ties to even. A row that holds NaN or an infinity has a NaN
scale; its integers are unspecified.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ranges import Granularity, check_range, check_rows, scale_rows

INT8_MAX = 127


def quantize_int8(x: Tensor, *, granularity: Granularity = "row", static: Tensor | None = None) -> list[Tensor]:
    """``q`` int8 ``[..., K]`` and ``scale`` float32 ``[..., 1]`` of a float ``x [..., K]``, both contiguous.

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
    steps, scale = scale_rows(x.to(torch.float32), INT8_MAX, granularity, static)
    # |x| * (1 / scale) exceeds 127 by rounding only, unless the scale is static
    q = steps.round() if static is None else steps.round().clamp(-INT8_MAX, INT8_MAX)
    return [q.to(torch.int8).contiguous(), scale]


def dequantize_int8(parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * scale``, multiplied in float32 and rounded once to ``dtype``."""
    q, scale = parts
    return (q.to(torch.float32) * scale).to(dtype)
