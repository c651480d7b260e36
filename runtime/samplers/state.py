"""What every step of a sampler asks of its tensors, and arithmetic on levels that are numbers or tensors."""

import math

import torch
from torch import Tensor

Level = Tensor | float
"""A noise level or time: a number, a scalar tensor, or one that broadcasts against the sample, such as (B, 1, 1, 1)."""


def check_state(x: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
    """Check a sample and what belongs to it, and widen the latter to the sample's dtype.

    Args:
        x: the sample, any shape, fp32 or fp64.
        others: tensors of the sample's shape, any floating dtype, by the name that messages give them.

    Returns:
        `others`, in order, in the dtype of `x`.

    Raises:
        TypeError: where `x` is of less than fp32.
        ValueError: where a shape differs, which would broadcast silently.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a trajectory is kept in fp32 or fp64, since rounding adds up over steps; got {x.dtype}")
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{name} must have the sample's shape {tuple(x.shape)}; got {tuple(other.shape)}")
    return tuple(other.to(x.dtype) for other in others.values())


def sqrt(value: Level) -> Level:
    """The square root; of a number on the host, of a tensor where it lies."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def cos_sin(angle: Level) -> tuple[Level, Level]:
    """Cosine and sine; of a number on the host, of a tensor where it lies."""
    if isinstance(angle, Tensor):
        return angle.cos(), angle.sin()
    return math.cos(angle), math.sin(angle)
