"""Finds what belongs to a region: everything that only its exits need."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import fx

from ..rewrite import ancestors


@dataclass(frozen=True)
class Region:
    """Nodes that are not needed where a region's exits are known, and what they read from outside.

    Attributes:
        nodes: in program order: the blocks, and what is computed for them alone, such as their modulations.
        operands: values from outside, in program order.
        exits: border nodes whose value the region computes.
    """

    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]


def find_region(graph: fx.Graph, exits: Iterable[fx.Node], needed: Iterable[fx.Node]) -> Region:
    """The region behind ``exits``.

    Args:
        graph: holds them.
        exits: border nodes.
        needed: nodes that are read in any case, besides what the graph returns.
    """
    ends = list(exits)
    alive = ancestors([graph.output_node(), *needed], stop=set(ends))
    wanted = ancestors([end.all_input_nodes[0] for end in ends], stop=alive)
    inside = {node for node in wanted if node.op == "call_function" and not _item_of(node, alive)}
    nodes = tuple(node for node in graph.nodes if node in inside)
    read = {operand for node in nodes for operand in node.all_input_nodes if operand not in inside}
    return Region(nodes, tuple(node for node in graph.nodes if node in read), tuple(ends))


def _item_of(node: fx.Node, outside: Collection[fx.Node]) -> bool:
    """Whether a node picks one of several results of a node outside: those are no operands, their items are."""
    return node.target is operator.getitem and node.all_input_nodes[0] in outside
