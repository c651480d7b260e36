"""Recipes: in which formats the two products of an attention run, and what that costs in precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

QK = Literal["int8", "fp8", "nvfp4"]
PV = Literal["fp16", "fp8", "nvfp4"]

KEYS = 64
"""Keys of a tile: softmax weights are rounded relative to the largest score of a row so far, tile after tile."""

QUERIES = 128
"""Queries that share one subtracted mean where a recipe smooths queries."""

VALUE_BLOCK = 16
"""Tokens that share a scale in NVFP4 values and weights: their number is padded to a multiple of it."""


class Tolerance(NamedTuple):
    """How far an output y may be from exact attention w on the originals.

    It is stated for Gaussian queries, keys and values whose scores have a deviation of at most one, and for problems as
    small as 40 queries of 30 keys with heads of 32, where single roundings still show; larger ones are nearer. Peaked
    rows cost more: see :data:`RECIPES`.
    """

    relative_l1: float
    """Of ``sum(|y - w|) / sum(|w|)``, the largest."""
    cosine: float
    """Between y and w as vectors, the least."""
    magnitude: float
    """How far ``(y . w) / (w . w)`` may be from one: what an unbiased noise does not change, and a wrong sum does."""


@dataclass(frozen=True)
class Recipe:
    """How one attention is quantised.

    Attributes:
        name: as an op's argument.
        qk: format of queries and keys along the features; one scale for each token (int8, fp8), or NVFP4 blocks.
        pv: format of values along the tokens, and of the softmax weights; ``fp16`` divides each channel of the values
            by a power of two, so that none overflows; what is 2**-14 of its channel's largest or more loses no bit of
            bfloat16 or float16.
        smooth_keys: keys lose their mean over tokens, which softmax does not see.
        smooth_queries: queries lose the mean of each :data:`QUERIES` of them; what that takes from the scores is added
            back in float32.
        sqnr: dB of the output on Gaussian data (heads of 64 and 128, 1024 tokens), rounded down from what was measured.
        tolerance: what an output is held to.
    """

    name: str
    qk: QK
    pv: PV
    sqnr: float
    tolerance: Tolerance
    smooth_keys: bool = True
    smooth_queries: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        r.name: r
        for r in (
            Recipe("int8_fp16", "int8", "fp16", 40.0, Tolerance(0.012, 0.9999, 0.002)),
            Recipe("int8_fp8", "int8", "fp8", 28.0, Tolerance(0.06, 0.998, 0.015)),
            Recipe("fp8", "fp8", "fp8", 25.0, Tolerance(0.065, 0.998, 0.015)),
            Recipe("nvfp4", "nvfp4", "nvfp4", 13.5, Tolerance(0.26, 0.97, 0.065), smooth_queries=True),
        )
    }
)
"""Every recipe of :func:`ditc.kernels.attention.attention_quantized` by its name.

``int8_fp16`` and ``int8_fp8`` are SageAttention's (2410.02367) and SageAttention 2's (2411.10958), ``nvfp4``
SageAttention 3's (2505.11594). All of them divide by the sum of the weights as they were rounded, where those divide
by the sum before rounding: so values that are all one give one, and the output keeps its magnitude.

What peaked rows cost, dB on Gaussian data with heads of 64, 1024 tokens, scores of deviation 1, 3 and 8: int8_fp16 41,
35, 32; int8_fp8 29, 30, 29; fp8 26, 22, 19; nvfp4 14, 10, 8. An error of a score is a relative error of its weight, and
floating formats have errors that grow with the scores.
"""


def recipe_of(name: str) -> Recipe:
    """The recipe called ``name``; ValueError, naming those there are, for any other."""
    if name not in RECIPES:
        raise ValueError(f"no attention recipe {name!r}: there are {', '.join(RECIPES)}")
    return RECIPES[name]
