"""Noise that belongs to a sample's seed, whatever else is in its batch."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def step_seed(seed: int, step: int) -> int:
    """The seed of the fresh noise of one step: a hash of both, so that neither close seeds nor steps are related."""
    message = seed.to_bytes(8, "little") + step.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"ditc.noise").digest(), "little") >> 1


def draw_noise(
    seeds: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu", step: int | None = None
) -> Tensor:
    """Standard normal noise: sample i depends on `seeds[i]` and `step` alone.

    It is drawn on the CPU, one generator for each sample, so that it is the same on every device and in every batch.

    Args:
        seeds: B integers in [0, 2**63), which need not differ.
        shape: of one sample, without the batch.
        step: None for the noise that a generation starts from, k for the fresh noise of its step k.

    Returns:
        (B, *shape) fp32 on `device`.
    """
    if len(seeds) == 0:
        raise ValueError("seeds are empty: one for each sample is needed")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seeds must be integers in [0, 2**63); got {seed!r}")
    if step is not None and step < 0:
        raise ValueError(f"step must be at least 0; got {step}")
    own = seeds if step is None else [step_seed(seed, step) for seed in seeds]
    noise = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in own]
    return torch.stack(noise).to(device)
