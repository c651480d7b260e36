"""Proof that calls rotate features in pairs, however they are written, and the tables that do the same.

A rotation is ``y[d] = x[d] * first[d] + x[partner(d)] * second[d]`` for each token, with tables that the graph makes.
The calls themselves tell the tables: what they make of ones in the place of the features of one half of all pairs, and
of the other half. Whether these tables and no others do what the calls do is tested on random tensors, and random
tables: all that calls of a chain do is polynomial in both, so what agrees there agrees everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditc.kernels.smooth import partners

from .chain import Chain, Heads, Unfit

_EXACT = 1e-9


@dataclass(frozen=True)
class Rotation:
    """What a chain does to its sources.

    Attributes:
        order: of the sources along the tokens.
        distance: between features that are rotated together, see :func:`ditc.kernels.smooth.partners`.
        plain: whether it does nothing but put them one behind the other.
    """

    order: tuple[int, ...]
    distance: int
    plain: bool


def prove_rotation(chain: Chain, heads: int, features: int) -> Rotation:
    """What a chain of linear calls that ends in ``[B, H, L, D]`` does, for ``heads`` heads of ``features``.

    Raises:
        Unfit: it is no rotation; says what it is instead.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")

    sizes = piece_sizes(chain)
    shape = _shape(chain, heads)
    x = [normal(*shape, L, features) for L in sizes]
    complex_ = [node.meta["val"].is_complex() for node in chain.outside]
    tables = [
        normal(*node.meta["val"].shape, dtype=torch.complex128 if c else torch.float64)
        for node, c in zip(chain.outside, complex_, strict=True)
    ]
    try:
        y = run(chain, x, tables)
    except RuntimeError as error:
        raise Unfit(f"it does not run for one head alone ({error})") from error
    if y.shape[1] not in (1, heads) or y.shape[2:] != (sum(sizes), features):
        raise Unfit("tokens are left out or repeated on the way")
    order = (0,) if len(x) == 1 else _order(chain, x, tables)
    whole = torch.cat([x[i] for i in order], 2)
    if _close(whole.expand(y.shape), y):
        return Rotation(order, 1, True)
    for distance in _distances(chain, x, tables, features):
        own = first_half(features, distance, torch.float64, "cpu")
        first, second = masks_through(chain, sizes, shape, own, tables)
        if _close(whole * first + whole[..., partners(features, distance)] * second, y):
            return Rotation(order, distance, False)
    raise Unfit("what stands in front of it rotates no pairs of features")


def piece_sizes(chain: Chain) -> list[int]:
    """Tokens of each source."""
    found = []
    for source in chain.sources:
        heads = chain.heads[source]
        L = source.meta["val"].shape[1 if heads is None else 3 - heads]
        if not isinstance(L, int):
            raise Unfit("the number of tokens is symbolic")
        found.append(L)
    return found


def _shape(chain: Chain, heads: int) -> tuple[int, int]:
    """Samples and heads that a chain is run for: one, unless tables differ between samples, or heads lie flat."""
    batch = chain.end.meta["val"].shape[0]
    each = any(node.meta["val"].dim() > 2 and node.meta["val"].shape[0] == batch for node in chain.outside)
    return batch if each and isinstance(batch, int) else 1, heads if chain.front == 2 else 1


def run(chain: Chain, x: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
    """A chain on ``[1, H, L, D]`` for each of its sources."""
    heads = [chain.heads[source] for source in chain.sources]
    return chain([laid_out(piece, h) for piece, h in zip(x, heads, strict=True)], tables)


def laid_out(x: Tensor, heads: Heads) -> Tensor:
    """``[B, H, L, D]`` as a source has it."""
    if heads == 1:
        return x
    x = x.transpose(1, 2)
    return x if heads == 2 else x.flatten(2)


def masks_through(
    chain: Chain, sizes: Sequence[int], shape: tuple[int, int], own: Tensor, tables: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The two tables, ``[B or 1, H or 1, L, D]``, of a chain that rotates; plain torch, to be traced too.

    ``own`` is one at the features of the first half of all pairs, and zero at their partners, ``[D]``.
    """
    there, here = (run(chain, [mask.expand(*shape, L, own.shape[0]) for L in sizes], tables) for mask in (own, 1 - own))
    first = own > 0
    return torch.where(first, there, here), torch.where(first, here, there)


def first_half(features: int, distance: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """One at the features that come before their partners, ``[D]``, or have none."""
    return (torch.arange(features, device=device) // distance % 2 == 0).to(dtype)


def tables_of(chain: Chain, heads: int, features: int, distance: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of a chain's outside tensors that makes its two tables, float32, to be traced into the graph."""
    sizes, shape = piece_sizes(chain), _shape(chain, heads)

    device = chain.end.meta["val"].device

    def make(*tables: Tensor) -> tuple[Tensor, Tensor]:
        own = first_half(features, distance, torch.float32, device)
        first, second = masks_through(chain, sizes, shape, own, tables)
        return first.float(), second.float()

    return make


def _order(chain: Chain, x: Sequence[Tensor], tables: Sequence[Tensor]) -> tuple[int, ...]:
    """Which of two sources comes first along the tokens."""
    alone = run(chain, [x[0], torch.zeros_like(x[1])], tables).abs().amax((0, 1, 3)) > 0
    for order, begin in (((0, 1), 0), ((1, 0), x[1].shape[2])):
        seen = torch.zeros_like(alone)
        seen[begin : begin + x[0].shape[2]] = True
        if torch.equal(alone, seen):
            return order
    raise Unfit("tokens of two projections are mixed")


def _distances(chain: Chain, x: Sequence[Tensor], tables: Sequence[Tensor], features: int) -> Iterator[int]:
    """What the distance may be: where a single feature shows up, then the usual."""
    seen = dict[int, None]()
    for feature in (0, features - 1):
        alone = [
            torch.zeros_like(piece).index_copy_(3, torch.tensor([feature], device="cpu"), piece[..., :1]) for piece in x
        ]
        found = run(chain, alone, tables).abs().amax((0, 1, 2)) > 0
        seen |= {abs(other - feature): None for other in found.nonzero().flatten().tolist() if other != feature}
    yield from list({**seen, 1: None, max(1, features // 2): None})[:6]


def _close(actual: Tensor, expected: Tensor) -> bool:
    return bool(((actual - expected).abs() <= _EXACT * (1 + expected.abs())).all())
