"""What turns projections into NVFP4 queries and keys: schemas and meanings in plain torch.

Both ops take the same description of how a token becomes a query or a key. ``x`` is one tensor, or two that stand one
behind the other along the tokens (text and image), ``[B, H, L, D]`` each with any strides. Each is normalised over its
D features, the whole is rotated: ``y[d] = n[d] * first[d] + n[partner(d)] * second[d]``. Everything is float32; the
type of the projection rounds nothing in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.quantized import block_means, heads_of, repeat_blocks
from ..attention.recipe import QUERIES
from ..formats import format_of
from ..operands import check_float
from ..quantize.op import contiguous, normalized

NORMS = ("none", "layer", "rms")
MOST_PIECES = 2
"""Tensors that may stand one behind the other: what a joint attention has."""

MAX_HEAD = 256
"""The most features of a head that the kernels take."""

FORMAT, _BLOCK = "nvfp4", 16


def smooth_queries_reference(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
) -> list[Tensor]:
    """Queries without the mean of each :data:`QUERIES` of them, and those means.

    What is no number counts as zero in a mean, and makes its query NaN.

    Args:
        x: one or two ``[B, H, L, D]``, float32, bfloat16 or float16, any strides.
        norm: one of :data:`NORMS`, over the features.
        eps: added to the variance or the mean square.
        weight, bias: the norm's own, ``[D]`` for each of ``x``, or nothing.
        tables: nothing, or ``first`` and ``second``, float32 ``[B or 1, H or 1, L, D]`` for the L tokens of all ``x``.
        distance: of the features that are rotated together, see :func:`partners`.

    Returns:
        NVFP4 parts along the features, padded with zeros to a multiple of 16; float32 means
        ``[B, H, ceil(L / QUERIES), D]``.

    Raises:
        TypeError: a type is not one of those.
        ValueError: shapes do not fit, or the norm is unknown.
    """
    check_smooth(x, norm, weight, bias, tables, distance)
    y = turned(x, norm, eps, weight, bias, tables, distance)
    means = block_means(y)
    return contiguous([*_parts(y - repeat_blocks(means, y.shape[2])), means])


def smooth_keys_reference(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
    means: Tensor,
) -> list[Tensor]:
    """Keys without their mean over the tokens, and what their product with the queries' means adds to the scores.

    What is no number makes all keys of its head NaN.

    Args:
        x, norm, eps, weight, bias, tables, distance: as for :func:`smooth_queries_reference`, with ``G`` heads.
        means: of the queries, float32 ``[B, H, n, D]``; ``G`` divides ``H``.

    Returns:
        NVFP4 parts along the features, padded with zeros to a multiple of 16; float32 ``[B, H, n, L]``.

    Raises:
        TypeError, ValueError: as :func:`smooth_queries_reference`; the means do not fit.
    """
    B, G, _, D = check_smooth(x, norm, weight, bias, tables, distance)
    check_means(means, B, G, D)
    y = turned(x, norm, eps, weight, bias, tables, distance)
    y = y - y.mean(-2, keepdim=True)
    return contiguous([*_parts(y), means @ heads_of(y, means.shape[1]).mT])


def turned(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
) -> Tensor:
    """``x`` normalised and rotated, ``[B, H, L, D]``; float32, or float64 where ``x`` is."""
    pieces = [piece if piece.dtype == torch.float64 else piece.float() for piece in x]
    if norm != "none":
        none: list[Tensor | None] = [None] * len(pieces)
        weights, biases = ([vector.to(pieces[0].dtype) for vector in own] or none for own in (weight, bias))
        pieces = [normalized(p, norm, eps, w, b) for p, w, b in zip(pieces, weights, biases, strict=True)]
    y = torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]
    if not tables:
        return y
    first, second = tables
    return y * first + y[..., partners(y.shape[-1], distance, y.device)] * second


def partners(features: int, distance: int, device: torch.device | str = "cpu") -> Tensor:
    """The feature that each one is rotated with, int64 ``[features]``.

    Features are taken ``distance`` at a time, each such group with the next: 1 pairs neighbours, half of the head the
    two halves, a sixth the halves of each of three axes. A feature without a partner is its own.
    """
    own = torch.arange(features, device=device)
    other = torch.where(own // distance % 2 == 0, own + distance, own - distance)
    return torch.where(other < features, other, own)


def _parts(y: Tensor) -> list[Tensor]:
    return format_of(FORMAT).quantize(F.pad(y, (0, -y.shape[-1] % _BLOCK)))


def check_smooth(
    x: Sequence[Tensor],
    norm: str,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
) -> tuple[int, int, int, int]:
    """The shape ``[B, H, L, D]`` of all tokens; TypeError or ValueError where operands do not fit each other."""
    if not 1 <= len(x) <= MOST_PIECES:
        raise ValueError(f"one or {MOST_PIECES} tensors of tokens are wanted, got {len(x)}")
    for piece in x:
        check_float(piece, "x")
        if piece.dim() != 4 or piece.dtype != x[0].dtype:
            raise ValueError(f"tokens are [B, H, L, D] of one type, got {piece.dtype} {tuple(piece.shape)}")
        if (*piece.shape[:2], piece.shape[3]) != (*x[0].shape[:2], x[0].shape[3]):
            raise ValueError(f"tokens {tuple(x[0].shape)} and {tuple(piece.shape)} do not fit one behind the other")
    B, H, _, D = x[0].shape
    L = sum(piece.shape[2] for piece in x)
    if D == 0 or distance < 1:
        raise ValueError(f"heads have features, and a distance between them: got {D} and {distance}")
    if norm not in NORMS:
        raise ValueError(f"norm is one of {', '.join(NORMS)}; got {norm!r}")
    for name, vectors in (("weight", weight), ("bias", bias)):
        if vectors and (norm == "none" or len(vectors) != len(x)):
            raise ValueError(f"{len(vectors)} of {name} for {len(x)} tensors of tokens and norm {norm!r}")
        for vector in vectors:
            check_float(vector, name)
            if vector.shape != (D,):
                raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected {(D,)}")
    if tables and len(tables) != 2:
        raise ValueError(f"a rotation has two tables, got {len(tables)}")
    for table in tables:
        if table.dtype != torch.float32:
            raise TypeError(f"tables are float32, got {table.dtype}")
        if (
            table.dim() != 4
            or table.shape[0] not in (1, B)
            or table.shape[1] not in (1, H)
            or table.shape[2:] != (L, D)
        ):
            raise ValueError(f"tables are [{B} or 1, {H} or 1, {L}, {D}], got {tuple(table.shape)}")
    return B, H, L, D


def check_means(means: Tensor, B: int, G: int, D: int) -> None:
    """Raises unless ``means`` are those of queries that ``G`` heads of keys serve."""
    if means.dtype != torch.float32:
        raise TypeError(f"means are float32, got {means.dtype}")
    if means.dim() != 4 or means.shape[0] != B or means.shape[3] != D or G == 0 or means.shape[1] % G:
        raise ValueError(f"means are [{B}, a multiple of {G}, n, {D}], got {tuple(means.shape)}")


_TOKENS = "Tensor[] x, str norm, float eps, Tensor[] weight, Tensor[] bias, Tensor[] tables, int distance"

smooth_queries = torch.library.custom_op(
    "ditc::smooth_queries", smooth_queries_reference, mutates_args=(), schema=f"({_TOKENS}) -> Tensor[]"
)
smooth_keys = torch.library.custom_op(
    "ditc::smooth_keys", smooth_keys_reference, mutates_args=(), schema=f"({_TOKENS}, Tensor means) -> Tensor[]"
)


def empty_parts(like: Tensor, B: int, H: int, L: int, D: int) -> list[Tensor]:
    """Memory for the NVFP4 parts of ``[B, H, L, D]``, padded along D."""
    types = format_of(FORMAT).part_types((B, H, L, D + -D % _BLOCK))
    return [like.new_empty(shape, dtype=dtype) for shape, dtype in types]


@smooth_queries.register_fake
def _(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
) -> list[Tensor]:
    B, H, L, D = check_smooth(x, norm, weight, bias, tables, distance)
    return [*empty_parts(x[0], B, H, L, D), x[0].new_empty((B, H, -(-L // QUERIES), D), dtype=torch.float32)]


@smooth_keys.register_fake
def _(
    x: Sequence[Tensor],
    norm: str,
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    distance: int,
    means: Tensor,
) -> list[Tensor]:
    B, G, L, D = check_smooth(x, norm, weight, bias, tables, distance)
    check_means(means, B, G, D)
    return [*empty_parts(x[0], B, G, L, D), means.new_empty((B, *means.shape[1:3], L))]
