"""Sizes of state in graphs whose shapes are symbolic."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ditc.runtime.artifact import SymbolicSize

from ..errors import PassError
from ..rewrite import input_of, size_hint


def state_size(graph: fx.GraphModule, size: Any) -> int | SymbolicSize:
    """A size of a state entry: a number, or what the graph's integer inputs make of it.

    Raises:
        PassError: the size depends on a symbol that is no input.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    known = {}
    for position, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if input_of(node).kind == "size" and isinstance(value, torch.SymInt):
            known[str(value.node.expr)] = position
    missing = sorted(str(s) for s in expression.free_symbols if str(s) not in known)
    if missing:
        raise PassError(f"a size of the cache's state, {expression}, depends on {', '.join(missing)}: no input says it")
    symbols = tuple((str(s), known[str(s)]) for s in sorted(expression.free_symbols, key=str))
    return SymbolicSize(str(expression), symbols, size_hint(size))
