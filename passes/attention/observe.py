"""Errors of the recipes on a model's own operands: what a calibration measures of an attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditc.kernels.attention import (
    QUERIES,
    RECIPES,
    attention_int8_reference,
    attention_quantized_reference,
    quantize_operands,
    recipe_of,
)
from ditc.kernels.formats import Format

from ..quantize.tables import CPU_INT8
from .emit import four

BATCH, HEADS, RUNS = 2, 2, 2
"""Evenly spread parts of the batch, heads, and runs of :data:`QUERIES` queries that are looked at; of keys all."""


def recipes_of(formats: Sequence[Format]) -> tuple[str, ...]:
    """The recipes that need no other formats than these."""
    names = {format.name for format in formats} | {"fp16"}
    fitting = tuple(recipe.name for recipe in RECIPES.values() if {recipe.qk, recipe.pv} <= names)
    return ((CPU_INT8,) if "int8" in names else ()) + fitting


def errors_of(
    arguments: Sequence[Any], scale: float | None, recipes: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Energy of an attention's output and of each recipe's error, float64 ``()``, on a sample.

    Args:
        arguments: positional ones of ``scaled_dot_product_attention``; queries may have more heads than keys.
        scale: ``None`` for the default.
        recipes: ``int8`` for the CPU's op, or names of the kernels' ``RECIPES``.
    """
    query, key, value, mask, _, causal = arguments
    if mask is not None and query.dim() == 3 and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    q, k, v, mask = _sample(four(query), four(key), four(value), mask, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    exact = F.scaled_dot_product_attention(q, k, v, mask, scale=scale).double()
    signal = exact.square().sum()
    return {name: (signal, (_run(name, q, k, v, scale, mask) - exact).square().sum()) for name in recipes}


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    if name == CPU_INT8:
        return attention_int8_reference(q, k, v, scale, mask).double()
    o = quantize_operands(q, k, v, recipe_of(name))
    return attention_quantized_reference(o.q, o.k, o.v, name, scale, torch.float32, o.bias, mask).double()


def _sample(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Float32 parts of the operands with as many heads of keys as of queries; what causality hides is in the mask."""
    (B, H, Lq, _), (_, G, Lk, _) = q.shape, k.shape
    batch, heads = (_spread(n, most, q.device) for n, most in ((B, BATCH), (H, HEADS)))
    rows = _rows(Lq, q.device)
    if mask is not None:
        mask = mask.expand(B, H, Lq, Lk)[batch][:, heads][:, :, rows]
        mask = mask if mask.dtype == torch.bool else mask.float()
    if causal:
        mask = torch.arange(Lk, device=q.device) <= rows.unsqueeze(-1)
    shared = torch.div(heads, H // G, rounding_mode="floor")
    return q[batch][:, heads][:, :, rows].float(), k[batch][:, shared].float(), v[batch][:, shared].float(), mask


def _rows(Lq: int, device: torch.device) -> Tensor:
    """Runs of queries that share a mean where a recipe smooths them, and so stay together."""
    count = -(-Lq // QUERIES)
    runs = _spread(count, RUNS, device)
    rows = (runs.unsqueeze(-1) * QUERIES + torch.arange(QUERIES, device=device)).flatten()
    return rows[rows < Lq]


def _spread(n: int, most: int, device: torch.device) -> Tensor:
    return torch.arange(0, n, -(-n // most), device=device)
