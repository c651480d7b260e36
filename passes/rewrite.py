"""The few moves that rewrites are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from .capture import INPUT, GraphInput
from .structure import FACTS, NodeFacts

aten = torch.ops.aten


def calls(graph: fx.GraphModule, target: Any) -> list[fx.Node]:
    """All calls of one operator overload, in order."""
    return graph.graph.find_nodes(op="call_function", target=target)


def new_call(
    graph: fx.GraphModule, like: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], **kwargs: Any
) -> fx.Node:
    """A call in front of the current insertion point that takes over where ``like`` came from, but not its value."""
    node = graph.graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    return node


def is_weight(node: Any) -> bool:
    """Whether a node is a parameter, a buffer or a packed weight."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.meta[INPUT].is_weight


def made_from_weights(node: fx.Node, limit: int = 64) -> list[fx.Node] | None:
    """The calls between the module's weights and ``node``, ``node`` included, in no order; empty for a weight itself.

    ``None`` when an input of the caller's has a part in it, or when more than ``limit`` calls do.
    """
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current in found or is_weight(current):
            continue
        if current.op != "call_function" or not current.all_input_nodes or len(found) >= limit:
            return None
        found[current] = None
        pending += current.all_input_nodes
    return list(found)


def input_of(node: fx.Node) -> GraphInput:
    """What a placeholder stands for."""
    fact = node.meta[INPUT]
    assert isinstance(fact, GraphInput)
    return fact


def size_hint(size: Any) -> int:
    """A size as a number: that of the example where it is symbolic."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def facts_of(node: fx.Node) -> NodeFacts | None:
    """What the structure analysis found about a node; nodes that passes made carry what their origin had."""
    facts: NodeFacts | None = node.meta.get(FACTS)
    return facts


def submodules(graph: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and, inside out of its branches (``cond`` and the like), every graph that it calls."""
    yield graph
    for node in graph.graph.find_nodes(op="get_attr"):
        inner = getattr(graph, str(node.target), None)
        if isinstance(inner, fx.GraphModule):
            yield from submodules(inner)


def device_of(graph: fx.GraphModule) -> torch.device:
    """The device that the graph is for: that of its first tensor input of data, or of its first weight.

    A model on the ``meta`` device is only looked at; it is taken to be for the best device of this machine.
    """
    fallback = None
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            fallback = fallback or value.device
            if input_of(node).kind == "data":
                fallback = value.device
                break
    if fallback is not None and fallback.type != "meta":
        return fallback
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ancestors(ends: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> dict[fx.Node, None]:
    """``ends`` and all that they are computed from, up to ``stop``, which is left out; an ordered set."""
    found: dict[fx.Node, None] = {}
    pending = [node for node in ends if node not in stop]
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += [operand for operand in node.all_input_nodes if operand not in stop]
    return found
