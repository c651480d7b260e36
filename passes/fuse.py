"""Horizontal fusion: linears that read the same tensor become one."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from .base import PACK, PassContext, PassReport, Skip
from .rewrite import aten, calls, facts_of, is_weight, new_call
from .structure import FACTS, Role

FUSED = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.MLP_UP, Role.MLP_GATE})
"""Roles that gain from sharing a GEMM: several narrow products of one activation inside a block."""


@dataclass(frozen=True)
class FuseLinears:
    """Rewrite rule: linears of one block that read one tensor, all with or all without bias, become

    ``split_with_sizes(linear(x, cat(weights), cat(biases)), widths, -1)``.

    The concatenations depend on weights alone and are computed once per set of weights. Numbers may differ in the
    last bit, because a wider GEMM may sum in another order; on integers they do not.
    """

    name: ClassVar[str] = "fuse"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Fuses every group of at least two."""
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        skipped: list[Skip] = []
        for node in calls(graph, aten.linear.default):
            facts = facts_of(node)
            if facts is None or facts.role not in FUSED:
                continue
            weights = [arg for arg in node.args[1:] if arg is not None]
            if not all(map(is_weight, weights)):
                skipped.append(Skip(node.name, "the graph computes its weight or bias"))
                continue
            key = (node.args[0], len(weights), weights[0].meta["val"].dtype, facts.stack, facts.block)  # type: ignore[union-attr]
            groups.setdefault(key, []).append(node)
        rewrites = 0
        for group in groups.values():
            if len(group) < 2:
                skipped.append(Skip(group[0].name, "no other linear of its block reads the same tensor"))
                continue
            _fuse(graph, group)
            rewrites += len(group)
        return PassReport(self.name, rewrites, tuple(skipped))


def _fuse(graph: fx.GraphModule, group: list[fx.Node]) -> None:
    first = group[0]
    widths = [node.meta["val"].shape[-1] for node in group]
    with graph.graph.inserting_before(first):
        packed = []
        for position in range(1, len(first.args)):
            parts = [node.args[position] for node in group]
            if parts[0] is not None:
                cat = new_call(graph, first, aten.cat.default, (parts, 0))
                cat.meta[PACK] = True
                packed.append(cat)
        linear = new_call(graph, first, aten.linear.default, (first.args[0], *packed))
        linear.meta[FACTS] = facts_of(first)
        split = new_call(graph, first, aten.split_with_sizes.default, (linear, widths, -1))
    after = split
    for index, node in enumerate(group):
        with graph.graph.inserting_after(after):
            part = new_call(graph, node, operator.getitem, (split, index))
        part.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(part)
        graph.graph.erase_node(node)
        after = part
