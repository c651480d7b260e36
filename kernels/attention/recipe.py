"""Recipes: in which formats the two products of an attention run, and what that costs in precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

QK = Literal["int8", "fp8", "nvfp4"]
PV = Literal["fp16", "fp8", "nvfp4"]

KEYS = 64
"""Keys of a tile: softmax weights are rounded relative to the largest score of a row so far, tile after tile."""

QUERIES = 128
"""Queries that share one subtracted mean where a recipe smooths queries."""

VALUE_BLOCK = 16
"""Tokens that share a scale in NVFP4 values and weights: their number is padded to a multiple of it."""


@dataclass(frozen=True)
class Recipe:
    """How one attention is quantised.

    Attributes:
        name: as an op's argument.
        qk: format of queries and keys along the features; one scale for each token (int8, fp8), or NVFP4 blocks.
        pv: format of values along the tokens, and of the softmax weights; ``fp16`` divides each channel of the values
            by a power of two, so that none overflows: bfloat16 and float16 keep all their bits.
        smooth_keys: keys lose their mean over tokens, which softmax does not see.
        smooth_queries: queries lose the mean of each :data:`QUERIES` of them; what that takes from the scores is added
            back in float32.
        sqnr: dB of the output on Gaussian data (head of 64, 1024 tokens), the least that is to be expected.
    """

    name: str
    qk: QK
    pv: PV
    sqnr: float
    smooth_keys: bool = True
    smooth_queries: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        r.name: r
        for r in (
            Recipe("int8_fp16", "int8", "fp16", 36.0),
            Recipe("int8_fp8", "int8", "fp8", 28.0),
            Recipe("fp8", "fp8", "fp8", 26.0),
            Recipe("nvfp4", "nvfp4", "nvfp4", 14.0, smooth_queries=True),
        )
    }
)
"""Every recipe of :func:`ditc.kernels.attention.attention_quantized` by its name.

``int8_fp16`` and ``int8_fp8`` are SageAttention's (2410.02367) and SageAttention 2's (2411.10958), ``nvfp4``
SageAttention 3's (2505.11594). All of them divide by the sum of the weights as they were rounded, where those divide
by the sum before rounding: so values that are all one give one, and the output keeps its magnitude.
"""


def recipe_of(name: str) -> Recipe:
    """The recipe called ``name``; ValueError, naming those there are, for any other."""
    if name not in RECIPES:
        raise ValueError(f"no attention recipe {name!r}: there are {', '.join(RECIPES)}")
    return RECIPES[name]
