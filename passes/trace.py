"""Plain torch traced into a graph: for what a pass adds that is more than one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .canonicalize import normalize
from .capture import INPUT, GraphInput, fake_mode_of


def trace_in(graph: fx.GraphModule, before: fx.Node, run: Callable[..., Any], *operands: fx.Node) -> Any:
    """Puts the calls that ``run`` makes in front of a node, in normal form.

    Sizes that are symbolic stay so; a decision that ``run`` takes by one becomes a guard of the graph.

    Args:
        graph: its fake values are what ``run`` sees.
        before: gives the place, and where the new nodes came from.
        run: takes a tensor for each operand; returns tensors, in any nest of lists, tuples and dictionaries, or
            ``None`` among them.
        operands: nodes whose value is a tensor.

    Returns:
        What ``run`` returned, with a node for each tensor.
    """
    origin = {key: value for key, value in before.meta.items() if key != "val"}
    with graph.graph.inserting_before(before):
        return trace_here(graph.graph, fake_mode_of(graph), run, operands, origin)


def trace_here(
    graph: fx.Graph,
    mode: FakeTensorMode,
    run: Callable[..., Any],
    operands: Sequence[fx.Node],
    origin: Mapping[str, Any],
) -> Any:
    """:func:`trace_in` at the current insertion point of a graph that may still be in the making.

    ``origin`` is what new nodes get as their ``meta``, besides their value.
    """
    shape: Any = None

    def flat(*tensors: torch.Tensor) -> list[Any]:
        nonlocal shape
        leaves, shape = pytree.tree_flatten(run(*tensors))
        return leaves

    with mode, torch.no_grad(), enable_python_dispatcher():
        # two nodes may share one fake value, which the tracer would take for one operand
        examples = [operand.meta["val"].detach() for operand in operands]
        traced = make_fx(flat, pre_dispatch=True)(*examples)
    placeholders = traced.graph.find_nodes(op="placeholder")
    for placeholder in placeholders:
        placeholder.meta[INPUT] = GraphInput(placeholder.name, "data")
    normalize(traced)
    places = dict(zip(placeholders, operands, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            places[node] = graph.node_copy(node, places.__getitem__)
            places[node].meta = {**origin, "val": node.meta["val"]}
        elif node.op == "get_attr":
            raise NotImplementedError(f"a constant tensor was made while tracing: {node.target}")
    (returned,) = traced.graph.output_node().args
    leaves = [places[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in returned]  # type: ignore[union-attr]
    return pytree.tree_unflatten(leaves, shape)
