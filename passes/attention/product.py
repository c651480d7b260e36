"""Proof that a subgraph is ``softmax(q k^T * scale + mask) v``: what is read off it, and what it is as one call.

The walk starts at the product with the values and goes back. Every step is one of few that are known to leave an
attention an attention; the first that is not ends the proof with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..rewrite import aten
from .written import Mask, Unproven, Written

NOTHING = -1e4
"""A score that is filled in at or below this hides its key: beside any that is seen, its weight is zero."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CASTS = frozenset({aten._to_copy.default, aten.clone.default})
_SHAPES = frozenset(
    {
        *(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.flatten.using_ints, aten.unflatten.int),
    }
)
_FILLS = frozenset({aten.full.default, aten.full_like.default, aten.scalar_tensor.default})


def prove(output: fx.Node) -> Written:
    """What the attention that ends in ``output`` computes.

    A row that sees no key is NaN where ``-inf`` was filled in by hand, and zero as one call; where a finite number
    was, it is the mean of all values, and as one call what its scores make of it. Such rows are the only difference
    that is no rounding.

    Raises:
        Unproven: the subgraph is no attention, or none that one call computes; says what was met.
    """
    weights, value, value_order, output_order = _second_product(output)
    softmax, shapes = _softmax_behind(weights, output)
    dim = softmax.args[1]
    if not isinstance(dim, int) or dim % _rank(softmax) != _rank(softmax) - 1:
        raise Unproven("its softmax does not run over the keys")
    walk = _Walk(softmax)
    walk.back(softmax.args[0])
    shapes += walk.shapes
    lead = walk.lead or max(shapes, key=len)
    reshaped = any(len(shape) != len(lead) for shape in shapes)
    if reshaped:
        values = value.meta["val"].permute(value_order)
        if list(map(str, values.shape[:-2])) != list(map(str, shapes[0])):
            raise Unproven("its values are repeated, and its scores reshaped")
    return replace(
        walk.found(), value=value, value_order=value_order, output_order=output_order, scale=walk.scale,
        masks=tuple(walk.masks), lead=_fixed(lead, reshaped),
        output_lead=_fixed(shapes[0], reshaped),
    )  # fmt: skip


def _fixed(lead: Sequence[Any], reshaped: bool) -> tuple[int, ...]:
    """Sizes with -1 for symbolic ones, of which a reshape can take one."""
    if reshaped and sum(not isinstance(size, int) for size in lead) > 1:
        raise Unproven("more than one of its leading sizes is symbolic")
    return tuple(size if isinstance(size, int) else -1 for size in lead)


# --- the second product ----------------------------------------------------------------------------------------------


def _is_matmul(node: fx.Node) -> bool:
    return node.target in (aten.matmul.default, aten.bmm.default)


def _second_product(output: fx.Node) -> tuple[fx.Node, fx.Node, tuple[int, ...], tuple[int, ...]]:
    """Weights and values, and their layout."""
    if _is_matmul(output):
        weights, value = output.args[:2]
        assert isinstance(weights, fx.Node) and isinstance(value, fx.Node)
        if _rank(weights) != _rank(value) or _rank(weights) < 3:
            raise Unproven("weights and values have different ranks")
        return weights, value, tuple(range(_rank(value))), tuple(range(_rank(output)))
    if output.target is not aten.einsum.default:
        raise Unproven(f"its last product is {_name(output)}")
    first, second = _operands(output)
    terms, result = _terms(output)
    for weights, value, w, v in ((first, second, *terms), (second, first, *terms[::-1])):
        contracted = [c for c in w if c in v and c not in result]
        features = [c for c in v if c not in w and c in result]
        rows = [c for c in w if c not in v and c in result]
        if not (_comes_from_softmax(weights) and len(contracted) == len(features) == len(rows) == 1):
            continue
        lead = [c for c in w if c not in (*contracted, *rows)]
        if sorted(w) != sorted([*lead, *rows, *contracted]) or sorted(v) != sorted([*lead, *contracted, *features]):
            break
        if w != "".join([*lead, *rows, *contracted]):
            raise Unproven(f"weights are laid out {w!r} in {output.args[0]!r}")
        made = [*lead, *rows, *features]
        return weights, value, _order(v, [*lead, *contracted, *features]), _order("".join(made), list(result))
    raise Unproven(f"its last product is einsum {output.args[0]!r}")


