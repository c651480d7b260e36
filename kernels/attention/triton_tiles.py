"""Tile sizes of the Triton attention, by head size, number of queries and architecture.

Chosen by what compiles without spilling registers and fits into the shared memory of a program (227 KiB on sm_90 and
sm_100, 163 KiB on sm_80, 99 KiB on sm_86, sm_89 and sm_120). Not tuned by measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW = 64
"""Up to so many queries a smaller tile is used, where the products admit one."""

_ROOMY = ((8, 0), (9, 0))


@dataclass(frozen=True)
class Tile:
    """What one program computes and with what."""

    M: int
    """Queries; divides 128."""
    warps: int
    stages: int
    """Tiles of keys and values in flight, and one in use."""


def block_of(features: int, native: bool = False) -> int:
    """The power of two that holds a head's features, what tiles are padded to.

    Products of bytes need 32 at least, ``native`` ones of NVFP4 64.
    """
    return max(64 if native else 32, 1 << (features - 1).bit_length())


def tile_for(qk: str, native: bool, features: int, queries: int, capability: tuple[int, int]) -> Tile:
    """The tile for a recipe with ``qk`` scores, heads of ``features`` and so many ``queries``.

    ``native`` is NVFP4 by block-scaled products; those of sm_100 have 128 rows. Where NVFP4 is decoded, or its weights
    encoded, and where the result of a large head takes half of the registers, tiles are smaller.
    """
    large, own_memory = block_of(features) > 128, capability[0] in (10, 11)
    if native and own_memory:
        return Tile(128, 8, 2)
    if large:
        return Tile(32 if qk == "nvfp4" else 64, 8, 2)
    if qk == "nvfp4" and not native and capability[0] != 9 and not own_memory:
        return Tile(64, 8, 2)
    if queries <= FEW:
        return Tile(64, 4, 2)
    return Tile(128, 8, 3 if capability in _ROOMY or own_memory else 2)
