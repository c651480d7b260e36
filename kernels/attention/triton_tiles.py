"""Tile sizes of the Triton attention, by recipe, head size, number of queries and architecture.

Chosen by what compiles without spilling registers and fits into shared memory. Not tuned by measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW = 64
"""Up to so many queries a smaller tile is used, where the products admit one."""


@dataclass(frozen=True)
class Tile:
    """What one program computes and with what."""

    M: int
    """Queries; divides 128."""
    warps: int
    stages: int
    """Tiles of keys and values in flight."""


def block_of(features: int) -> int:
    """The power of two that holds a head's features: what tiles are padded to."""
    return max(16, 1 << (features - 1).bit_length())


def tile_for(qk: str, pv: str, native: bool, features: int, queries: int, capability: tuple[int, int]) -> Tile:
    """The tile for heads of ``features`` (the larger of the two products') and so many ``queries``."""
    block = block_of(features)
    if native and capability[0] == 10:  # a block-scaled product has 128 rows there
        return Tile(128, 8 if block > 64 else 4, 2)
    if queries <= FEW:
        return Tile(64, 4, 2)
    return Tile(128, 8, 2)
