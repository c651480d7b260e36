"""One abstract run over a graph: every value's axes, by a table of rules and two general ones.

A rule takes the node and the :class:`Walk`, and returns the axes of its value: one tuple of dimensions, or a list of
them for an operator that returns several tensors. Operators without a rule whose result has the broadcast shape of
their inputs are elementwise; the rest are matched dimension by dimension by size, and named in ``Walk.guessed``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .axes import CONSTANT, DATA, AxisAlgebra, Dim, Dims, rank_of, size_of
from .ops import as_int, graph_input, packet, shape, tensors, value

Axes = Dims | list[Dims]
Rule = Callable[["Walk", fx.Node], Axes]


@dataclass
class Walk:
    """The state of one abstract run over a graph; ``rules`` are keyed by operator."""

    rules: Mapping[Any, Rule]
    algebra: AxisAlgebra = field(default_factory=AxisAlgebra)
    axes: dict[fx.Node, Axes] = field(default_factory=dict)
    guessed: dict[str, int] = field(default_factory=dict)

    def dims(self, node: fx.Node) -> Dims:
        """The dimensions of a node that carries one tensor; of a list, those of its first tensor."""
        found = self.axes.get(node, ())
        if isinstance(found, list):
            return found[0] if found else ()
        return found

    def run(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "placeholder":
                self.axes[node] = self._input(node)
            elif node.op == "get_attr":
                self.axes[node] = self.constant(shape(node) or ())
            elif node.op == "call_function":
                self.axes[node] = self._checked(node, self._apply(node))

    def _input(self, node: fx.Node) -> Dims:
        sizes, fact = shape(node), graph_input(node)
        if sizes is None:
            return ()
        if fact is not None and fact.kind == "data":
            return tuple(self.algebra.fresh(size, DATA, fact.name, dim) for dim, size in enumerate(sizes))
        return self.constant(sizes, fact.name if fact else "")

    def constant(self, sizes: Sequence[int], source: str = "") -> Dims:
        return tuple(self.algebra.fresh(size, CONSTANT, source, dim) for dim, size in enumerate(sizes))

    def _apply(self, node: fx.Node) -> Axes:
        rule = self.rules.get(packet(node))
        if rule is not None:
            return rule(self, node)
        if isinstance(value(node), list | tuple):
            return [self.matched(node, tuple(item.shape)) for item in value(node) if isinstance(item, torch.Tensor)]
        sizes = shape(node)
        return self.elementwise(node, sizes) if sizes is not None else ()

    def _checked(self, node: fx.Node, axes: Axes) -> Axes:
        """Replaces what does not have the sizes of the node's value: a rule may be wrong, the value is not."""
        sizes = shape(node)
        if sizes is None or isinstance(axes, list):
            return axes
        if len(axes) != len(sizes):
            return self.matched(node, sizes)
        return tuple(
            dim if size_of(dim) == size else self.algebra.fresh(size, CONSTANT)
            for dim, size in zip(axes, sizes, strict=True)
        )

    # --- the two general rules -----------------------------------------------------------------------------------

    def elementwise(self, node: fx.Node, sizes: tuple[int, ...]) -> Dims:
        """Operands in step, aligned at the last dimension, sizes of one repeated."""
        operands = [n for n in tensors(node) if shape(n) is not None]
        shapes = [shape(n) or () for n in operands]
        widest = [max((s[-i] for s in shapes if len(s) >= i), default=1) for i in range(len(sizes), 0, -1)]
        if max((len(s) for s in shapes), default=0) > len(sizes) or tuple(widest) != sizes:
            return self.matched(node, sizes) if operands else self.constant(sizes)
        return self.broadcast([self.dims(n) for n in operands], shapes, sizes)

    def broadcast(self, operands: Sequence[Dims], shapes: Sequence[tuple[int, ...]], sizes: tuple[int, ...]) -> Dims:
        result: list[Dim] = []
        for back in range(len(sizes), 0, -1):
            best: Dim = ()
            for dims, operand in zip(operands, shapes, strict=True):
                if len(dims) >= back and operand[-back] == sizes[-back]:
                    best = self.algebra.unify(best, dims[-back])
            result.append(best if size_of(best) == sizes[-back] else self.algebra.repeats(sizes[-back]))
        return tuple(result)

    def matched(self, node: fx.Node, sizes: Sequence[Any]) -> Dims:
        """A guess: each dimension is the operand's dimension of the same size, the same place first."""
        name = str(packet(node))
        self.guessed[name] = self.guessed.get(name, 0) + 1
        plain = tuple(as_int(size, 1) for size in sizes)
        candidates = [self.dims(n) for n in tensors(node)]
        result: list[Dim] = []
        for position, size in enumerate(plain):
            same_place = [d[position] for d in candidates if len(d) > position and size_of(d[position]) == size]
            anywhere = [dim for d in candidates for dim in d if size_of(dim) == size and dim not in result]
            options = sorted(same_place, key=rank_of, reverse=True) or sorted(anywhere, key=rank_of, reverse=True)
            result.append(options[0] if options and size > 1 else self.algebra.fresh(size, CONSTANT))
        return tuple(result)
