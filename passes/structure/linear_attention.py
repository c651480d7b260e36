"""Finds linear attention: ``query (key^T value)``, without a softmax and with no product of positions.

Its mark is a product that sums over positions and leaves features times features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .axes import DATA, FEATURE, Dim, rank_of
from .flow import VIEWS, Dependence, _packets
from .ops import aten, packet, shape, tensors
from .sites import Site
from .walk import Walk

_PRODUCTS = frozenset((aten.matmul, aten.bmm))
_BETWEEN = VIEWS | _packets("div mul add slice")


@dataclass(frozen=True)
class _Summed:
    """A product over positions: its two operands, and which of its dimensions belongs to which."""

    node: fx.Node
    rows: fx.Node
    columns: fx.Node


def linear_site(node: fx.Node, walk: Walk, flow: Dependence) -> Site | None:
    """The attention that ends in ``node``, if it is the second product of a linear attention."""
    if packet(node) not in _PRODUCTS:
        return None
    left, right = tensors(node)[:2]
    for summed_side, query, summed_first in ((left, right, True), (right, left, False)):
        summed = _summed(summed_side, walk, flow)
        if summed is None or query not in flow.learned:
            continue
        q_dims = walk.dims(query)
        at = -1 if summed_first else -2
        if len(q_dims) < 2 or rank_of(q_dims[at]) != DATA:
            continue
        # the query meets the keys' features: the columns where the sum comes first, else its rows
        key, value = (summed.columns, summed.rows) if summed_first else (summed.rows, summed.columns)
        return _site(node, query, key, value, walk, at)
    return None


def _summed(node: fx.Node, walk: Walk, flow: Dependence) -> _Summed | None:
    for _ in range(4):
        if packet(node) in _PRODUCTS:
            break
        above = [n for n in tensors(node) if n in flow.learned] if packet(node) in _BETWEEN else []
        if len(above) != 1:
            return None
        node = above[0]
    operands = tensors(node)[:2] if packet(node) in _PRODUCTS else []
    if len(operands) < 2 or any(n not in flow.learned for n in operands):
        return None
    a, b = walk.dims(operands[0]), walk.dims(operands[1])
    if len(a) < 2 or len(b) < 2 or rank_of(a[-1]) != DATA or rank_of(b[-2]) != DATA:
        return None
    if rank_of(a[-2]) == DATA or rank_of(b[-1]) == DATA:
        return None
    return _Summed(node, operands[0], operands[1])


def _site(node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, walk: Walk, at: int) -> Site:
    sizes, dims = shape(query) or (), walk.dims(query)
    k_sizes, k_dims = shape(key) or (), walk.dims(key)
    k_at = -1 if rank_of(k_dims[-1]) == DATA else -2
    lead = range(len(sizes) - 2)
    heads_at = [i for i in lead if dims[i] and all(atom.rank == FEATURE for atom in dims[i])]
    heads = batch = 1
    for i in lead:
        heads, batch = (heads * sizes[i], batch) if i in heads_at else (heads, batch * sizes[i])
    letters = "".join("H" if i in heads_at else "B" for i in lead) + ("DL" if at == -1 else "LD")
    head_dim = sizes[-2] if at == -1 else sizes[-1]
    outer: tuple[Dim, ...] = tuple(dims[i] for i in lead if i not in heads_at)
    return Site(
        node=node,
        query=query,
        key=key,
        value=value,
        written="linear",
        mask=None,
        layout=letters,
        batch=batch,
        heads=heads,
        key_heads=heads,
        q_len=sizes[at],
        kv_len=k_sizes[k_at],
        head_dim=head_dim,
        query_dim=dims[at],
        key_dim=k_dims[k_at],
        lead=outer,
    )
