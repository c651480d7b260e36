"""Operands that tests of several kernels share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """``normal(*shape, seed=0, dtype=float32)``: seeded Gaussian numbers."""
    return _normal
