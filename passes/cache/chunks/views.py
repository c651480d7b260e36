"""Rules of operators that rearrange: where rows go when a value is reshaped, turned, cut and joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import fx

from ...structure.flow import _packets
from ...structure.ops import argument, as_int, as_ints, aten, packet, tensors
from .rows import Known, Part, Rows, Step, TokensMixed, meeting, sizes_of

Rule = Callable[[fx.Node, Known], Step]


def _source(node: fx.Node, known: Known) -> tuple[Rows, tuple[int, ...]]:
    source = tensors(node)[0]
    rows = known.rows(source)
    if rows is None:
        raise TokensMixed(node, "another operand than the first is made of tokens")
    return rows, sizes_of(source)


def _placed(node: fx.Node, known: Known) -> Rows:
    """The rows of a value that was given other sizes."""
    rows, sizes = _source(node, known)
    new = sizes_of(node)

    def place(dim: int) -> int:
        before = math.prod(sizes[:dim])
        for i, size in enumerate(new):
            if math.prod(new[:i]) == before and size == sizes[dim]:
                return i
        raise TokensMixed(node, "it merges tokens with another dimension, or splits them")

    return rows.moved(place)


def _reshape(node: fx.Node, known: Known) -> Step:
    found = _placed(node, known)
    written = list(argument(node, 1, "shape", argument(node, 1, "size")))
    return Step(found, args={1: lambda count: _with(written, found.dim, found.count(count))})


def _regroup(node: fx.Node, known: Known) -> Step:
    return Step(_placed(node, known))


def _with(sizes: Sequence[Any], at: int, size: int) -> list[Any]:
    """Written sizes with another one at a position; a size that is worked out stays so."""
    return [size if i == at and old != -1 else old for i, old in enumerate(sizes)]


def _permute(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    order = [dim % len(sizes) for dim in as_ints(argument(node, 1, "dims"))]
    return Step(rows.moved(order.index))


def _transpose(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    if packet(node) is aten.t:
        a, b = 0, len(sizes) - 1
    else:
        a, b = (as_int(argument(node, i, f"dim{i - 1}"), 0) % len(sizes) for i in (1, 2))
    return Step(rows.moved(lambda dim: {a: b, b: a}.get(dim, dim)))


def _unsqueeze(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    at = as_int(argument(node, 1, "dim"), 0) % (len(sizes) + 1)
    return Step(rows.moved(lambda dim: dim + (dim >= at)))


def _squeeze(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    dims = argument(node, 1, "dim")
    asked = range(len(sizes)) if dims is None else [dim % len(sizes) for dim in as_ints(dims)]
    gone = {dim for dim in asked if sizes[dim] == 1}
    if any(map(rows.holds, gone)):
        raise TokensMixed(node, "it removes the dimension of the tokens")
    return Step(rows.moved(lambda dim: dim - sum(g < dim for g in gone)))


def _expand(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    more = len(sizes_of(node)) - len(sizes)
    found = rows.moved(lambda dim: dim + more)
    written = list(argument(node, 1, "size"))
    return Step(found, args={1: lambda count: _with(written, found.dim, found.count(count))})


def _repeat(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    times = as_ints(argument(node, 1, "repeats"))
    more = len(times) - len(sizes)
    found = rows.moved(lambda dim: dim + more)
    if any(times[dim] != 1 for dim in (found.dim, found.batch) if dim is not None):
        raise TokensMixed(node, "it repeats tokens")
    return Step(found)


def _interleave(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    dim = argument(node, 2, "dim")
    if dim is None or rows.holds(as_int(dim, 0) % len(sizes)):
        raise TokensMixed(node, "it repeats tokens")
    return Step(rows)


# --- cutting ---


def _slice(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    dim = as_int(argument(node, 1, "dim", 0), 0) % len(sizes)
    if not rows.holds(dim):
        return Step(rows)
    parts, args = _range(node, rows, sizes, 1)
    return Step(rows.with_parts(parts), args=args)


def _range(
    node: fx.Node, rows: Rows, sizes: Sequence[int], first: int
) -> tuple[tuple[Part, ...], dict[int, Callable[[int], int]]]:
    """The tokens from a start to an end that a node names in its arguments, and those arguments; ``first`` is the
    position of the dimension among them."""
    dim = as_int(argument(node, first, "dim", 0), 0) % len(sizes)
    if dim == rows.batch or as_int(argument(node, first + 3, "step", 1), 1) != 1:
        raise TokensMixed(node, "it chooses among samples, or every second token")
    start = _position(argument(node, first + 1, "start"), 0, sizes[dim])
    stop = _position(argument(node, first + 2, "end"), sizes[dim], sizes[dim])
    ahead = Rows(dim, None, rows.cut(node, 0, start))
    inner = Rows(dim, None, rows.cut(node, start, stop))
    args: dict[int, Callable[[int], int]] = {
        first + 1: ahead.count,
        first + 2: lambda count: ahead.count(count) + inner.count(count),
    }
    return inner.parts, {position: size for position, size in args.items() if position < len(node.args)}


def _position(value: Any, default: int, size: int) -> int:
    at = as_int(value, default)
    return max(0, min(at + size if at < 0 else at, size))


def _select(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    at = as_int(argument(node, 1, "dim"), 0) % len(sizes)
    if rows.holds(at):
        raise TokensMixed(node, "it picks one token, or one sample")
    return Step(rows.moved(lambda dim: dim - (dim > at)))


def _split(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    count = len(node.meta["val"])
    dim = as_int(argument(node, 2, "dim", 0), 0) % len(sizes)
    if not rows.holds(dim):
        return Step((rows,) * count)
    if dim == rows.batch or packet(node) is not aten.split_with_sizes:
        raise TokensMixed(node, "it cuts tokens, or samples, into pieces of one size")
    lengths, start = as_ints(argument(node, 1, "split_sizes")), 0
    pieces: list[Rows] = []
    for length in lengths:
        pieces.append(Rows(dim, rows.batch, rows.cut(node, start, start + length)))
        start += length
    found = tuple(piece.with_parts(piece.parts) for piece in pieces)
    return Step(found, args={1: lambda count: [piece.count(count) for piece in pieces]})


def _unbind(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    at = as_int(argument(node, 1, "dim", 0), 0) % len(sizes)
    if rows.holds(at):
        raise TokensMixed(node, "it takes the tokens, or the samples, apart")
    return Step((rows.moved(lambda dim: dim - (dim > at)),) * len(node.meta["val"]))


# --- joining ---


def _cat(node: fx.Node, known: Known) -> Step:
    operands, rank = tensors(node), len(sizes_of(node))
    dim = as_int(argument(node, 1, "dim", 0), 0) % rank
    held = [rows for operand in operands if (rows := known.rows(operand)) is not None]
    if all(rows.dim != dim for rows in held):
        rows, taken = meeting(node, rank, operands, known)
        if rows.batch == dim:
            raise TokensMixed(node, "it joins samples")
        return Step(rows, taken)
    if len({(rows.dim, rows.batch) for rows in held}) != 1:
        raise TokensMixed(node, "its operands hold tokens in different dimensions")
    parts: list[Part] = []
    for operand in operands:
        rows_ = known.rows(operand)
        parts += rows_.parts if rows_ is not None else (Part(sizes_of(operand)[dim], False),)
    return Step(held[0].with_parts(tuple(parts)))


def _stack(node: fx.Node, known: Known) -> Step:
    operands, rank = tensors(node), len(sizes_of(node)) - 1
    at = as_int(argument(node, 1, "dim", 0), 0) % (rank + 1)
    rows, taken = meeting(node, rank, operands, known)
    return Step(rows.moved(lambda dim: dim + (dim >= at)), taken)


def _slice_scatter(node: fx.Node, known: Known) -> Step:
    (onto, written), sizes = tensors(node), sizes_of(node)
    dim = as_int(argument(node, 2, "dim", 0), 0) % len(sizes)
    rows, source = known.rows(onto), known.rows(written)
    if rows is None or dim != rows.dim:
        found, taken = meeting(node, len(sizes), [onto, written], known)
        if found.holds(dim):
            raise TokensMixed(node, "it writes to some of the tokens, or of the samples")
        return Step(found, taken)
    parts, args = _range(node, rows, sizes, 2)
    if rows.with_parts(parts) != source:
        raise TokensMixed(node, "it writes other tokens than those that it writes to")
    return Step(rows, args=args)


def _complex(node: fx.Node, known: Known) -> Step:
    rows, sizes = _source(node, known)
    if packet(node) is aten.view_as_complex and rows.holds(len(sizes) - 1):
        raise TokensMixed(node, "it makes complex numbers of tokens")
    return Step(rows)


def _expand_as(node: fx.Node, known: Known) -> Step:
    rows, taken = meeting(node, len(sizes_of(node)), tensors(node), known)
    return Step(rows, taken)


def _all_of(names: str, rule: Rule) -> dict[Any, Rule]:
    return dict.fromkeys(_packets(names), rule)


VIEWS: Mapping[Any, Rule] = MappingProxyType(
    {
        **_all_of("reshape view _unsafe_view", _reshape),
        **_all_of("flatten unflatten", _regroup),
        **_all_of("permute", _permute),
        **_all_of("transpose t swapaxes", _transpose),
        **_all_of("unsqueeze", _unsqueeze),
        **_all_of("squeeze", _squeeze),
        **_all_of("expand", _expand),
        **_all_of("expand_as", _expand_as),
        **_all_of("repeat", _repeat),
        **_all_of("repeat_interleave", _interleave),
        **_all_of("slice", _slice),
        **_all_of("select", _select),
        **_all_of("split split_with_sizes chunk", _split),
        **_all_of("unbind", _unbind),
        **_all_of("cat concat", _cat),
        **_all_of("stack", _stack),
        **_all_of("slice_scatter", _slice_scatter),
        **_all_of("view_as_complex view_as_real", _complex),
    }
)
"""The rule of every operator that rearranges."""
