"""Where queries and keys come from: projections, what norms them, what rotates them, as one op takes it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ditc.kernels.smooth import MOST_PIECES

from ..rewrite import aten
from ..trace import trace_in
from .chain import Chain, Facts, Heads, Unfit, uncast, walk
from .norms import Norm, prove_norm
from .rotation import Rotation, prove_rotation, tables_of
from .sink import is_transpose, rank_of

_FLOATS = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Tokens:
    """Queries or keys as ``ditc::smooth_queries`` and ``ditc::smooth_keys`` take them.

    Attributes:
        pieces: what is read, one behind the other along the tokens, and where each has its heads.
        shape: ``H`` and ``D``.
        norm, eps: over the features of each piece.
        weight, bias: the norm's own, one for each piece, or nothing.
        tables: of the rotation, or nothing.
        distance: between the features that are rotated together.
        what: in words.
    """

    pieces: tuple[tuple[fx.Node, Heads], ...]
    shape: tuple[int, int]
    norm: str = "none"
    eps: float = 0.0
    weight: tuple[fx.Node, ...] = ()
    bias: tuple[fx.Node, ...] = ()
    tables: tuple[fx.Node, ...] = ()
    distance: int = 1
    what: str = ""

    def nodes(self) -> list[fx.Node]:
        """What :meth:`arguments` takes the values of, in order."""
        return [*(node for node, _ in self.pieces), *self.weight, *self.bias, *self.tables]

    def arguments(self, values: Iterator[Tensor]) -> tuple[Any, ...]:
        """The arguments of the ops, from the values of :meth:`nodes`."""
        x = [self._as_heads(next(values), heads) for _, heads in self.pieces]
        weight, bias = ([next(values).reshape(-1) for _ in own] for own in (self.weight, self.bias))
        tables = [next(values) for _ in self.tables]
        return x, self.norm, self.eps, weight, bias, tables, self.distance

    def _as_heads(self, x: Tensor, heads: Heads) -> Tensor:
        if heads is None:
            x = torch.unflatten(x, -1, self.shape)
        return x if heads == 1 else x.transpose(1, 2)


@dataclass
class Finder:
    """Finds the :class:`Tokens` behind the operands of one graph's attentions; tables are made once for all."""

    graph: fx.GraphModule
    facts: Facts
    proofs: dict[str, Rotation | Unfit] = field(default_factory=dict)
    tables: dict[str, tuple[fx.Node, fx.Node]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.GraphModule) -> Finder:
        return cls(graph, Facts.of(graph))

    def find(self, operand: fx.Node, before: fx.Node) -> Tokens:
        """What makes ``operand``, ``[B, H, L, D]``; new nodes, for tables, stand in front of ``before``.

        What cannot be proven to be a norm and a rotation stays where it is, and its result is a piece.
        """
        H, D = operand.meta["val"].shape[1], operand.meta["val"].shape[3]
        try:
            return self._rotated(operand, before, H, D)
        except Unfit as reason:
            what = f"where they are: {reason}"
            return Tokens(((operand, 1),), (H, D), what=what)

    def _rotated(self, operand: fx.Node, before: fx.Node, H: int, D: int) -> Tokens:
        order, ends = walk(operand, self.facts)
        if not 1 <= len(ends) <= MOST_PIECES:
            raise Unfit(f"{len(ends)} projections make them")
        sources = [s for s in (_stem(end, order, H, D, self.facts) for end in ends) if s is not None]
        if len(sources) < len(ends):
            raise Unfit("a projection is not laid out by heads")
        norms = [prove_norm(source, order[source], self.facts) for source in sources]
        alike = norms[0] is not None and len({_alike(norm) for norm in norms}) == 1
        made, ends = walk(operand, self.facts, sources)
        if set(ends) != set(sources):
            raise Unfit("a projection is read in two ways")
        chain = Chain.made(operand, sources, made.keys() - set(sources), made, self.facts)
        rotation = self._proof(chain, H, D)
        tables = () if rotation.plain else self._tables(chain, rotation, before, H, D)
        pieces = [
            (norm.source, norm.heads) if alike and norm is not None else (uncast(source), made[source])
            for norm, source in zip(norms, chain.sources, strict=True)
        ]
        pieces, norms = [pieces[i] for i in rotation.order], [norms[i] for i in rotation.order]
        types = {node.meta["val"].dtype for node, _ in pieces}
        if len(types) > 1 or not types <= _FLOATS:
            raise Unfit(f"projections are {', '.join(sorted(map(str, types)))}")
        bare = Tokens(tuple(pieces), (H, D), tables=tables, distance=rotation.distance)
        norm = norms[0] if alike else None
        if norm is None:
            return replace(bare, what="with rotation" if tables else "without norm or rotation")
        own = [n for n in norms if n is not None]
        return replace(
            bare, norm=norm.kind, eps=norm.eps,
            weight=tuple(n.weight for n in own if n.weight is not None),
            bias=tuple(n.bias for n in own if n.bias is not None),
            what=f"with {norm.kind} norm{' and rotation' if tables else ''}",
        )  # fmt: skip

    def _proof(self, chain: Chain, H: int, D: int) -> Rotation:
        if len(chain.sources) == 1 and all(is_transpose(call) or call.target in _COPIES for call in chain.calls):
            return Rotation((0,), 1, True)
        key = chain.key(self.facts)
        if key not in self.proofs:
            try:
                self.proofs[key] = prove_rotation(chain, H, D)
            except Unfit as reason:
                self.proofs[key] = reason
        found = self.proofs[key]
        if isinstance(found, Unfit):
            raise found
        return found

    def _tables(self, chain: Chain, rotation: Rotation, before: fx.Node, H: int, D: int) -> tuple[fx.Node, fx.Node]:
        key = chain.key(self.facts)
        if key not in self.tables:
            make = tables_of(chain, H, D, rotation.distance)
            self.tables[key] = trace_in(self.graph, before, make, *chain.outside)
        return self.tables[key]


