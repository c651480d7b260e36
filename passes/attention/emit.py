"""One attention in a recipe, as plain torch to be traced into a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditc.kernels import smooth as _smooth  # registers the ops  # noqa: F401
from ditc.kernels.attention import attention_blocks, quantize_operands, quantize_values, recipe_of

from ..quantize.tables import CPU_INT8
from .tokens import Tokens


@dataclass(frozen=True)
class Call:
    """How an attention is computed, and what of it is looked at (all, for ``sparse`` 0 and ``window`` -1)."""

    recipe: str
    scale: float
    causal: bool
    sparse: float
    window: int


def attention(call: Call) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of queries, keys, values and perhaps a mask that computes an attention.

    Queries are ``[..., H, Lq, D]`` or ``[batch, Lq, D]``, keys and values alike with as many or fewer heads. It
    returns the output, shaped like the queries, and where blocks are skipped the part of all blocks that is kept,
    float32 ``()``.
    """

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        q, k, v = (four(x) for x in (query, key, value))
        if mask is not None and query.dim() == 3 and mask.dim() == 3:
            mask = mask.unsqueeze(1)
        seen = mask, call.causal
        blocks = None
        if call.sparse:
            blocks = attention_blocks(q, k, call.scale, call.sparse, *seen, call.window)
        y = _compute(q, k, v, call, (*seen, blocks, call.window))
        kept = None if blocks is None else blocks.float().mean()
        return y if query.dim() == 4 else y.reshape(query.shape), kept

    return run


def _compute(
    q: Tensor, k: Tensor, v: Tensor, call: Call, seen: tuple[Tensor | None, bool, Tensor | None, int]
) -> Tensor:
    if call.recipe == CPU_INT8:
        y: Tensor = torch.ops.ditc.attention_int8(q, k, v, call.scale, *seen)
    else:
        o = quantize_operands(q, k, v, recipe_of(call.recipe))
        y = torch.ops.ditc.attention_quantized(o.q, o.k, o.v, call.recipe, call.scale, q.dtype, o.bias, *seen)
    return y


def attention_of(
    call: Call, query: Tokens, key: Tokens, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """As :func:`attention` for NVFP4, on what queries and keys are made of.

    The function takes the values of ``query.nodes()``, of ``key.nodes()``, values ``[..., G, Lk, D]`` and perhaps a
    mask. Its result is ``[B, H, Lq, D]`` in ``dtype``.
    """

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        rest = iter(tensors)
        *q, means = torch.ops.ditc.smooth_queries(*query.arguments(rest))
        *k, bias = torch.ops.ditc.smooth_keys(*key.arguments(rest), means)
        v = quantize_values(next(rest), recipe_of(call.recipe))
        seen = next(rest, None), call.causal, None, call.window
        y: Tensor = torch.ops.ditc.attention_quantized(q, k, v, call.recipe, call.scale, dtype, bias, *seen)
        return y, None

    return run


def four(x: Tensor) -> Tensor:
    """``[B, H, L, D]``: a batch without heads has one, further dimensions in front belong to the batch."""
    if x.dim() == 3:
        return x.unsqueeze(1)
    return x if x.dim() == 4 else x.flatten(0, -4)