def _comes_from_softmax(node: fx.Node) -> bool:
    while node.target in _CASTS or node.target in _SHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return node.target in _SOFTMAX


_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})


def _softmax_behind(weights: fx.Node, output: fx.Node) -> tuple[fx.Node, list[tuple[Any, ...]]]:
    """The softmax that makes the weights, and the leading sizes on the way."""
    node, reader, shapes = weights, output, []
    while True:
        if set(node.users) != {reader}:
            raise Unproven("its softmax weights are read elsewhere too")
        shapes.append(_lead(node))
        if node.target in _SOFTMAX:
            return node, shapes
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not (_is_cast(node) or _keeps_scores(node, source)):
            raise Unproven(f"its softmax weights are changed by {_name(node)}")
        node, reader = source, node


# --- the scores ------------------------------------------------------------------------------------------------------


@dataclass
class _Walk:
    """Back from the softmax to the product of queries and keys: what stands on the scores."""

    reader: fx.Node
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    shapes: list[tuple[Any, ...]] = field(default_factory=list)
    lead: tuple[Any, ...] | None = None
    product: Written | None = None

    def found(self) -> Written:
        """The product that the walk ended at."""
        assert self.product is not None
        return self.product

    def back(self, node: Any) -> None:
        """Goes from the scores ``node`` to their product."""
        while self.product is None:
            if not isinstance(node, fx.Node):
                raise Unproven("its scores are no tensor")
            if set(node.users) != {self.reader}:
                raise Unproven("its scores are read elsewhere too")
            self.shapes.append(_lead(node))
            self.product = _first_product(node)
            if self.product is not None:
                self._take_factors(node)
                return
            if node.target is aten.add.Tensor:
                self._add(node)
                return
            source = self._step(node)
            if isinstance(source, fx.Node) and node.target not in _SHAPES and _sizes(source) != _sizes(node):
                raise Unproven("its scores are repeated")
            node, self.reader = source, node

    def _take_factors(self, node: fx.Node) -> None:
        """``baddbmm`` scales and adds on its own."""
        if node.target is not aten.baddbmm.default:
            return
        alpha, beta = (_number(node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
        if beta:
            self._mask(node, "add", node.args[0], beta)
        self.scale *= _positive(alpha, node)

    def _add(self, node: fx.Node) -> None:
        """A sum: either of its operands may be the scores, the other stands on them."""
        if node.kwargs or len(node.args) != 2:
            raise Unproven("its scores are added with a factor")
        reasons = []
        for chain, other in (node.args, node.args[::-1]):
            trial = replace(self, reader=node, masks=[*self.masks], shapes=[*self.shapes])
            try:
                trial._mask(node, "add", other)
                if isinstance(chain, fx.Node) and _sizes(chain) != _sizes(node):
                    raise Unproven("its scores are repeated")
                trial.back(chain)
            except Unproven as reason:
                reasons.append(reason)
                continue
            self.__dict__.update(trial.__dict__)
            return
        raise reasons[0]

    def _step(self, node: fx.Node) -> Any:
        """One step back over ``node``; what it does to the scores is kept."""
        a, b = (*node.args, None, None)[:2]
        if isinstance(a, fx.Node) and (_is_cast(node) or _keeps_scores(node, a)):
            return a
        match node.target:
            case aten.mul.Tensor | aten.mul.Scalar:
                chain, factor = (a, b) if _number(b) is not None else (b, a)
                self.scale *= _positive(_number(factor), node)
                return chain
            case aten.div.Tensor | aten.div.Scalar if not node.kwargs:
                self.scale /= _positive(_number(b), node)
                return a
            case aten.masked_fill.Scalar | aten.masked_fill.Tensor:
                self._hides(node, node.args[2])
                self._mask(node, "hide", b)
                return a
            case aten.where.self | aten.where.ScalarOther | aten.where.ScalarSelf:
                left, right = node.args[1:3]
                shown = _number(right) is not None
                self._hides(node, right if shown else left)
                self._mask(node, "show" if shown else "hide", a)
                return left if shown else right
        raise Unproven(f"its scores are changed by {_name(node)}")

    def _hides(self, node: fx.Node, filled: Any) -> None:
        value = _number(filled)
        if value is None or not value * self.scale <= NOTHING:
            raise Unproven(f"{_name(node)} fills in {'a tensor' if value is None else value}, which hides no key")

    def _mask(self, node: fx.Node, kind: str, mask: Any, factor: float = 1.0) -> None:
        if not isinstance(mask, fx.Node) or _rank(mask) > _rank(node):
            raise Unproven(f"its scores are masked with {mask}")
        dtype = mask.meta["val"].dtype
        if dtype not in (_FLOATS if kind == "add" else (torch.bool,)):
            raise Unproven(f"its scores are masked with {dtype}")
        if self.lead is not None and list(map(str, self.lead)) != list(map(str, _lead(node))):
            raise Unproven("masks stand on scores of two shapes")
        self.lead = _lead(node)
        # what was met before stands behind: it scales the mask too
        self.masks.append(Mask(kind, mask, self.scale * factor if kind == "add" else 1.0))


def _first_product(node: fx.Node) -> Written | None:
    """Queries and keys, where ``node`` is their product, laid out ``[..., queries, keys]``."""
    rank = _rank(node)
    if _is_matmul(node) or node.target is aten.baddbmm.default:
        query, key = node.args[-2:]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
        if rank < 3 or _rank(query) != rank or _rank(key) != rank:
            raise Unproven("queries and keys have different ranks, or no heads and no batch")
        plain = tuple(range(rank))
        return Written(query, key, key, plain, (*plain[:-2], rank - 1, rank - 2))
    if node.target is not aten.einsum.default:
        return None
    first, second = _operands(node)
    terms, result = _terms(node)
    *lead, row, column = list(result) if rank > 2 else ["?"] * 3
    query, key, q, k = (first, second, *terms) if row in terms[0] else (second, first, *terms[::-1])
    shared = [c for c in q if c in k and c not in result]
    fits = len(shared) == 1 and sorted(q) == sorted([*lead, row, *shared])
    if not fits or sorted(k) != sorted([*lead, column, *shared]):
        raise Unproven(f"its scores are einsum {node.args[0]!r}")
    return Written(query, key, key, _order(q, [*lead, row, *shared]), _order(k, [*lead, column, *shared]))


# --- reading nodes ---------------------------------------------------------------------------------------------------


def _rank(node: fx.Node) -> int:
    rank: int = node.meta["val"].dim()
    return rank


def _sizes(node: fx.Node) -> list[str]:
    """Sizes as text, which compares symbolic ones without a guard."""
    return [str(size) for size in node.meta["val"].shape]


def _lead(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape[:-2])


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default") if node.op == "call_function" else f"an input ({node.name})"


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    operands = node.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        raise Unproven(f"einsum {node.args[0]!r} has not two operands")
    first, second = operands
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return first, second


def _terms(node: fx.Node) -> tuple[tuple[str, str], str]:
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    letters = all(len(set(term)) == len(term) for term in (*terms, result))
    if not arrow or "." in equation or len(terms) != 2 or not letters:
        raise Unproven(f"einsum {node.args[0]!r} is not spelled out")
    return (terms[0], terms[1]), result


def _order(term: str, wanted: list[str]) -> tuple[int, ...]:
    return tuple(term.index(letter) for letter in wanted)


def _number(value: Any) -> float | None:
    """A constant, written as a number or as a tensor filled with one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    while isinstance(value, fx.Node) and (value.target in _CASTS or value.target in _SHAPES):
        value = value.args[0]
    if isinstance(value, fx.Node) and value.target in _FILLS:
        filled = value.args[0] if value.target is aten.scalar_tensor.default else value.args[1]
        return float(filled) if isinstance(filled, (int, float)) else None
    return None


def _positive(value: float | None, node: fx.Node) -> float:
    if value is None:
        raise Unproven(f"its scores are scaled by a tensor ({_name(node)})")
    if not value > 0 or math.isinf(value):
        raise Unproven(f"its scores are scaled by {value}")
    return value


def _is_cast(node: fx.Node) -> bool:
    """Whether a node changes nothing but the floating type or the memory's order."""
    return node.target in _CASTS and node.meta["val"].dtype in _FLOATS and "device" not in node.kwargs


def _keeps_scores(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node reshapes what is before queries and keys alone."""
    return node.target in _SHAPES and min(_rank(source), _rank(node)) > 2 and _sizes(source)[-2:] == _sizes(node)[-2:]
