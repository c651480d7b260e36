"""Reading one node: its operator, its tensors, its sizes, the module that made it."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from ..capture import INPUT, GraphInput, dotted_path

aten = torch.ops.aten

UNBACKED = 8191
"""Stands for a size that depends on data: a prime, so that it is never taken for another size."""


def packet(node: fx.Node) -> Any:
    """The operator without its overload: an ``OpOverloadPacket``, ``operator.getitem``, another callable or None."""
    if node.op != "call_function":
        return None
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def hint(size: Any) -> int:
    """A size as a plain integer: its example value where it is symbolic."""
    if isinstance(size, int):
        return size
    node = size.node
    if node.has_hint():
        return int(node.hint)
    free: dict[Any, int] = dict.fromkeys(node.expr.free_symbols, UNBACKED)
    known = getattr(node.shape_env, "backed_var_to_val", None) or getattr(node.shape_env, "var_to_val", {})
    return int(node.expr.xreplace({**free, **{s: v for s, v in known.items() if s in free}}))


def value(node: fx.Node) -> Any:
    """The fake value that tracing left on a node."""
    return node.meta.get("val")


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """The sizes of a node's tensor, or None where its value is not one tensor."""
    val = value(node)
    return tuple(hint(size) for size in val.shape) if isinstance(val, torch.Tensor) else None


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument wherever it is written: by position or by keyword."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[index] if len(node.args) > index else default


def as_int(arg: Any, default: int) -> int:
    """An integer argument, which may be a node that carries a symbolic integer."""
    if isinstance(arg, fx.Node):
        arg = value(arg)
    if arg is None:
        return default
    return hint(arg) if isinstance(arg, int | torch.SymInt) else default


def as_ints(arg: Any) -> list[int]:
    """A list of integers that may hold symbolic ones."""
    if isinstance(arg, int | torch.SymInt | fx.Node):
        return [as_int(arg, 1)]
    return [as_int(item, 1) for item in arg]


def tensors(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that carry a tensor, in order, repeated as written."""
    found: list[fx.Node] = []

    def visit(arg: Any) -> None:
        if isinstance(arg, fx.Node):
            if isinstance(value(arg), torch.Tensor | list | tuple):
                found.append(arg)
        elif isinstance(arg, list | tuple):
            for item in arg:
                visit(item)

    for arg in (*node.args, *node.kwargs.values()):
        visit(arg)
    return found


_EMPTY = ("empty", "zeros", "ones", "full", "rand", "randn")
SIZED_LIKE = frozenset(
    getattr(aten, name)
    for kind in _EMPTY
    for name in (f"{kind}_like", f"new_{kind}", "new_empty_strided")
    if hasattr(aten, name)
)
"""Take a tensor for its shape and type alone."""
TYPED_LIKE = frozenset((aten.type_as, aten.expand_as, aten.view_as, aten.reshape_as))
"""Take their second tensor for its shape or type alone."""


def content(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node whose elements its value depends on."""
    op = packet(node)
    if op in SIZED_LIKE:
        return []
    return tensors(node)[:1] if op in TYPED_LIKE else tensors(node)


def graph_input(node: fx.Node) -> GraphInput | None:
    fact = node.meta.get(INPUT)
    return fact if isinstance(fact, GraphInput) else None


_CALL = re.compile(r"@\d+$")


@functools.lru_cache(maxsize=1 << 16)
def _normalised(path: str) -> str:
    return _CALL.sub("", dotted_path(path))


def module_stack(node: fx.Node) -> Iterator[tuple[str, str]]:
    """The modules around a node, outermost first, as (path, key); the key tells calls of one module apart."""
    for key, entry in (node.meta.get("nn_module_stack") or {}).items():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
        yield _normalised(path), str(key)


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module that made a node, or an empty string."""
    return next((path for path, _ in reversed(list(module_stack(node)))), "")


T = TypeVar("T")


def shared_prefix(many: Sequence[Sequence[T]]) -> list[T]:
    """What sequences begin with in common."""
    return [column[0] for column in itertools.takewhile(lambda c: len(set(c)) == 1, zip(*many, strict=False))]


def display_name(name: str) -> str:
    """A weight's name without what every weight's name ends in."""
    return re.sub(r"[._]?(weight|kernel)$", "", name) or name
