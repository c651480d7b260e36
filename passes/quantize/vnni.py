"""INT8 linears on CPUs with AVX512-VNNI: one kernel from the float input to the float output."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ditc.kernels.linear.vnni import vnni_reason

from ..base import PACK, PassContext, PassReport, Skip
from ..rewrite import calls, new_call

_ops = torch.ops.ditc


@dataclass(frozen=True)
class UseVnni:
    """Rewrite rules, for INT8 linears on a CPU that has the instructions:

    1. ``quantized_linear(quantize(x), w, ...)`` becomes ``vnni_linear(x, pack(w), ...)`` where nobody else reads the
       quantised input, and ``vnni_linear(q, scale, pack(w), ...)`` where somebody does or its range is static;
    2. ``quantized_linear(norm_quantize(x, ...), w, ...)`` becomes ``vnni_norm_linear`` likewise;
    3. ``activation_quantize(quantized_linear(...))`` becomes ``quantize(vnni_linear(..., activation))``, and the
       quantisation goes into the next linear by the first rule;
    4. ``weight_linear(x, w, b)`` of few rows becomes ``vnni_weight_linear``.

    The integers and the scales are the same; what is saved is the trip of each intermediate matrix to memory.
    """

    name: ClassVar[str] = "vnni"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Takes every INT8 linear; where the machine cannot, says why and leaves them to the compiler."""
        linears = [node for node in calls(graph, _ops.quantized_linear.default) if node.args[5] == "int8"]
        vectors = [node for node in calls(graph, _ops.weight_linear.default) if _is_vector(node)]
        if ctx.device.type != "cpu" or not (linears or vectors):
            return PassReport(self.name, 0)
        reason = vnni_reason()
        if reason is not None:
            return PassReport(self.name, 0, skipped=(Skip("graph", reason),))
        for node in linears:
            _rewrite(graph, node)
        for node in vectors:
            x, weight, bias, _ = node.args
            _replace(graph, node, _ops.vnni_weight_linear.default, (x, *_parts(weight), bias))
        graph.graph.eliminate_dead_code()
        return PassReport(self.name, len(linears) + len(vectors))


_FEW_ROWS = 4


def _is_vector(node: fx.Node) -> bool:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    shape = x.meta["val"].shape
    return (
        node.args[3] == "int8"
        and all(isinstance(size, int) for size in shape)
        and shape.numel() <= (_FEW_ROWS * shape[-1])
    )


def _rewrite(graph: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, gate, residual, _, dtype = node.args
    weight_q, weight_scale = _parts(weight)
    N = weight_q.meta["val"].shape[0]
    with graph.graph.inserting_before(node):
        packed = new_call(graph, node, _ops.vnni_pack.default, (weight_q, weight_scale))
        # a weight that arrived quantised is packed too, once per set of weights
        packed.meta[PACK] = True
    front = _front(*_parts(x))
    target = _ops.vnni_linear.default if len(front) == 2 else _ops.vnni_norm_linear.default
    after = _activation_behind(node) if gate is None and residual is None else None
    activation = "none" if after is None else after.args[1]
    new = _replace(graph, node, target, (*front, packed, N, bias, activation, gate, residual, dtype))
    if after is not None:
        _replace(graph, after, _ops.quantize.default, (new, "int8"))


def _parts(value: Any) -> tuple[fx.Node, fx.Node]:
    """Integers and scales of an INT8 tensor."""
    q, scale = value
    assert isinstance(q, fx.Node) and isinstance(scale, fx.Node)
    return q, scale


def _front(q: fx.Node, scale: fx.Node) -> tuple[Any, ...]:
    """The arguments in front of the weight: ``(q, scale)``, ``(x, None)``, or those of a norm."""
    producer = q.args[0] if q.target is operator.getitem else None
    if not isinstance(producer, fx.Node) or set(producer.users) != {q, scale}:
        return q, scale
    if len(q.users) != 1 or len(scale.users) != 1:
        return q, scale
    if producer.target is _ops.quantize.default and len(producer.args) == 2:
        return producer.args[0], None
    if producer.target is _ops.norm_quantize.default and len(producer.args) == 8:
        return producer.args[:7]
    return q, scale


def _activation_behind(node: fx.Node) -> fx.Node | None:
    """The ``activation_quantize`` that alone reads a linear's output, where it has no other input."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.target is not _ops.activation_quantize.default or len(user.args) != 4:
        return None
    return user if user.args[2] is None and user.args[3] == "int8" else None


def _replace(graph: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    with graph.graph.inserting_before(node):
        new = new_call(graph, node, target, args)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    return new
