"""What stands between projections and an attention's operand: calls that can be run again on other tensors.

A chain knows of each of its values where heads and tokens are, so that it can be run for one head of one sample, in
another precision, and for masks in the place of what the projections made. Which calls may be in a chain depends on
what is asked: those that are linear in what they read (:func:`linear_step`), or those that norms are made of
(:func:`norm_step`). What is more than that, tests on numbers have to prove.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..rewrite import aten
from ..structure.flow import dependence
from .sink import ALONG, is_transpose, rank_of

LONGEST = 96
"""Calls of a chain beyond which it is left alone: norms and rotations are shorter."""

Heads = int | None
"""Which of the dimensions 1 and 2 counts heads, the other counts tokens; ``None`` for ``[B, L, H * D]``."""
Step = list[tuple[fx.Node, Heads]]


class Unfit(Exception):  # noqa: N818 - an outcome, not a fault
    """Why calls are no chain, or not one of the kind that is looked for."""


@dataclass(frozen=True)
class Facts:
    """What is known of a graph while chains are looked for in it.

    Attributes:
        learned: nodes that the product with a weight has a part in: tables and masks have none.
        weights: nodes made of weights alone.
        position: of each node in the program; nodes that a pass has made since are in none of these.
        number: equal for nodes that compute the same.
    """

    learned: Collection[fx.Node]
    weights: Collection[fx.Node]
    position: Mapping[fx.Node, int]
    number: Mapping[fx.Node, int]

    @classmethod
    def of(cls, graph: fx.GraphModule) -> Facts:
        flow = dependence(graph.graph)
        position = {node: i for i, node in enumerate(graph.graph.nodes)}
        return cls(flow.learned, flow.weights.keys(), position, _numbers(graph))

    def latest(self, nodes: Collection[fx.Node]) -> fx.Node:
        """The one that comes last in the program."""
        return max(nodes, key=lambda node: self.position.get(node, -1))


def _numbers(graph: fx.GraphModule) -> dict[fx.Node, int]:
    seen: dict[str, int] = {}
    numbers: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        text = node.name
        if node.op == "call_function":
            operands = fx.node.map_arg((node.args, node.kwargs), lambda operand: f"%{numbers[operand]}")
            text = f"{node.target} {operands}"
        numbers[node] = seen.setdefault(text, len(seen))
    return numbers


@dataclass(frozen=True)
class Chain:
    """Calls in program order that make ``end`` of ``sources``, and the tensors ``outside`` that they read besides.

    ``front`` counts the dimensions that stand for batch, heads and tokens: three, or two where a source is flat.
    """

    end: fx.Node
    sources: tuple[fx.Node, ...]
    calls: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]
    heads: Mapping[fx.Node, Heads]

    @classmethod
    def made(
        cls, end: fx.Node, sources: Sequence[fx.Node], calls: Collection[fx.Node], heads: Mapping[fx.Node, Heads],
        facts: Facts,
    ) -> Chain:  # fmt: skip
        """Raises :class:`Unfit` where a call reads what cannot be replaced by numbers."""
        ordered = sorted(calls, key=facts.position.__getitem__)
        known = {*ordered, *sources}
        outside = dict.fromkeys(n for call in ordered for n in _read(call) if n not in known)
        for node in outside:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
                raise Unfit(f"{_name(node)} gives it sizes or choices")
            if not all(isinstance(size, int) for size in value.shape):
                raise Unfit("its tables have symbolic sizes")
        return cls(end, tuple(sources), tuple(ordered), tuple(outside), heads)

    @property
    def front(self) -> int:
        return 2 if any(self.heads[source] is None for source in self.sources) else 3

    def key(self, facts: Facts) -> str:
        """Equal for chains that do the same with equal tables."""
        names = {node: f"s{i}" for i, node in enumerate(self.sources)}
        names |= {node: f"c{i}" for i, node in enumerate(self.calls)}
        names |= {node: f"%{facts.number.get(node, node.name)}" for node in self.outside}
        lines = [f"{[(tuple(source.meta['val'].shape), self.heads[source]) for source in self.sources]}"]
        for call in self.calls:
            operands = fx.node.map_arg((call.args, call.kwargs), lambda n: names.get(n, "-"))
            lines.append(f"{call.target} {operands}")
        return "\n".join([*lines, names[self.end]])

    def __call__(self, inputs: Sequence[Tensor], outside: Sequence[Tensor]) -> Tensor:
        """``end`` for other sources and tables: for any number of samples, and unless flat, of heads.

        Types are those of the inputs: casts between floating types are left out.
        """
        values: dict[fx.Node, Any] = dict(zip(self.sources, inputs, strict=True))
        values |= zip(self.outside, outside, strict=True)
        for call in self.calls:
            values[call] = _run(call, values, self.front)
        result: Tensor = values[self.end]
        return result


# --- running ---------------------------------------------------------------------------------------------------------


def _canvas(node: Any) -> bool:
    """Whether a node is memory that is to be written over."""
    return isinstance(node, fx.Node) and node.target in _CANVAS


_CANVAS = frozenset(
    {
        *(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default),
        *(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default),
    }
)


def _read(call: fx.Node) -> list[fx.Node]:
    """The operands whose values matter."""
    if call.target is aten.copy.default:
        return [call.args[1]]  # type: ignore[list-item]
    if call.target is aten.slice_scatter.default and _canvas(call.args[0]):
        return [call.args[1]]  # type: ignore[list-item]
    return call.all_input_nodes


def _run(call: fx.Node, values: Mapping[fx.Node, Any], front: int) -> Any:
    target: Any = call.target
    if target in _UNCHANGED or target is _REPEAT:
        return values[call.args[0]]  # type: ignore[index]
    if target is aten.copy.default:
        return values[call.args[1]]  # type: ignore[index]
    shape = call.meta["val"].shape if isinstance(call.meta["val"], Tensor) else ()
    if target is aten.reshape.default:
        x = values[call.args[0]]  # type: ignore[index]
        return x.reshape(*x.shape[:front], *shape[front:])
    args: list[Any] = [fx.node.map_arg(arg, values.get) for arg in call.args]
    kwargs: dict[str, Any] = {name: fx.node.map_arg(arg, values.get) for name, arg in call.kwargs.items()}
    if target is aten.slice_scatter.default:
        base, part, *place = args
        if _canvas(call.args[0]):
            base = part.new_zeros((*part.shape[:front], *shape[front:]))
        # a copy into the base would have cast
        common = torch.promote_types(base.dtype, part.dtype)
        return target(base.to(common), part.to(common), *place, **kwargs)
    if target is aten.rms_norm.default and (len(args) < 4 or args[3] is None):
        # what is added where nothing is said depends on the type
        eps = torch.finfo(call.meta["val"].dtype).eps
        return target(*args[:3], *[None] * (3 - len(args)), eps)
    return target(*args, **kwargs)


# --- steps back ------------------------------------------------------------------------------------------------------


_UNCHANGED = frozenset({aten._to_copy.default, aten.clone.default})
_ALIKE = frozenset({aten.neg.default, aten.view_as_complex.default, aten.view_as_real.default})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_MUL, _DIV = aten.mul.Tensor, aten.div.Tensor
_REPEAT = aten.repeat_interleave.self_int
_JOINS = frozenset({aten.cat.default, aten.stack.default})


def linear_step(node: fx.Node, heads: Heads, facts: Facts) -> Step | None:
    """The operands of a call that is linear in all of them and keeps samples and heads apart; ``None`` for others."""
    if node.op != "call_function":
        return None
    if is_transpose(node):
        return None if heads is None else [(node.args[0], 3 - heads)]  # type: ignore[list-item]
    if node.target is aten.reshape.default:
        return _reshape_step(node, heads)
    if node.target is operator.getitem:
        # one of several results is an operand like others where the call behind it is a step
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return None if linear_step(source, heads, facts) is None else [(source, heads)]
    moving = [operand for operand in _read(node) if operand in facts.learned]
    front = 2 if heads is None else 3
    if node.target in ALONG:
        fits = _along(node, heads, len(moving))
    elif node.target is _MUL:
        fits = len(moving) == 1 and list(node.args).count(moving[0]) == 1 and _same_front(moving, node, front)
    elif node.target is _DIV:
        fits = moving == [node.args[0]] and _same_front(moving, node, front) and not node.kwargs
    elif node.target is aten.copy.default:
        fits = len(moving) == 1 and _sizes(moving[0]) == _sizes(node)
    else:
        fits = _keeps(node) or node.target in _ALIKE or (node.target in _SUMS and _same_front(moving, node, front))
    return [(operand, heads) for operand in moving] if fits and moving else None


def norm_step(node: fx.Node, heads: Heads, facts: Facts) -> Step | None:
    """As :func:`linear_step` for calls that norms over the features are made of."""
    if node.op != "call_function":
        return None
    if is_transpose(node):
        return None if heads is None else [(node.args[0], 3 - heads)]  # type: ignore[list-item]
    moving = [operand for operand in node.all_input_nodes if operand in facts.learned]
    if node.target in _REDUCTIONS:
        dims = node.args[1]
        last = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else None
        fits = isinstance(last, int) and last % rank_of(moving[0]) == rank_of(moving[0]) - 1
        fits = fits and rank_of(node) == rank_of(moving[0])
    elif node.target in _WHOLE_NORMS:
        fits = len(node.args[1]) == 1  # type: ignore[arg-type]
    else:
        fits = (node.target in _NORM_PARTS and _same_front(moving, node, 3)) or _keeps(node)
    return [(operand, heads) for operand in moving] if fits and moving else None


_REDUCTIONS = frozenset({aten.mean.dim, aten.sum.dim_IntList})
_WHOLE_NORMS = frozenset({aten.rms_norm.default, aten.layer_norm.default})
_NORM_PARTS = frozenset(
    {
        *(_MUL, _DIV, aten.add.Tensor, aten.sub.Tensor, aten.pow.Tensor_Scalar, aten.square.default),
        *(aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default),
    }
)


def _keeps(node: fx.Node) -> bool:
    """Whether a call changes nothing but the floating type or the memory's order; repeats by one change nothing."""
    value = node.meta.get("val")
    if node.target is _REPEAT:
        return bool(node.args[1] == 1)
    kept = node.target in _UNCHANGED and "device" not in node.kwargs
    return kept and isinstance(value, Tensor) and value.is_floating_point()


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _same_front(operands: Sequence[fx.Node], node: fx.Node, front: int) -> bool:
    """Whether operands have the samples, heads and tokens of the result, and as many dimensions."""
    sizes = _sizes(node)
    return all(len(_sizes(x)) == len(sizes) and _sizes(x)[:front] == sizes[:front] for x in operands)


