"""Taylor's forecast of what a region gives, from what it gave: TaylorSeer (2503.06923)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forecast(kept: Sequence[Tensor], k: Tensor) -> Tensor:
    """Taylor's forecast ``k`` steps (``[S]``) after the last computed one."""
    result = kept[0]
    factor = k.reshape(-1, *[1] * (result.dim() - 1)).to(result.dtype)
    term = torch.ones_like(factor)
    for order, difference in enumerate(kept[1:], start=1):
        term = term * factor / order
        result = result + difference * term
    return result


def differences(value: Tensor, kept: Sequence[Tensor], gap: Tensor) -> list[Tensor]:
    """The value and its backward differences a step, from those of the computed step ``gap`` steps ago."""
    found = [value]
    for old in kept[:-1]:
        found.append((found[-1] - old) / gap.reshape(-1, *[1] * (value.dim() - 1)).to(value.dtype))
    return found
