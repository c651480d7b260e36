"""Hoisting: what depends on weights alone leaves the graph for a prologue that runs once per set of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from .base import PACK, PACKED_FROM, PassContext, PassReport
from .capture import INPUT, GraphInput
from .rewrite import is_weight


@dataclass(frozen=True)
class Prologue:
    """The graph that packs weights.

    Attributes:
        graph: takes weights, returns packed tensors.
        inputs: positions of those weights among the captured graph's inputs.
        quantized: for each packed tensor that is a quantised weight's scale, its position and the weight's name. A
            scale that is not finite means a weight that holds NaN or infinity.
    """

    graph: fx.GraphModule
    inputs: tuple[int, ...]
    quantized: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class HoistWeights:
    """Rewrite rule: the results of nodes that passes marked with ``PACK`` become placeholders of kind ``packed``,
    and the marked nodes move to a prologue graph that takes weights and returns those results in order.

    The prologue is left in ``graph.meta[HoistWeights.PROLOGUE]``.
    Only marked nodes move: what the model itself computes from weights stays, because its cost is the model's.
    """

    name: ClassVar[str] = "hoist"
    PROLOGUE: ClassVar[str] = "ditc_prologue"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Moves all marked nodes at once."""
        marked = [node for node in graph.graph.nodes if node.meta.get(PACK)]
        inside = set(marked)
        results = [n for n in marked if any(user not in inside for user in n.users)]
        if not results:
            return PassReport(self.name, 0)
        positions, prologue = _prologue(graph, marked, results)
        last = graph.graph.find_nodes(op="placeholder")[-1]
        for node in results:
            with graph.graph.inserting_after(last):
                placeholder = graph.graph.placeholder(f"packed_{node.name}")
            placeholder.meta = {"val": node.meta["val"], INPUT: GraphInput(_name(node), "packed")}
            node.replace_all_uses_with(placeholder, delete_user_cb=lambda user: user not in inside)
            last = placeholder
        for node in reversed(marked):
            graph.graph.erase_node(node)
        scales = tuple((i, node.meta[PACKED_FROM]) for i, node in enumerate(results) if PACKED_FROM in node.meta)
        graph.meta[self.PROLOGUE] = Prologue(prologue, positions, scales)
        return PassReport(self.name, len(results), details=(f"{len(results)} packed tensors per set of weights",))


def _prologue(
    graph: fx.GraphModule, marked: list[fx.Node], results: list[fx.Node]
) -> tuple[tuple[int, ...], fx.GraphModule]:
    new = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    positions = []
    for position, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if is_weight(node) and any(user.meta.get(PACK) for user in node.users):
            copied[node] = new.node_copy(node)
            positions.append(position)
    for node in marked:
        copied[node] = new.node_copy(node, lambda old: copied[old])
    new.output(tuple(copied[node] for node in results))
    return tuple(positions), fx.GraphModule(graph, new, "Prologue")


def _name(node: fx.Node) -> str:
    source = node.meta.get(PACKED_FROM)
    return f"{source}:{node.name}" if source else node.name
