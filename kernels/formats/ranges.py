"""What the formats with a float scale share: their inputs' checks, and the range that a scale must cover."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Granularity = Literal["row", "tensor"]
"""Whether each row of the last dimension has its own dynamic range, or the whole tensor has one."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Row scales are at least 2**-126, so that a row of zeros divides by no zero and no reciprocal overflows."""


def check_rows(x: Tensor) -> None:
    """Raises TypeError where ``x`` is not one of ``FLOATS``, ValueError where it has no last dimension."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("quantising needs at least one dimension, got a scalar")


def check_range(granularity: str, static: Tensor | None) -> None:
    """Raises ValueError for an unknown granularity or a ``static`` that is no scalar, TypeError for its type."""
    if granularity not in ("row", "tensor"):
        raise ValueError(f"granularity is 'row' or 'tensor', got {granularity!r}")
    if static is None:
        return
    if static.dtype != torch.float32:
        raise TypeError(f"a static scale is float32, got {static.dtype}")
    if static.dim() != 0:
        raise ValueError(f"a static scale is a scalar of shape (), got {tuple(static.shape)}")


def spread(amax: Tensor, granularity: Granularity) -> Tensor:
    """``amax [..., 1]`` of rows as it is, or the largest of them at every row."""
    if granularity == "row":
        return amax
    # a tensor without rows has no largest; absolute values are never below the zero that is padded
    return F.pad(amax.flatten(), (0, 1)).amax().expand(amax.shape)


def scale_rows(
    values: Tensor, largest: float, granularity: Granularity, static: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Float32 ``values [..., K]`` over their row scale, and that scale ``[..., 1]``, contiguous.

    The scale is ``amax / largest``, at least ``SMALLEST_SCALE``, or ``static``; the values are multiplied by its
    reciprocal. Where the range holds NaN or an infinity the scale that is returned is NaN. A ``static`` scale bounds
    nothing: the caller saturates.
    """
    if values.shape[-1] == 0:
        amax = values.new_zeros((*values.shape[:-1], 1))
    else:
        amax = values.abs().amax(dim=-1, keepdim=True)
    if static is None:
        amax = spread(amax, granularity)
        scale = (amax / largest).clamp(min=SMALLEST_SCALE)
    else:
        scale = static.clamp(min=SMALLEST_SCALE)
    # inf - inf is NaN: an infinite range gets a NaN scale, a finite one adds zero
    return values * (1.0 / scale), (scale + (amax - amax)).contiguous()
