"""What operands of ditc's ops must be: checks that several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_float(x: Tensor, name: str) -> None:
    """Raises TypeError unless ``x`` is float32, bfloat16 or float16."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


def check_rows(x: Tensor, name: str) -> None:
    """As :func:`check_float`, and ValueError for a scalar, which has no rows."""
    check_float(x, name)
    if x.dim() == 0:
        raise ValueError(f"{name} needs at least one dimension, got a scalar")


def check_static(static: Tensor | None) -> None:
    """Raises unless ``static`` is ``None`` or one float32 number."""
    if static is not None and (static.dtype != torch.float32 or static.dim() != 0):
        raise ValueError(f"a static scale is one float32 number (), got {static.dtype} {tuple(static.shape)}")