def _along(node: fx.Node, heads: Heads, moving: int) -> bool:
    if node.target in _JOINS and moving < len(dict.fromkeys(node.args[0])):  # type: ignore[arg-type]
        return False
    if node.target is aten.slice_scatter.default and moving < 1 + (not _canvas(node.args[0])):
        return False
    check = ALONG[node.target]
    front, tokens = (2, 1) if heads is None else (3, 3 - heads)
    dims = check.of(node)
    return all(dim >= front or (check.any and dim == tokens) for dim in (dims if isinstance(dims, list) else [dims]))


def _reshape_step(node: fx.Node, heads: Heads) -> Step | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = _sizes(source), _sizes(node)
    if heads is not None and len(before) > 3 and before[:3] == after[:3]:
        return [(source, heads)]
    if heads is None and len(before) > 2 and before[:2] == after[:2]:
        return [(source, heads)]
    if heads == 2 and len(before) == 3 and len(after) == 4 and before[:2] == after[:2]:
        return [(source, None)]
    return None


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default") if node.op == "call_function" else f"an input ({node.name})"


# --- walks -----------------------------------------------------------------------------------------------------------


def walk(
    end: fx.Node, facts: Facts, stop: Collection[fx.Node] = (), heads: Heads = 1
) -> tuple[dict[fx.Node, Heads], list[fx.Node]]:
    """Goes back from ``end`` as long as calls are linear, and no further than ``stop``.

    Returns:
        The calls with their heads, those of ``end`` as given; and where it ended, nodes whose heads are there too.

    Raises:
        Unfit: there are too many calls, or a value is used with heads and tokens in both orders.
    """
    order: dict[fx.Node, Heads] = {end: heads}
    ends: list[fx.Node] = []
    pending = {end}
    while pending:
        node = facts.latest(pending)
        pending.remove(node)
        step = None if node in stop or node not in facts.position else linear_step(node, order[node], facts)
        if step is None:
            ends.append(node)
            continue
        if len(order) > LONGEST:
            raise Unfit("there is too much between the projection and the attention")
        for operand, turned in step:
            if order.setdefault(operand, turned) != turned:
                raise Unfit("heads and tokens change places on one way only")
            pending.add(operand)
    return order, ends[::-1]


def norm_chains(end: fx.Node, heads: Heads, facts: Facts) -> Iterator[Chain]:
    """Chains of one source that may be a norm, from short to long: their source is ``[., ., ., D]`` as ``end`` is."""
    order: dict[fx.Node, Heads] = {end: heads}
    calls: list[fx.Node] = []
    pending = {end}
    while pending and len(calls) <= LONGEST:
        node = facts.latest(pending)
        pending.remove(node)
        step = norm_step(node, order[node], facts) if node in facts.position else None
        if step is None:
            return
        calls.append(node)
        for operand, turned in step:
            if order.setdefault(operand, turned) != turned:
                return
            pending.add(operand)
        if len(pending) == 1:
            (source,) = pending
            if rank_of(source) == 4 and source.meta["val"].shape[-1] == end.meta["val"].shape[-1]:
                try:
                    yield Chain.made(end, [source], calls, order, facts)
                except Unfit:
                    return


def uncast(node: fx.Node) -> fx.Node:
    """The tensor in front of casts to wider types and of copies."""
    while _keeps(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = source.meta["val"].dtype, node.meta["val"].dtype
        if not before.is_floating_point or torch.promote_types(before, after) != after:
            break
        node = source
    return node
