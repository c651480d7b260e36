"""Tile sizes of the Triton GEMMs, by architecture, kind and number of rows.

Chosen by what fits: the stages of operand tiles into the shared memory of a program (227 KiB on sm_90 and sm_100,
163 KiB on sm_80, 99 KiB on sm_86, sm_89 and sm_120), accumulators into registers. Not tuned by measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FEW, SOME = 16, 64
"""Up to so many rows a smaller tile is used."""

Kind = Literal["int8", "fp8", "blocks", "native", "weight", "weight32"]
"""int8; fp8; block formats decoded; block formats multiplied as they are; only the weight quantised, activations of
16 bits; the same of 32 bits."""


@dataclass(frozen=True)
class Tile:
    """What one program computes, ``[M, N]`` in steps of ``K``, and with what."""

    M: int
    N: int
    K: int
    warps: int
    stages: int
    group: int = 8
    """How many rows of tiles are walked together."""

    def programs(self, M: int, N: int) -> int:
        """How many programs cover a result ``[M, N]``."""
        return -(-M // self.M) * -(-N // self.N)

    def constants(self, K: int) -> dict[str, int | bool]:
        """The kernels' compile-time arguments for sums of ``K`` products."""
        return {
            "BLOCK_M": self.M, "BLOCK_N": self.N, "BLOCK_K": self.K, "GROUP": self.group, "MASKED": K % self.K != 0,
        }  # fmt: skip


# few rows, some rows, many rows; an FP8 tile on Hopper has two accumulators, one of them short
_ROOMY: dict[Kind, tuple[Tile, Tile, Tile]] = {
    "int8": (Tile(16, 64, 256, 4, 4), Tile(64, 128, 128, 4, 4), Tile(128, 256, 128, 8, 3)),
    "fp8": (Tile(16, 64, 256, 4, 4), Tile(64, 128, 128, 4, 4), Tile(128, 128, 128, 8, 4)),
    "blocks": (Tile(16, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 4)),
    "native": (Tile(128, 32, 256, 4, 4), Tile(128, 64, 256, 4, 4), Tile(128, 256, 128, 8, 4)),
    "weight": (Tile(16, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 4)),
    "weight32": (Tile(16, 64, 64, 4, 4), Tile(64, 64, 32, 4, 4), Tile(128, 128, 32, 8, 3)),
}
_TIGHT: dict[Kind, tuple[Tile, Tile, Tile]] = {
    "int8": (Tile(16, 64, 256, 4, 4), Tile(64, 128, 128, 4, 3), Tile(128, 128, 128, 8, 2)),
    "fp8": (Tile(16, 64, 256, 4, 4), Tile(64, 128, 128, 4, 3), Tile(128, 128, 128, 8, 2)),
    "blocks": (Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 2)),
    "native": (Tile(16, 64, 256, 4, 3), Tile(64, 64, 128, 4, 3), Tile(128, 128, 128, 8, 3)),
    "weight": (Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 4, 2)),
    "weight32": (Tile(16, 64, 64, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
}
_ROOMY_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))


def tile_for(kind: Kind, M: int, capability: tuple[int, int]) -> Tile:
    """The tile for a result of ``M`` rows on a device of ``capability``."""
    table = _ROOMY if capability in _ROOMY_CAPABILITIES else _TIGHT
    return table[kind][0 if M <= FEW else 1 if M <= SOME else 2]
