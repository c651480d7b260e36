"""Which keys a query sees: masks, causality, windows and blocks, the same for every attention op."""

from __future__ import annotations

import torch
from torch import Tensor

SPARSE_BLOCK = 64
"""Queries and keys of one entry of a block map."""


def check_visible(
    B: int, H: int, Lq: int, Lk: int, mask: Tensor | None, causal: bool, blocks: Tensor | None, window: int
) -> None:
    """Refuses what does not fit the scores ``[B, H, Lq, Lk]``.

    Args:
        mask: bool (true: is seen) or floating (is added to the scores), broadcasts to the scores.
        causal: query i sees keys up to i, as in torch.
        blocks: bool ``[B, H, ceil(Lq / 64), ceil(Lk / 64)]``, which blocks of keys are looked at.
        window: query i sees keys from ``i - window`` to ``i + window``; -1 for all.

    Raises:
        TypeError: a mask or blocks of another dtype.
        ValueError: they do not broadcast, or ``window`` is below -1, or a window where lengths differ.
    """
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"a mask is bool or floating, got {mask.dtype}")
        if mask.dim() > 4 or any(
            size not in (1, full) for size, full in zip(reversed(mask.shape), (Lk, Lq, H, B), strict=False)
        ):
            raise ValueError(f"a mask of shape {tuple(mask.shape)} does not broadcast to {(B, H, Lq, Lk)}")
    if blocks is not None:
        wanted = (B, H, -(-Lq // SPARSE_BLOCK), -(-Lk // SPARSE_BLOCK))
        if blocks.dtype != torch.bool:
            raise TypeError(f"a block map is bool, got {blocks.dtype}")
        if tuple(blocks.shape) != wanted:
            raise ValueError(f"a block map of shape {wanted} is wanted, got {tuple(blocks.shape)}")
    if window < -1:
        raise ValueError(f"window = {window}: a number of positions is wanted, or -1 for all")
    if window >= 0 and Lq != Lk:
        raise ValueError(f"a window needs as many queries as keys, got {Lq} and {Lk}")


def hidden(
    scores: Tensor, mask: Tensor | None, causal: bool, blocks: Tensor | None, window: int, *, first_key: int = 0
) -> Tensor:
    """Float ``scores [B, H, Lq, n]`` of the keys from ``first_key`` on, less infinity where a key is not seen.

    As in torch, infinity is taken off rather than put in the score's place: what is no number stays visible in rows
    that do not see it. The other arguments are those of :func:`check_visible`, for all keys; a floating mask is added.
    """
    Lq, n = scores.shape[-2:]
    keys = torch.arange(first_key, first_key + n, device=scores.device)
    queries = torch.arange(Lq, device=scores.device).unsqueeze(-1)
    if mask is not None:
        part = mask if mask.dim() == 0 or mask.shape[-1] == 1 else mask[..., first_key : first_key + n]
        scores = scores + (_additive(part) if part.dtype == torch.bool else part.to(scores.dtype))
    if causal:
        scores = scores + _additive(keys <= queries)
    if window >= 0:
        scores = scores + _additive((keys - queries).abs() <= window)
    if blocks is not None:
        scores = scores + _additive(blocks[..., queries // SPARSE_BLOCK, keys // SPARSE_BLOCK])
    return scores


def _additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))
