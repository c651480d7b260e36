"""Which blocks of keys are worth looking at: a threshold on the scores of pooled queries and keys, without training.

After SpargeAttention (2502.18137): queries and keys are averaged over blocks of 64 tokens; a block of keys is skipped
where its pooled weight is below ``threshold`` times the largest of its row. A mean stands for its block only where the
block's tokens resemble each other, so blocks whose tokens do not are always looked at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized import heads_of
from .visible import SPARSE_BLOCK, check_visible

ALIKE = 0.3
"""Least cosine similarity, averaged over pairs of a block's tokens, at which their mean may stand for the block."""

_HIDES = 5000.0
"""A key whose additive mask is so far below the largest of its row is not seen: models write -10000 for -inf."""


def attention_blocks(
    q: Tensor, k: Tensor, scale: float, threshold: float, mask: Tensor | None = None, causal: bool = False,
    window: int = -1,
) -> Tensor:  # fmt: skip
    """The block map of an attention, in traceable torch.

    A larger threshold keeps a part of what a smaller one keeps. What is no number is looked at.

    Args:
        q: float ``[B, H, Lq, D]``.
        k: float ``[B, G, Lk, D]``; ``G`` divides ``H``.
        scale: what scores are multiplied by.
        threshold: from 0 (all blocks) to 1 (only the best block, and what is not alike).
        mask, causal, window: what is seen, see :func:`ditc.kernels.attention.visible.check_visible`; a block of which
            nothing is seen is not looked at, and a floating mask counts with its largest entry of a block.

    Returns:
        bool ``[B, H, ceil(Lq / 64), ceil(Lk / 64)]``. Every row that sees any key sees one in a block that is kept.

    Raises:
        ValueError: a threshold outside [0, 1], or what :func:`check_visible` refuses.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold = {threshold}: from 0 to 1 is wanted")
    (B, H, Lq, _), Lk = q.shape, k.shape[-2]
    check_visible(B, H, Lq, Lk, mask, causal, None, window)
    queries, alike_q, _ = _pool(q.float())
    keys, alike_k, count = _pool(heads_of(k.float() - k.float().mean(-2, keepdim=True), H))
    scores = queries @ keys.mT * scale + count.log()
    trusted = (alike_q >= ALIKE).unsqueeze(-1) & (alike_k >= ALIKE).unsqueeze(-2)
    if mask is None and not causal and window < 0:
        return _keep(scores, trusted, threshold)
    if mask is not None and mask.is_floating_point():
        scores = scores + _largest(mask.float())
    seen = _seen_rows(Lq, Lk, mask, causal, window, q.device)
    possible = seen.any(-2)
    scores = scores.masked_fill(~possible, float("-inf"))
    kept = _keep(scores, trusted, threshold)
    # rows that would see nothing in the best blocks of theirs look at all that they see: whatever the threshold is,
    # so that the map stays monotone in it
    best = _keep(scores, trusted, 1.0) & possible
    sees = seen.float()
    alone = (sees @ best.float().unsqueeze(-1)) == 0
    wanted = (alone.mT.float() @ sees).squeeze(-2) > 0
    return (kept | wanted) & possible


def _keep(scores: Tensor, trusted: Tensor, threshold: float) -> Tensor:
    """Which blocks are near the largest of their row, or cannot be judged; NaN compares false and is kept."""
    near = (scores - scores.amax(-1, keepdim=True)).exp()
    return ~(near < threshold) | ~trusted | ~scores.isfinite()


def _pool(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``[B, H, n, D]`` of blocks of tokens, how alike ``[B, H, n]`` and how many ``[n]`` their tokens are."""
    L = x.shape[-2]
    count = (L - SPARSE_BLOCK * torch.arange(-(-L // SPARSE_BLOCK), device=x.device)).clamp(max=SPARSE_BLOCK)
    count = count.to(x.dtype)
    means = _blocked(x, -2, 0.0).sum(-2) / count.unsqueeze(-1)
    # the mean of all pairs' cosine similarities is the squared length of the mean of the directions
    directions = _blocked(F.normalize(x, dim=-1), -2, 0.0).sum(-2) / count.unsqueeze(-1)
    return means, directions.square().sum(-1), count


def _blocked(x: Tensor, dim: int, padding: float) -> Tensor:
    """Dimension ``dim`` (-1 or -2) as blocks ``[..., n, 64, ...]``, the last one padded."""
    L = x.shape[dim]
    n = -(-L // SPARSE_BLOCK)
    pad = (0, n * SPARSE_BLOCK - L) if dim == -1 else (0, 0, 0, n * SPARSE_BLOCK - L)
    return torch.unflatten(F.pad(x, pad, value=padding), dim, (n, SPARSE_BLOCK))


def _largest(mask: Tensor) -> Tensor:
    """The largest entry of each block of a float mask, broadcast to ``[B or 1, H or 1, n or 1, m or 1]``."""
    mask = mask.expand(*(1,) * (4 - mask.dim()), *mask.shape)
    if mask.shape[-1] != 1:
        mask = _blocked(mask, -1, float("-inf")).amax(-1)
    if mask.shape[-2] != 1:
        mask = _blocked(mask, -2, float("-inf")).amax(-2)
    return mask


def _seen_rows(Lq: int, Lk: int, mask: Tensor | None, causal: bool, window: int, device: torch.device) -> Tensor:
    """bool ``[B or 1, H or 1, n or 1, 64 or 1, m]``: whether a query, or every query, sees any key of a block."""
    queries = torch.arange(Lq, device=device).unsqueeze(-1)
    first = queries - window if window >= 0 else torch.zeros_like(queries)
    last = queries + window if window >= 0 and not causal else queries if causal else first + Lk
    if mask is None:
        # keys from first to last: no need to look at each
        begin = SPARSE_BLOCK * torch.arange(-(-Lk // SPARSE_BLOCK), device=device)
        return _blocked((begin <= last) & (begin + SPARSE_BLOCK > first), -2, False)[None, None]
    seen = mask if mask.dtype == torch.bool else _sees(mask.float())
    seen = seen.expand(*(1,) * (4 - seen.dim()), *seen.shape)
    seen = seen.expand(*seen.shape[:3], Lk)
    if causal or window >= 0:
        keys = torch.arange(Lk, device=device)
        seen = seen & (keys <= last) & (keys >= first)
    seen = _blocked(seen, -1, False).any(-1)
    return seen.unsqueeze(-2) if seen.shape[-2] == 1 else _blocked(seen, -2, False)


def _sees(mask: Tensor) -> Tensor:
    """Which entries of a float mask let a key be seen; NaN does."""
    largest = mask.amax(-1, keepdim=True) if mask.dim() > 0 else mask
    return (mask != float("-inf")) & ~(mask < largest - _HIDES)
