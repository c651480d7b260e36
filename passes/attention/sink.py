"""Lets queries and keys be made token by token, and turned to heads at the end."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..base import PassContext, PassReport
from ..rewrite import aten, calls, new_call

_HEADS, _TOKENS = 1, 2
_LONGEST = 64
"""Calls of a chain beyond which it is left alone: norms and rotations are shorter."""


@dataclass(frozen=True)
class SinkTransposes:
    """Rewrite rule: ``f(transpose(x, 1, 2))`` that an attention reads becomes ``transpose(f'(x), 1, 2)``.

    ``f`` is what stands between a projection and its attention, norms and rotations: calls that work element by
    element or along the dimensions behind the tokens, or that take tokens or heads apart and together again. Their
    other operands, such as tables of sines, are turned to meet them. The values stay the same, bit by bit; but what
    quantises the result in front of an attention then walks through memory as the norm does, and inductor makes one
    kernel of norm, rotation and quantisation, where it makes two when heads come first. For CPUs it makes one in both
    cases, so there the graph stays.
    """

    everywhere: bool = False
    """Whether graphs for CPUs are rewritten as well."""

    name: ClassVar[str] = "sink transposes"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrites the queries and keys of every attention where all between them and a transpose can be turned."""
        if ctx.device.type == "cpu" and not self.everywhere:
            return PassReport(self.name, 0)
        count = 0
        for node in calls(graph, aten.scaled_dot_product_attention.default):
            for operand in dict.fromkeys(node.args[:2]):
                assert isinstance(operand, fx.Node)
                chain = _chain(operand)
                if chain:
                    _turn(graph, operand, chain)
                    count += 1
        return PassReport(self.name, count)


def _chain(end: fx.Node) -> list[fx.Node]:
    """The calls from transposes to ``end``, in program order; empty where there is none between, or one does not
    turn."""
    if is_transpose(end):
        return []
    found: dict[fx.Node, None] = {}
    pending, grounded = [end], False
    while pending:
        node = pending.pop()
        if node in found:
            continue
        if node.op != "call_function" or (node.target not in _TURNS and not _pointwise(node)) or len(found) > _LONGEST:
            return []
        found[node] = None
        if is_transpose(node):
            grounded = True
            continue
        if not _can_turn(node):
            return []
        pending += [operand for operand in node.all_input_nodes if _inside(operand)]
    order = {node: i for i, node in enumerate(end.graph.nodes)}
    return sorted(found, key=order.__getitem__) if grounded else []


def _inside(node: fx.Node) -> bool:
    """Whether an operand belongs to the chain: it has heads and tokens; tables have one or neither."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return True
    if not isinstance(value, torch.Tensor) or value.dim() < 4:
        return False
    return not _is_one(value.shape[_HEADS]) and not _is_one(value.shape[_TOKENS])


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def is_transpose(node: fx.Node) -> bool:
    """Whether a node exchanges dimensions 1 and 2 of a tensor with four."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return False
    if node.target is aten.transpose.int:
        return {dim % 4 for dim in node.args[1:3]} == {_HEADS, _TOKENS}  # type: ignore[operator]
    return node.target is aten.permute.default and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]  # type: ignore


def _pointwise(node: fx.Node) -> bool:
    """Whether a call works element by element on tensors that broadcast."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags and rank_of(node) >= 4


def rank_of(node: fx.Node) -> int:
    value = node.meta["val"]
    value = value[0] if isinstance(value, (list, tuple)) else value
    return int(value.dim()) if isinstance(value, torch.Tensor) else 0


@dataclass(frozen=True)
class Dims:
    """Which argument names dimensions, and whether heads and tokens may be among them."""

    position: int
    default: Any = None
    any: bool = False

    def of(self, node: fx.Node) -> Any:
        """The dimensions, counted from the front."""
        source = node.args[0]
        source = source[0] if isinstance(source, (list, tuple)) else source
        assert isinstance(source, fx.Node)
        # a dimension may be new, or go: the larger rank counts it
        rank = max(rank_of(node), rank_of(source))
        dims = node.args[self.position] if len(node.args) > self.position else self.default
        return [dim % rank for dim in dims] if isinstance(dims, (list, tuple)) else dims % rank  # type: ignore

    def __call__(self, node: fx.Node) -> bool:
        dims = self.of(node)
        dims = dims if isinstance(dims, list) else [dims]
        return all(dim > _TOKENS or (self.any and dim > 0) for dim in dims)

    def exchanged(self, node: fx.Node) -> tuple[Any, ...]:
        """The arguments with heads and tokens exchanged."""
        if len(node.args) <= self.position:
            return node.args
        return (*node.args[: self.position], _other(self.of(node)), *node.args[self.position + 1 :])


def _other(dims: Any) -> Any:
    if isinstance(dims, list):
        return [_other(dim) for dim in dims]
    return {_HEADS: _TOKENS, _TOKENS: _HEADS}.get(dims, dims)


def _always(node: fx.Node) -> bool:
    return True


def _last_only(node: fx.Node) -> bool:
    return len(node.args[1]) == 1  # type: ignore[arg-type]


def _keeps_front(node: fx.Node) -> bool:
    """Whether a reshape leaves batch, heads and tokens alone."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return len(after) >= 4 and tuple(before[:3]) == tuple(after[:3])


