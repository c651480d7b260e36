"""Rules: for each operator, what it does to rows, or that it does not treat each token on its own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from ...structure.flow import _packets
from ...structure.ops import SIZED_LIKE, aten, packet, tensors
from .attention import ATTENTIONS
from .rows import Found, Known, Rows, Step, TokensMixed, meeting, sizes_of
from .views import VIEWS

Rule = Callable[[fx.Node, Known], Step]

ELEMENTWISE = _packets(
    "_to_copy clone contiguous copy empty_like zeros_like ones_like full_like alias detach dropout hardswish prelu "
    "log_sigmoid lift_fresh_copy"
)
"""Operators that treat each element on its own without torch's tag for it."""

ALONG: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "aten::linear": frozenset({"input"}),
        "ditc::quantize": frozenset({"x"}),
        "ditc::norm_quantize": frozenset({"x", "multiplier", "shift"}),
        "ditc::activation_quantize": frozenset({"x", "multiplier"}),
        "ditc::dequantize": frozenset({"parts"}),
        "ditc::quantized_linear": frozenset({"x", "gate", "residual"}),
        "ditc::weight_linear": frozenset({"x"}),
        "ditc::vnni_linear": frozenset({"x", "scale", "gate", "residual"}),
        "ditc::vnni_norm_linear": frozenset({"x", "multiplier", "shift", "gate", "residual"}),
        "ditc::vnni_linear_quantize": frozenset({"x", "scale"}),
        "ditc::vnni_weight_linear": frozenset({"x"}),
    }
)
"""Operators that treat each row (all but the last dimension) on its own, and their arguments that have rows. Every
dynamic range of ditc's formats is one row's."""

REDUCE = _packets("mean sum amax amin var std prod any all linalg_vector_norm")
ALONG_ONE = _packets("softmax _softmax _safe_softmax log_softmax cumsum glu flip")


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for a node's operator; ``None`` where there is none."""
    target, op = node.target, packet(node)
    if target is operator.getitem:
        return _item
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removesuffix("_kernel")
        if name in ALONG:
            return _rowwise
        if name in ATTENTIONS:
            return ATTENTIONS[name]
        if torch.Tag.pointwise in target.tags or op in ELEMENTWISE:
            return _elementwise
    if op in SIZED_LIKE:
        # takes a tensor for its type; the sizes are written out
        return lambda node, known: Step(None)
    if op in (aten.layer_norm, aten.rms_norm):
        return _norm
    if op in (aten.matmul, aten.mm, aten.addmm):
        return _product
    if op in REDUCE:
        return _reduce
    if op in ALONG_ONE:
        return _along_one
    return VIEWS.get(op)


def _item(node: fx.Node, known: Known) -> Step:
    found = known[node.args[0]]  # type: ignore[index]
    assert isinstance(found, tuple)
    return Step(found[node.args[1]])  # type: ignore[index]


def _elementwise(node: fx.Node, known: Known) -> Step:
    rows, taken = meeting(node, len(sizes_of(node)), tensors(node), known)
    return Step(rows, taken)


def _rowwise(node: fx.Node, known: Known) -> Step:
    along_rows: list[fx.Node] = []
    for name, value in _arguments(node):
        operands = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
        if name in ALONG[_name(node)]:
            along_rows += operands
        elif any(known.get(operand) is not None for operand in operands):
            raise TokensMixed(node, f"its {name} is made of tokens")
    rank = len(sizes_of(along_rows[0]))
    rows, taken = meeting(node, rank, along_rows, known)
    if rows.dim == rank - 1 or rows.batch == rank - 1:
        raise TokensMixed(node, "it works along the tokens")
    return Step(_same(node, rank, rows), taken)


def _same(node: fx.Node, rank: int, rows: Rows) -> Found:
    """The rows of what a node returns where they stay in their dimension."""
    values = node.meta["val"]
    many = values if isinstance(values, list | tuple) else [values]
    for value in many:
        if value.dim() != rank or value.shape[rows.dim] != rows.size:
            raise TokensMixed(node, "it returns something that is not one value for each token")
    return tuple(rows for _ in many) if isinstance(values, list | tuple) else rows


def _name(node: fx.Node) -> str:
    name: str = node.target._schema.name  # type: ignore[union-attr]
    return name.removesuffix("_kernel")


def _arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """A node's arguments with their names."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    yield from zip(names, node.args, strict=False)
    yield from node.kwargs.items()


def _only_first(node: fx.Node, known: Known) -> Rows:
    """The rows of the first operand, where no other has any."""
    first, *others = tensors(node)
    rows = known.rows(first)
    if rows is None or any(known.get(other) is not None for other in others):
        raise TokensMixed(node, "another operand than the first is made of tokens")
    return rows


def _norm(node: fx.Node, known: Known) -> Step:
    rows = _only_first(node, known)
    outer = len(sizes_of(node)) - len(node.args[1])  # type: ignore[arg-type]
    if rows.dim >= outer or (rows.batch or 0) >= outer:
        raise TokensMixed(node, "it normalises over the tokens")
    return Step(rows)


def _product(node: fx.Node, known: Known) -> Step:
    left, right = tensors(node)[-2:]
    rows = known.rows(left)
    rank = len(sizes_of(left))
    if rows is None or known.get(right) is not None or len(sizes_of(right)) != 2 or rows.holds(rank - 1):
        raise TokensMixed(node, "a product in which tokens meet tokens, or one that is not with one matrix")
    if packet(node) is aten.addmm and len(sizes_of(tensors(node)[0])) > 1:
        raise TokensMixed(node, "it adds a matrix to a product")
    return Step(rows)


def _reduce(node: fx.Node, known: Known) -> Step:
    rows, rank = _only_first(node, known), len(sizes_of(tensors(node)[0]))
    named = dict(_arguments(node))
    dims = named.get("dim")
    if dims is None or dims == []:
        raise TokensMixed(node, "it reduces over the tokens")
    gone = {dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])}
    if any(map(rows.holds, gone)):
        raise TokensMixed(node, "it reduces over the tokens")
    if named.get("keepdim", False):
        return Step(rows)
    return Step(rows.moved(lambda dim: dim - sum(g < dim for g in gone)))


def _along_one(node: fx.Node, known: Known) -> Step:
    rows, rank = _only_first(node, known), len(sizes_of(tensors(node)[0]))
    named = dict(_arguments(node))
    dims = named.get("dim", named.get("dims", -1))
    if any(rows.holds(dim % rank) for dim in (dims if isinstance(dims, list | tuple) else [dims])):
        raise TokensMixed(node, "it works along the tokens")
    return Step(rows)
