"""Noise that belongs to a sample's seed, whatever else is in its batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(seeds: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise: sample i depends on `seeds[i]` alone.

    It is drawn on the CPU, one generator for each sample, so that it is the same on every device and in every batch.

    Args:
        seeds: B integers in [0, 2**63), which need not differ.
        shape: of one sample, without the batch.

    Returns:
        (B, *shape) fp32 on `device`.
    """
    if len(seeds) == 0:
        raise ValueError("seeds are empty: one for each sample is needed")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seeds must be integers in [0, 2**63); got {seed!r}")
    noise = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(device)
