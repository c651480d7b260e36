"""What must hold of a graph between passes, and after the last one."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from .base import PassContext, PassReport
from .capture import INPUT, GraphInput, fake_mode_of, graph_inputs
from .errors import PassError, VerifyError
from .rewrite import submodules

_LONG = 128
"""Lists beyond this length are data, such as calibrated ranges: a text holds their hash."""


def graph_text(graph: fx.GraphModule) -> str:
    """A stable text of a graph: every node with operator, arguments, shape and dtype; branches included."""
    lines = []
    for index, module in enumerate(submodules(graph)):
        if index:
            lines.append(f"branch {index}:")
        lines += [_line(node) for node in module.graph.nodes]
    return "\n".join(lines) + "\n"


def graph_hash(graph: fx.GraphModule) -> str:
    """16 hexadecimal digits of the graph's text."""
    return hashlib.sha256(graph_text(graph).encode()).hexdigest()[:16]


def _line(node: fx.Node) -> str:
    if node.op == "placeholder":
        # the operands of a branch stand for nothing of their own
        fact = node.meta.get(INPUT)
        stands_for = f" = {fact.kind} {fact.name}" if fact is not None else ""
        return f"{node.name}: {_type(node.meta.get('val'))}{stands_for}"
    args = ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])
    if node.op == "output":
        return f"return {args}"
    target = str(node.target) if node.op != "call_function" else _target(node.target)
    return f"{node.name}: {_type(node.meta.get('val'))} = {target}({args})"


def _target(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(_argument, value))}]"
        if len(value) > _LONG:
            return f"[{len(value)} values, sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}]"
        return text
    return str(value)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_type, value))})"
    return str(value)


def output_types(graph: fx.GraphModule) -> list[str]:
    """Shape, dtype and device of each output."""
    leaves = pytree.tree_leaves(graph.graph.output_node().args[0])
    values = [leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    return [f"{_type(v)} {v.device}" if isinstance(v, torch.Tensor) else _type(v) for v in values]


def propagate(graph: fx.GraphModule) -> None:
    """Computes every node's fake value anew.

    Raises:
        VerifyError: an operator does not accept what it is given.
    """
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    try:
        # the Python dispatcher holds the decompositions of composite operators that accept symbolic sizes
        with torch.no_grad(), enable_python_dispatcher():
            FakeTensorProp(graph, fake_mode_of(graph)).propagate_dont_convert_inputs(*values)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise VerifyError(f"shapes do not propagate through the graph: {error}") from error


def verify(graph: fx.GraphModule, before: Before, report: PassReport, ctx: PassContext) -> None:
    """Checks what must hold after a pass; the graph's fake values must have been propagated anew.

    Raises:
        VerifyError: names the pass and what does not hold.
    """

    def refuse(what: str) -> None:
        raise VerifyError(f"after pass {report.name!r}: {what}")

    for module in submodules(graph):
        module.graph.lint()
        for node in module.graph.nodes:
            if node.op == "call_function" and _mutates(node):
                refuse(f"{node.format_node()} writes to its input")
    changed = graph_text(graph) != before.text
    if changed != bool(report.rewrites):
        refuse(f"the report says {report.rewrites} rewrites, but the graph {'changed' if changed else 'did not'}")
    if _callers_inputs(graph) != before.inputs:
        refuse("the caller's inputs are not what they were")
    states = [fact.name for fact in graph_inputs(graph) if fact.kind == "state"]
    if states != [entry.name for entry in ctx.state]:
        refuse(f"the graph takes the state {states}, declared is {[entry.name for entry in ctx.state]}")
    outputs = output_types(graph)
    if outputs[: len(before.outputs)] != before.outputs:
        refuse(f"outputs were {before.outputs} and are {outputs}")
    more = len(outputs) - len(before.outputs)
    if more != len(ctx.state) + len(ctx.gauges):
        gauges = f" and {len(ctx.gauges)} gauges" if ctx.gauges else ""
        refuse(f"{len(ctx.state)} state entries{gauges} are declared, {more} are returned")
    if report.requested and not report.rewrites and report.skipped:
        reasons = sorted({skip.reason for skip in report.skipped})
        raise PassError(
            f"pass {report.name!r} was asked for and could rewrite none of {len(report.skipped)} candidates: "
            + "; ".join(reasons)
        )


class Before:
    """What a graph looked like before a pass."""

    def __init__(self, graph: fx.GraphModule, outputs: list[str] | None = None) -> None:
        self.text = graph_text(graph)
        self.inputs = _callers_inputs(graph)
        self.outputs = outputs if outputs is not None else output_types(graph)


def _callers_inputs(graph: fx.GraphModule) -> list[GraphInput]:
    return [fact for fact in graph_inputs(graph) if fact.kind not in ("packed", "state", "control")]


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)
