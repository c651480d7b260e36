"""The parts of a quantised tensor as nodes of a graph."""

from __future__ import annotations

import operator

from torch import fx

from ditc.kernels.formats import format_of

from ..rewrite import new_call


def unpack(graph: fx.GraphModule, made: fx.Node, format: str) -> list[fx.Node]:
    """The parts of what ``made`` returns, right behind it."""
    # K does not matter for their number
    count = len(format_of(format).part_types((1, 32)))
    parts = list[fx.Node]()
    with graph.graph.inserting_after(made):
        for index in reversed(range(count)):
            parts.insert(0, new_call(graph, made, operator.getitem, (made, index)))
    return parts
