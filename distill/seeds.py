"""Seeds made of several integers: every draw of a training belongs to its update, and no generator state is stored."""

import torch

_MASK64 = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several integers (SplitMix64, Steele et al. 2014): neighbours give unrelated streams."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state >> 1


def seeded(*parts: int) -> torch.Generator:
    """A CPU generator for the stream that these integers name."""
    return torch.Generator().manual_seed(mix_seed(*parts))
