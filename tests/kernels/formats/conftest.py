"""Inputs on which quantisers go wrong, shared by the tests against each oracle."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch


def _ties(block: int, largest: float, steps: list[float]) -> torch.Tensor:
    """Blocks whose maximum is at or beside ``largest * 2**n`` and whose other values lie at and beside ties."""
    near = torch.tensor(steps)
    rows = []
    for exponent in (-20, -3, 0, 1, 9):
        for nudge in (-2, -1, 0, 1, 2):
            values = torch.cat([near, -near]).repeat(-(-block // (2 * len(steps))))[:block] * 2.0**exponent
            values = (values.view(torch.int32) + nudge).view(torch.float32)
            values[0] = (torch.tensor(largest * 2.0**exponent).view(torch.int32) + nudge).view(torch.float32)
            rows.append(values)
    return torch.stack(rows)


@pytest.fixture(scope="session")
def adversarial() -> Mapping[str, torch.Tensor]:
    """Float32 matrices, K divisible by 32, by what is hard about each; all numbers finite and of ordinary size."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 256, generator=g)
    steps = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5, 1.5, 3.0, 4.0, 6.0]
    outliers = normal.clone()
    outliers[::3, 5] = 300.0
    outliers[7, 100] = -2e4
    zeros = normal.clone()
    zeros[2] = 0
    zeros[5, 64:128] = 0
    zeros[6, 32:] = -0.0
    bytes_ = torch.randint(-256, 257, (64, 256), generator=g).float()
    return {
        "gaussian": normal,
        "large": normal * 1e20,
        "small": normal * 1e-20,
        "uniform": torch.rand(64, 256, generator=g) - 0.5,
        "heavy tails": normal / torch.rand(64, 256, generator=g).clamp(min=1e-3),
        "outliers": outliers,
        "rows of many sizes": normal * torch.randn(64, 1, generator=g).mul(5).exp(),
        "blocks of many sizes": (normal.view(64, 16, 16) * torch.randn(64, 16, 1, generator=g).mul(2).exp()).flatten(1),
        "zeros": zeros,
        "integers": bytes_,
        "bfloat16": normal.bfloat16().float(),
        "ties of fp4": _ties(32, 6.0, steps).repeat(1, 4),
        "ties of fp8": _ties(32, 448.0, [s * 64 for s in (1.0625, 1.1875, 1.3125, 1.4375, 1.5625, 1.6875, 2.125)]),
        "powers of two": 2.0 ** torch.randint(-12, 12, (64, 256), generator=g),
        "one value a block": torch.eye(64).repeat(1, 4) * normal.abs().clamp(min=1e-3),
    }
