"""Cost: how long an attention takes in each recipe on a device.

The same tables as for linears (:mod:`..quantize.tables`) hold rates and measured points. The roofline of one
attention over ``scores = B H Lq Lk``, of which the part ``seen`` is looked at::

    launch + max(2 D seen scores / rate of q k^T + 2 D seen scores / rate of p v,
                 seen scores / exponentials, bytes / bandwidth)      plus, for a recipe,
    3 launches + bytes of the operands' quantisation / bandwidth

and the points correct it as they do for linears: the estimate is the roofline times the ratio of measured to roofline
at the points around, so that it is exact at a point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ditc.kernels.attention import RECIPES, recipe_of
from ditc.kernels.formats import format_of

from ..quantize.cost import Estimate
from ..quantize.tables import BYTES, CPU_INT8, NATIVE, AttentionPoint, CostTable, DeviceKind, table_for

TYPICAL_SQNR = {NATIVE: math.inf, CPU_INT8: 37.0, **{name: recipe.sqnr for name, recipe in RECIPES.items()}}
"""dB of the output on Gaussian data (heads of 64 features, 1024 tokens)."""


@dataclass(frozen=True)
class Size:
    """What the cost of an attention depends on: batch, heads of queries and of keys, queries, keys, features."""

    B: int
    H: int
    G: int
    Lq: int
    Lk: int
    D: int


def estimate(
    size: Size,
    device: DeviceKind | torch.device | str,
    recipe: str,
    dtype: torch.dtype,
    *,
    seen: float = 1.0,
    kept: float = 1.0,
    table: CostTable | None = None,
) -> Estimate:
    """How long an attention takes.

    Args:
        size: of the attention.
        device: where it runs.
        recipe: ``native``, ``int8`` (the CPU's op) or one of :data:`ditc.kernels.attention.RECIPES`.
        dtype: float32, bfloat16 or float16: of the operands and the output.
        seen: the part of the scores that is looked at, by native attention too: half of them where it is causal.
        kept: the part of those that the recipe looks at, windowed.
        table: instead of the one that ships for the device.

    Raises:
        CostError: no table is known for the device, or it has no rate of the dtype.
        ValueError: an unknown recipe or dtype, or an empty size.
    """
    if min(size.B, size.H, size.G, size.Lq, size.Lk, size.D) < 1:
        raise ValueError(f"an attention of {size} costs nothing to estimate")
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise ValueError(f"the cost of {name} attention is not known; of {', '.join(BYTES)} it is")
    if recipe not in (NATIVE, CPU_INT8):
        recipe_of(recipe)
    kind = device if isinstance(device, DeviceKind) else DeviceKind.of(device)
    table = table or table_for(kind)
    name = table.dtype(name)
    plain = _seconds(table, size, NATIVE, name, seen)
    seconds = plain if recipe == NATIVE else _seconds(table, size, recipe, name, seen * kept)
    return Estimate(seconds, plain, _source(table, recipe))


def roofline(table: CostTable, size: Size, recipe: str, dtype: str, seen: float) -> float:
    """Seconds of one attention by rates and bytes alone; ``dtype`` is one that the table has a rate of."""
    width, own = BYTES[dtype], table.rates[dtype]
    scores = size.B * size.H * size.Lq * size.Lk * seen
    queries, keys = size.B * size.H * size.Lq * size.D, size.B * size.G * size.Lk * size.D
    flops = 2 * scores * size.D
    bounds = [scores / table.attention.exponentials] if table.attention.exponentials else []
    if recipe == NATIVE:
        bounds += [2 * flops / own, (2 * queries + 2 * keys) * width / table.bandwidth]
        return table.launch + max(bounds)
    products = flops / _rate(table, qk_format(recipe), own) + flops / _rate(table, pv_format(recipe), own)
    bits, value_bits = _bits(qk_format(recipe)), _bits(pv_format(recipe))
    read = ((queries + keys) * bits + keys * value_bits) / 8
    bounds += [products, (read + queries * width) / table.bandwidth]
    # keys are read once more for their mean
    moved = (queries + 3 * keys) * width + read
    # the CPU's op is one call from float to float
    launches = 1 if recipe == CPU_INT8 else 4
    return launches * table.launch + max(bounds) + moved / table.bandwidth


def qk_format(recipe: str) -> str:
    """The format of queries and keys."""
    return "int8" if recipe == CPU_INT8 else recipe_of(recipe).qk


def pv_format(recipe: str) -> str:
    """The format of values and of the softmax weights."""
    return "int8" if recipe == CPU_INT8 else recipe_of(recipe).pv


def _bits(format: str) -> float:
    return 16 if format == "fp16" else format_of(format).bits


def _rate(table: CostTable, format: str, own: float) -> float:
    """Of products in a format; where the device has no arithmetic for it, operands are decoded tile by tile."""
    half = table.rates.get("float16", table.rates.get("bfloat16", own))
    return half if format == "fp16" else table.rates.get(format, half)


def _seconds(table: CostTable, size: Size, recipe: str, dtype: str, seen: float) -> float:
    return roofline(table, size, recipe, dtype, seen) * math.exp(_correction(table, size, recipe, dtype))


def _correction(table: CostTable, size: Size, recipe: str, dtype: str) -> float:
    """Logarithm of measured by roofline around a size: the points' mean, weighted by distance in doublings."""
    series = [point for point in table.attention.points if point.recipe == recipe]
    # another dtype multiplies the same codes; native attention of another dtype is another kernel
    points = [p for p in series if p.dtype == dtype] or ([] if recipe == NATIVE else series)
    total = weights = 0.0
    for point in points:
        ratio = math.log(point.seconds / roofline(table, _size(point), recipe, point.dtype, 1.0))
        pairs = ((size.B * size.H, point.B * point.H), (size.Lq, point.Lq), (size.Lk, point.Lk), (size.D, point.D))
        distance = sum(math.log2(a / b) ** 2 for a, b in pairs)
        if distance == 0:
            return ratio
        total, weights = total + ratio / distance**2, weights + distance**-2
    return total / weights if weights else 0.0


def _size(point: AttentionPoint) -> Size:
    return Size(point.B, point.H, point.H, point.Lq, point.Lk, point.D)


def _source(table: CostTable, recipe: str) -> str:
    text = table.source.text
    if not table.attention.points and table.source.kind == "measured":
        text += "; of its attention only the rates of linears"
    if recipe != NATIVE and recipe != CPU_INT8 and qk_format(recipe) not in table.rates:
        text += f"; no arithmetic in {qk_format(recipe)} here: decoded tile by tile"
    return text
