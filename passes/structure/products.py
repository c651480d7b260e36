"""Finds every product with a weight, however it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from .flow import Dependence
from .ops import argument, aten, display_name, graph_input, module_path, packet, shape, tensors


@dataclass(frozen=True)
class Product:
    """``source`` (M rows of K features) times a weight, N features out."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: bool
    M: int
    N: int
    K: int

    @property
    def name(self) -> str:
        """The module's path as the weight's name tells it: exact where modules share a call."""
        fact = graph_input(self.weight)
        return display_name(fact.name) if fact is not None else module_path(self.node) or self.node.name


def find_products(graph: fx.Graph, flow: Dependence) -> list[Product]:
    """``linear``, and matrix products (``mm`` to ``einsum``) one operand of which is a weight."""
    found: list[Product] = []
    for node in graph.nodes:
        product = _product(node, flow)
        if product is not None:
            found.append(product)
    return found


def _product(node: fx.Node, flow: Dependence) -> Product | None:
    op, operands = packet(node), tensors(node)
    out = shape(node)
    if out is None or len(operands) < 2:
        return None
    if op is aten.linear:
        source, weight = operands[:2]
        return _sized(node, source, flow.weights.get(weight, weight), len(operands) > 2, out)
    if op in (aten.addmm, aten.baddbmm):
        source, weight = operands[1:3]
        bias = argument(node, 3, "beta", 1) != 0
    elif op in (aten.mm, aten.matmul, aten.bmm):
        source, weight = operands[:2]
        bias = False
    elif op is aten.einsum and len(operands) == 2:
        source, weight = operands if operands[1] in flow.weights else operands[::-1]
        bias = False
    else:
        return None
    owner = flow.weights.get(weight)
    fact = graph_input(owner) if owner is not None else None
    # a buffer that multiplies is a table (RoPE's frequencies, a resampling matrix), not a layer
    if fact is None or fact.kind == "buffer" or not flow.inputs.get(source):
        return None
    return _sized(node, source, owner or weight, bias, out)


def _sized(node: fx.Node, source: fx.Node, weight: fx.Node, bias: bool, out: tuple[int, ...]) -> Product:
    sizes = shape(source) or (1,)
    if packet(node) is aten.einsum:
        terms = str(node.args[0]).replace(" ", "").partition("->")
        first, second = terms[0].split(",")
        mine = first if tensors(node)[0] is source else second
        K = math.prod(size for c, size in zip(mine, sizes, strict=False) if c not in terms[2])
    else:
        K = sizes[-1]
    rows = max(math.prod(sizes) // max(K, 1), 1)
    return Product(node, source, weight, bias, rows, math.prod(out) // rows, K)
