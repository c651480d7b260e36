"""An attention that is written out as products around a softmax: what it consists of, and the same as one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx


class Unproven(Exception):  # noqa: N818 - an outcome, not a fault
    """Why a subgraph is not known to be an attention."""


@dataclass(frozen=True)
class Mask:
    """What stands on the scores: ``hide`` (bool, true hides), ``show`` (bool, true shows), or ``add``."""

    kind: str
    node: fx.Node
    factor: float = 1.0


@dataclass(frozen=True)
class Written:
    """An attention as it was found.

    Attributes:
        query, key, value: operands of the two products.
        query_order, key_order, value_order: permutations that bring them to ``[..., L, D]``.
        output_order: the permutation of ``[..., Lq, D]`` that the second product makes.
        scale: of the scores.
        masks: on the scores; all of them stand where the scores have the leading sizes ``lead``.
        lead: sizes before the last two, -1 for symbolic ones, that the call is made with.
        output_lead: the same of the second product's result, before ``output_order``.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    query_order: tuple[int, ...]
    key_order: tuple[int, ...]
    value_order: tuple[int, ...] = ()
    output_order: tuple[int, ...] = ()
    scale: float = 1.0
    masks: tuple[Mask, ...] = ()
    lead: tuple[int, ...] = ()
    output_lead: tuple[int, ...] = ()


def as_one_call(found: Written, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The function of query, key, value and the masks' tensors that computes it, in ``dtype``, by one call."""

    def run(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
        q = query.permute(found.query_order).to(dtype)
        k = key.permute(found.key_order).to(dtype)
        v = value.permute(found.value_order).to(dtype)
        inner = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])  # type: ignore[no-untyped-call]
        q, k = (_spread(x, inner, found.lead) for x in (q, k))
        v = _spread(v, inner if v.dim() == len(inner) + 2 else v.shape[:-2], found.lead)
        y = F.scaled_dot_product_attention(q, k, v, _combined(found.masks, masks, dtype), scale=found.scale)
        if len(found.lead) != len(found.output_lead):
            y = y.reshape(*found.output_lead, *y.shape[-2:])
        return y.permute(found.output_order)

    return run


def _spread(x: Tensor, inner: Sequence[Any], lead: Sequence[int]) -> Tensor:
    """``[..., L, D]``, its leading sizes repeated to ``inner`` and written as ``lead``."""
    if tuple(x.shape[:-2]) != tuple(inner):
        x = x.expand(*inner, *x.shape[-2:])
    return x if len(inner) == len(lead) else x.reshape(*lead, *x.shape[-2:])


def _combined(masks: Sequence[Mask], tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """One mask of what stands on the scores: bool (true shows) or floating."""
    seen: Tensor | None = None
    added: Tensor | None = None
    for mask, tensor in zip(masks, tensors, strict=True):
        if mask.kind == "add":
            part = tensor if mask.factor == 1 else tensor * mask.factor
            added = part if added is None else added + part
        else:
            part = tensor if mask.kind == "show" else ~tensor
            seen = part if seen is None else seen & part
    if added is None:
        return seen
    added = added.to(dtype)
    return added if seen is None else torch.where(seen, added, -math.inf)
