"""Hoisting: what depends on weights alone leaves the graph for a prologue that runs once per set of weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ditc.runtime.artifact import Piece

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

    def pieces(self) -> tuple[Piece, ...]:
        """The graph taken apart into pieces that share no computation, in the order in which they begin."""
        placeholders = {node: i for i, node in enumerate(self.graph.graph.find_nodes(op="placeholder"))}
        results = list(self.graph.graph.output_node().args[0])  # type: ignore[arg-type]
        names = dict(self.quantized)
        pieces = []
        for nodes in _components(self.graph):
            inside = set(nodes)
            read = [p for p in placeholders if any(user in inside for user in p.users)]
            outputs = [i for i, node in enumerate(results) if node in inside]
            new, copied = fx.Graph(), dict[fx.Node, fx.Node]()
            for node in (*read, *nodes):
                copied[node] = new.node_copy(node, copied.__getitem__)
            new.output(tuple(copied[results[i]] for i in outputs))
            module = fx.GraphModule(self.graph, new, "Piece")
            scales = tuple((k, names[i]) for k, i in enumerate(outputs) if i in names)
            inputs = tuple(placeholders[p] for p in read)
            pieces.append(Piece(module, inputs, tuple(outputs), _key(module), scales))
        return tuple(pieces)

    def floating(self) -> tuple[int, ...]:
        """Those of ``inputs`` that are of a float type."""
        placeholders = self.graph.graph.find_nodes(op="placeholder")
        floats = [node.meta["val"].is_floating_point() for node in placeholders]
        return tuple(i for i, is_float in zip(self.inputs, floats, strict=True) if is_float)


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
        # scales that only packing reads come out all the same: the runtime looks at them for NaN
        results = [n for n in marked if PACKED_FROM in n.meta or any(user not in inside for user in n.users)]
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


def _components(graph: fx.GraphModule) -> list[list[fx.Node]]:
    """Nodes that compute, grouped so that no value goes from one group to another."""
    group_of: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        joined = [node]
        for operand in node.all_input_nodes:
            group = group_of.get(operand)
            if group is not None and node not in group:
                group += joined
                joined = group
        for member in joined:
            group_of[member] = joined
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    groups = {id(group): sorted(group, key=order.__getitem__) for group in group_of.values()}
    return sorted(groups.values(), key=lambda group: order[group[0]])


def _key(piece: fx.GraphModule) -> str:
    """A hash of what a piece computes; names of nodes and weights have no part in it."""
    number = {node: f"%{i}" for i, node in enumerate(piece.graph.nodes)}

    def line(node: fx.Node) -> str:
        if node.op == "placeholder":
            value = node.meta["val"]
            return f"{value.dtype}{tuple(value.shape)}"
        if node.op == "get_attr":
            constant: Any = getattr(piece, str(node.target))
            assert isinstance(constant, torch.Tensor), "a piece holds no graphs of its own"
            data = constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return f"{constant.dtype}{tuple(constant.shape)} {hashlib.sha256(data).hexdigest()}"
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: number[n])
        return f"{node.target} {args!r}"

    text = "\n".join(map(line, piece.graph.nodes))
    return hashlib.sha256(text.encode()).hexdigest()