ALONG: Mapping[Any, Dims] = {
    aten.sum.dim_IntList: Dims(1),
    aten.slice.Tensor: Dims(1, 0, any=True),
    aten.select.int: Dims(1),
    aten.unbind.int: Dims(1, 0),
    aten.chunk.default: Dims(2, 0, any=True),
    aten.split.Tensor: Dims(2, 0, any=True),
    aten.split_with_sizes.default: Dims(2, 0, any=True),
    aten.cat.default: Dims(1, 0, any=True),
    aten.slice_scatter.default: Dims(2, 0, any=True),
    aten.stack.default: Dims(1, 0),
    aten.unsqueeze.default: Dims(1),
}
"""Calls that work along dimensions: which argument names them, and whether tokens may be among them."""

_TURNS: dict[Any, Callable[[fx.Node], bool]] = {
    aten.transpose.int: is_transpose,
    aten.permute.default: is_transpose,
    aten.rms_norm.default: _last_only,
    aten.layer_norm.default: _last_only,
    aten.mean.dim: Dims(1),
    **ALONG,
    aten.flatten.using_ints: Dims(1, 0),
    aten.unflatten.int: Dims(1),
    aten.reshape.default: _keeps_front,
    aten.to.dtype: _always,
    aten.clone.default: _always,
    aten.copy.default: _always,
    aten.contiguous.default: _always,
    operator.getitem: _always,
}
"""Calls that turn, beside those that work element by element, and on what condition."""


def _can_turn(node: fx.Node) -> bool:
    check = _TURNS.get(node.target)
    return check(node) if check is not None else True


def _turn(graph: fx.GraphModule, end: fx.Node, chain: list[fx.Node]) -> None:
    """Copies a chain with heads and tokens exchanged, and puts the transpose behind it."""
    turned: dict[fx.Node, fx.Node] = {}
    with graph.graph.inserting_before(end):
        for node in chain:
            if is_transpose(node):
                assert isinstance(node.args[0], fx.Node)
                turned[node] = node.args[0]
                continue
            args, check = node.args, _TURNS.get(node.target)
            if isinstance(check, Dims):
                args = check.exchanged(node)
            elif node.target is aten.reshape.default:
                args = (args[0], _exchanged(args[1]))
            rank = rank_of(node)

            def other(operand: fx.Node, rank: int = rank) -> fx.Node:
                return turned[operand] if operand in turned else _table(graph, operand, rank)

            new = graph.graph.call_function(
                node.target,  # type: ignore[arg-type]
                fx.node.map_arg(args, other),
                fx.node.map_arg(node.kwargs, other),
            )
            new.meta = {key: value for key, value in node.meta.items() if key != "val"}
            turned[node] = new
        result = new_call(graph, end, aten.transpose.int, (turned[end], _HEADS, _TOKENS))
    end.replace_all_uses_with(result)


def _exchanged(sizes: Any) -> list[Any]:
    """The sizes of a reshape with heads and tokens exchanged."""
    return [sizes[0], sizes[_TOKENS], sizes[_HEADS], *sizes[3:]]


def _table(graph: fx.GraphModule, operand: fx.Node, rank: int) -> fx.Node:
    """An operand from outside the chain, turned to broadcast against ``rank`` dimensions as it did before."""
    value = operand.meta["val"]
    if not isinstance(value, torch.Tensor):
        return operand
    heads, tokens = _HEADS - (rank - value.dim()), _TOKENS - (rank - value.dim())
    if heads >= 0:
        return new_call(graph, operand, aten.transpose.int, (operand, heads, tokens))
    if tokens >= 0:
        return new_call(graph, operand, aten.unsqueeze.default, (operand, 1))
    return operand