def _alike(norm: Norm | None) -> Any:
    """What norms of two pieces must have in common."""
    return None if norm is None else (norm.kind, norm.eps, norm.weight is None, norm.bias is None)


def _stem(end: fx.Node, order: dict[fx.Node, Heads], H: int, D: int, facts: Facts) -> fx.Node | None:
    """Goes from where a walk ended forward, as long as there is one way, of views and of the weights of a norm.

    Returns:
        The last value ``[., ., ., D]``, or flat where it never has that shape; ``None`` where it has neither.
    """
    node, found = end, _shaped(end, order, H, D)
    while True:
        users = [user for user in node.users if user in order]
        if len(users) != 1:
            return found
        (node,) = users
        if not (node.target in _VIEWS or is_transpose(node) or _is_weighted(node, facts)):
            return found
        shaped = _shaped(node, order, H, D)
        if shaped is not None and (order[shaped] is not None or found is None):
            found = shaped


_COPIES = frozenset({aten._to_copy.default, aten.clone.default})
_VIEWS = _COPIES | {
    *(aten.reshape.default, aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.chunk.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, operator.getitem),
}


def _is_weighted(node: fx.Node, facts: Facts) -> bool:
    """Whether a call multiplies by, or adds, a vector of the last dimension that is made of weights."""
    if node.target not in (aten.mul.Tensor, aten.add.Tensor) or node.kwargs:
        return False
    vectors = [arg.meta["val"] for arg in node.args if isinstance(arg, fx.Node) and arg in facts.weights]
    return len(vectors) == 1 and vectors[0].numel() == vectors[0].shape[-1] == node.meta["val"].shape[-1]


def _shaped(node: fx.Node, order: dict[fx.Node, Heads], H: int, D: int) -> fx.Node | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if rank_of(node) == 4 and order[node] is not None and value.shape[-1] == D:
        return node
    return node if rank_of(node) == 3 and order[node] is None and value.shape[-1] == H * D else None
