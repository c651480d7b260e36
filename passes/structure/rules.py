"""How each operator carries axes: one table, keyed by operator, of small functions (see ``walk``)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .axes import CONSTANT, DATA, FEATURE, Dim, Dims, rank_of, size_of
from .ops import argument, as_int, as_ints, aten, packet, shape, tensors, value
from .walk import Axes, Rule, Walk


def _first(walk: Walk, node: fx.Node) -> tuple[Dims, tuple[int, ...]]:
    source = tensors(node)[0]
    return walk.dims(source), shape(source) or ()


def _index(dim: Any, rank: int) -> int:
    at = as_int(dim, 0)
    return at + rank if at < 0 else at


# --- views -------------------------------------------------------------------------------------------------------


def _reshape(walk: Walk, node: fx.Node) -> Axes:
    dims, _ = _first(walk, node)
    return walk.algebra.reshape(dims, shape(node) or ())


def _permute(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    return tuple(dims[_index(dim, len(sizes))] for dim in argument(node, 1, "dims"))


def _transpose(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    if len(sizes) < 2:
        return dims
    result = list(dims)
    a, b = _index(argument(node, 1, "dim0", 0), len(sizes)), _index(argument(node, 2, "dim1", 1), len(sizes))
    result[a], result[b] = result[b], result[a]
    return tuple(result)


def _unsqueeze(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    at = _index(argument(node, 1, "dim"), len(sizes) + 1)
    return (*dims[:at], (), *dims[at:])


def _squeeze(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    where = argument(node, 1, "dim")
    chosen = set(range(len(sizes))) if where is None else {_index(dim, len(sizes)) for dim in as_ints(where)}
    return tuple(dim for at, dim in enumerate(dims) if not (at in chosen and sizes[at] == 1))


def _expand(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    return walk.broadcast([dims], [sizes], shape(node) or ())


def _repeat(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    out = shape(node) or ()
    dims, sizes = ((),) * (len(out) - len(dims)) + dims, (1,) * (len(out) - len(sizes)) + sizes
    return tuple(
        (*walk.algebra.repeats(new // old), *dim) if old and new != old else dim
        for dim, old, new in zip(dims, sizes, out, strict=True)
    )


def _repeat_interleave(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    out = shape(node) or ()
    if len(out) != len(sizes):
        return walk.matched(node, out)
    return tuple(
        (*dim, *walk.algebra.repeats(new // old)) if old and new % old == 0 and new != old else dim
        for dim, old, new in zip(dims, sizes, out, strict=True)
    )


def _slice(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    at = _index(argument(node, 1, "dim", 0), len(sizes))
    size = sizes[at]
    start, stop = as_int(argument(node, 2, "start"), 0), as_int(argument(node, 3, "end"), size)
    start, stop = start + size if start < 0 else start, stop + size if stop < 0 else stop
    cut = walk.algebra.cut(dims[at], start, stop, as_int(argument(node, 4, "step"), 1))
    return (*dims[:at], cut, *dims[at + 1 :])


def _narrow(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    at, start = _index(argument(node, 1, "dim"), len(sizes)), as_int(argument(node, 2, "start"), 0)
    return (*dims[:at], walk.algebra.cut(dims[at], start, start + (shape(node) or ())[at]), *dims[at + 1 :])


def _select(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    at = _index(argument(node, 1, "dim"), len(sizes))
    return (*dims[:at], *dims[at + 1 :])


def _pieces(walk: Walk, node: fx.Node) -> Axes:
    """``split``, ``split_with_sizes``, ``chunk``, ``tensor_split``: consecutive cuts, as long as the results are."""
    dims, sizes = _first(walk, node)
    at = _index(argument(node, 2, "dim", 0), len(sizes))
    result: list[Dims] = []
    offset = 0
    for piece in value(node):
        length = as_int(piece.shape[at], 1)
        result.append((*dims[:at], walk.algebra.cut(dims[at], offset, offset + length), *dims[at + 1 :]))
        offset += length
    return result


def _unbind(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    at = _index(argument(node, 1, "dim", 0), len(sizes))
    return [(*dims[:at], *dims[at + 1 :])] * len(value(node))


def _getitem(walk: Walk, node: fx.Node) -> Axes:
    source, index = node.args
    found = walk.axes.get(source, ()) if isinstance(source, fx.Node) else ()
    if isinstance(found, list) and isinstance(index, int) and index < len(found):
        return found[index]
    return walk.constant(shape(node) or ())


# --- joining -----------------------------------------------------------------------------------------------------


def _cat(walk: Walk, node: fx.Node) -> Axes:
    parts = [n for n in tensors(node) if (shape(n) or (0,)) != (0,)]
    rank = len(shape(node) or ())
    at = _index(argument(node, 1, "dim", 0), rank)
    sizes = shape(node) or ()
    operands, shapes = [walk.dims(n) for n in parts], [shape(n) or () for n in parts]
    if any(len(dims) != rank for dims in operands):
        return walk.matched(node, sizes)
    joined = walk.algebra.concat([(dims[at], s[at]) for dims, s in zip(operands, shapes, strict=True)])
    kept = [dims[:at] + dims[at + 1 :] for dims in operands]
    rest = walk.broadcast(kept, [s[:at] + s[at + 1 :] for s in shapes], sizes[:at] + sizes[at + 1 :])
    return (*rest[:at], joined, *rest[at:])


def _stack(walk: Walk, node: fx.Node) -> Axes:
    parts, sizes = tensors(node), shape(node) or ()
    at = _index(argument(node, 1, "dim", 0), len(sizes))
    rest = walk.broadcast([walk.dims(n) for n in parts], [shape(n) or () for n in parts], sizes[:at] + sizes[at + 1 :])
    return (*rest[:at], walk.algebra.fresh(len(parts), CONSTANT), *rest[at:])


def _slice_scatter(walk: Walk, node: fx.Node) -> Axes:
    """Writes ``source`` into a slice: where it covers a run of a dimension, the result is a concatenation."""
    target, source = tensors(node)[:2]
    sizes, part = shape(target) or (), shape(source) or ()
    at = _index(argument(node, 2, "dim", 0), len(sizes))
    dims, new = walk.dims(target), walk.dims(source)
    rest = walk.broadcast([dims, new], [sizes, part], sizes)
    start = as_int(argument(node, 3, "start"), 0)
    start = start + sizes[at] if start < 0 else min(start, sizes[at])
    if as_int(argument(node, 5, "step"), 1) != 1:
        return (*rest[:at], dims[at], *rest[at + 1 :])
    stop = start + part[at]
    before, after = walk.algebra.cut(dims[at], 0, start), walk.algebra.cut(dims[at], stop, sizes[at])
    pieces = [(before, start), (new[at], part[at]), (after, sizes[at] - stop)]
    joined = walk.algebra.concat([piece for piece in pieces if piece[1] > 0])
    return (*rest[:at], joined, *rest[at + 1 :])


def _select_scatter(walk: Walk, node: fx.Node) -> Axes:
    """Writes ``source`` at one index: the other dimensions are the source's as much as the target's."""
    target, source = tensors(node)[:2]
    sizes, dims = shape(target) or (), walk.dims(target)
    at = _index(argument(node, 2, "dim"), len(sizes))
    kept = sizes[:at] + sizes[at + 1 :]
    rest = walk.broadcast([dims[:at] + dims[at + 1 :], walk.dims(source)], [kept, shape(source) or ()], kept)
    return (*rest[:at], dims[at], *rest[at:])


def _first_operand(walk: Walk, node: fx.Node) -> Axes:
    """Same shape as the first operand, whatever the others hold (``index_put``, ``roll``)."""
    dims, _ = _first(walk, node)
    return dims


def _resized(walk: Walk, node: fx.Node) -> Axes:
    """Padding, interpolation, pooling, sorting: dimension by dimension, a changed size is made from the old one."""
    dims, sizes = _first(walk, node)
    return tuple(
        dim if old == new else walk.algebra.chosen(dim, new)
        for dim, old, new in zip(dims, sizes, shape(node) or (), strict=True)
    )


def _indexed(walk: Walk, node: fx.Node) -> Axes:
    """``x[..., index, ...]`` with tensors as indices: they replace the dimensions that they index."""
    source, indices = node.args[0], argument(node, 1, "indices")
    dims = walk.dims(source) if isinstance(source, fx.Node) else ()
    used = [at for at, index in enumerate(indices) if isinstance(index, fx.Node)]
    if len(used) != 1:
        return walk.matched(node, shape(node) or ())
    at = used[0]
    chosen = walk.dims(indices[at])
    if len(chosen) == 1 and rank_of(chosen[0]) < DATA:
        chosen = (walk.algebra.chosen(dims[at], (shape(node) or ())[at]),)
    return (*dims[:at], *chosen, *dims[at + 1 :])


def _gathered(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    at = _index(argument(node, 1, "dim", 0), len(sizes))
    out = shape(node) or ()
    return tuple(
        walk.algebra.chosen(dim, new) if where == at or old != new else dim
        for where, (dim, old, new) in enumerate(zip(dims, sizes, out, strict=True))
    )


# --- products and reductions -------------------------------------------------------------------------------------


def _linear(walk: Walk, node: fx.Node) -> Axes:
    dims, _ = _first(walk, node)
    return (*dims[:-1], walk.algebra.made_from(dims[-1] if dims else (), (shape(node) or (1,))[-1]))


def _product(walk: Walk, node: fx.Node, left: fx.Node, right: fx.Node) -> Axes:
    """``(…, rows, inner) @ (…, inner, columns)``; columns from a weight are new features."""
    a, b, sizes = walk.dims(left), walk.dims(right), shape(node) or ()
    if not a or not b or len(sizes) < 1:
        return walk.matched(node, sizes)
    columns = b[-1] if len(b) > 1 else None
    if columns is not None and rank_of(columns) <= CONSTANT:
        columns = walk.algebra.made_from(a[-1], size_of(columns))
    rows = a[-2:-1] if len(a) > 1 else ()
    tail = (*rows, columns) if columns is not None else rows
    batch = sizes[: len(sizes) - len(tail)]
    lead = walk.broadcast([a[:-2], b[:-2]], [(shape(left) or ())[:-2], (shape(right) or ())[:-2]], batch)
    return (*lead, *tail)


def _matmul(walk: Walk, node: fx.Node) -> Axes:
    left, right = tensors(node)[:2]
    return _product(walk, node, left, right)


def _addmm(walk: Walk, node: fx.Node) -> Axes:
    _, left, right = tensors(node)[:3]
    return _product(walk, node, left, right)


def _einsum(walk: Walk, node: fx.Node) -> Axes:
    equation = str(node.args[0]).replace(" ", "")
    operands, sizes = tensors(node), shape(node) or ()
    if "." in equation:
        return walk.matched(node, sizes)
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        output = "".join(sorted(c for c in set(inputs) - {","} if inputs.count(c) == 1))
    known: dict[str, Dim] = {}
    weight_only: set[str] = set()
    for term, operand in zip(terms, operands, strict=True):
        for letter, dim in zip(term, walk.dims(operand), strict=True):
            known[letter] = walk.algebra.unify(known.get(letter, ()), dim)
    made = len(operands) > 1
    for letter in output:
        if made and rank_of(known[letter]) == CONSTANT and size_of(known[letter]) > 1:
            weight_only.add(letter)
    return tuple(walk.algebra.fresh(size_of(known[c]), FEATURE) if c in weight_only else known[c] for c in output)


def _attention(walk: Walk, node: fx.Node) -> Axes:
    query, _, val = tensors(node)[:3]
    dims = (*walk.dims(query)[:-1], walk.dims(val)[-1])
    if isinstance(value(node), list | tuple):
        rest = [walk.matched(node, tuple(v.shape)) for v in value(node)[1:] if isinstance(v, torch.Tensor)]
        return [dims, *rest]
    return dims


def _reduce(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    at_arg = 2 if packet(node) is aten.linalg_vector_norm or packet(node) is aten.norm else 1
    where, out = argument(node, at_arg, "dim"), shape(node)
    if out is None:
        result = value(node)
        return [walk.matched(node, tuple(item.shape)) for item in result] if isinstance(result, list | tuple) else ()
    chosen = {_index(dim, len(sizes)) for dim in as_ints(where)} if where is not None else set(range(len(sizes)))
    chosen = chosen or set(range(len(sizes)))
    keep = len(out) == len(sizes)
    return tuple(() if at in chosen else dim for at, dim in enumerate(dims) if keep or at not in chosen)


def _embedding(walk: Walk, node: fx.Node) -> Axes:
    _, indices = tensors(node)[:2]
    return (*walk.dims(indices), walk.algebra.fresh((shape(node) or (1,))[-1], FEATURE))


def _conv(walk: Walk, node: fx.Node) -> Axes:
    """Keeps spatial axes of unchanged size; a stride that divides one leaves its outer factor (the patch grid)."""
    dims, sizes = _first(walk, node)
    out = shape(node) or ()
    lead = len(out) - (len(shape(tensors(node)[1]) or ()) - 2) - 1
    result = [*dims[:lead], walk.algebra.fresh(out[lead], FEATURE)]
    for dim, old, new in zip(dims[lead + 1 :], sizes[lead + 1 :], out[lead + 1 :], strict=True):
        if old == new:
            result.append(dim)
        elif len(dim) == 1 and new and old % new == 0 and new > 1:
            result.append((walk.algebra.split(dim[0], new)[0],))
        else:
            result.append(walk.algebra.chosen(dim, new))
    return tuple(result)


def _layer_norm_native(walk: Walk, node: fx.Node) -> Axes:
    dims, _ = _first(walk, node)
    return [dims, *(walk.constant(tuple(as_int(s, 1) for s in item.shape)) for item in value(node)[1:])]


def _created(walk: Walk, node: fx.Node) -> Axes:
    """Made from sizes alone."""
    val = value(node)
    if isinstance(val, list | tuple):
        return [walk.constant(tuple(as_int(s, 1) for s in item.shape)) for item in val]
    return walk.constant(shape(node) or ())


def _outer(walk: Walk, node: fx.Node) -> Axes:
    left, right = tensors(node)[:2]
    return (*walk.dims(left), *walk.dims(right))


def _unfolded_complex(walk: Walk, node: fx.Node) -> Axes:
    dims, _ = _first(walk, node)
    grown = packet(node) is aten.view_as_real
    return (*dims, walk.algebra.fresh(2, CONSTANT)) if grown else dims[:-1]


def _pixel_unshuffle(walk: Walk, node: fx.Node) -> Axes:
    """``(C, H·r, W·r) -> (C·r·r, H, W)``."""
    dims, sizes = _first(walk, node)
    factor = as_int(argument(node, 1, "downscale_factor"), 1)
    *lead, channels, height, width = dims
    (h, p), (w, q) = (
        walk.algebra.reshape((dim,), (size // factor, factor))
        for dim, size in zip((height, width), sizes[-2:], strict=True)
    )
    return (*lead, (*channels, *p, *q), h, w)


def _pixel_shuffle(walk: Walk, node: fx.Node) -> Axes:
    """``(C·r·r, H, W) -> (C, H·r, W·r)``."""
    dims, sizes = _first(walk, node)
    factor = as_int(argument(node, 1, "upscale_factor"), 1)
    *lead, channels, height, width = dims
    c, p, q = walk.algebra.reshape((channels,), (sizes[-3] // factor**2, factor, factor))
    return (*lead, c, walk.algebra.merged((*height, *p)), walk.algebra.merged((*width, *q)))


def _glu(walk: Walk, node: fx.Node) -> Axes:
    dims, sizes = _first(walk, node)
    at = _index(argument(node, 1, "dim", -1), len(sizes))
    return (*dims[:at], walk.algebra.cut(dims[at], 0, sizes[at] // 2), *dims[at + 1 :])


def _table(*groups: tuple[Rule, str]) -> dict[Any, Rule]:
    """Operators by name; a name that this torch does not have is left out."""
    table: dict[Any, Rule] = {}
    for rule, names in groups:
        for name in names.split():
            if hasattr(aten, name):
                table[getattr(aten, name)] = rule
    return table


RULES: dict[Any, Rule] = _table(
    (_reshape, "view reshape _unsafe_view flatten unflatten view_as reshape_as"),
    (_permute, "permute"),
    (_transpose, "transpose t swapaxes"),
    (_unsqueeze, "unsqueeze"),
    (_squeeze, "squeeze"),
    (_expand, "expand expand_as broadcast_to"),
    (_repeat, "repeat tile"),
    (_repeat_interleave, "repeat_interleave"),
    (_slice, "slice"),
    (_narrow, "narrow"),
    (_select, "select"),
    (_pieces, "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk"),
    (_unbind, "unbind"),
    (_cat, "cat concat concatenate"),
    (_stack, "stack"),
    (_slice_scatter, "slice_scatter"),
    (_select_scatter, "select_scatter"),
    (_first_operand, "type_as index_put roll flip scatter scatter_add index_add masked_scatter"),
    (_first_operand, "group_norm batch_norm instance_norm rms_norm layer_norm"),
    (_pixel_unshuffle, "pixel_unshuffle"),
    (_pixel_shuffle, "pixel_shuffle"),
    (_resized, "pad constant_pad_nd reflection_pad2d replication_pad2d upsample_nearest2d upsample_bilinear2d"),
    (_resized, "upsample_bicubic2d upsample_linear1d upsample_trilinear3d"),
    (_resized, "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d"),
    (_resized, "adaptive_avg_pool2d adaptive_avg_pool1d upsample_nearest1d upsample_nearest3d"),
    (_indexed, "index"),
    (_gathered, "gather index_select take_along_dim"),
    (_linear, "linear"),
    (_matmul, "matmul mm bmm mv"),
    (_addmm, "addmm baddbmm addbmm"),
    (_einsum, "einsum"),
    (_attention, "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu"),
    (_attention, "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"),
    (_attention, "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math"),
    (
        _reduce,
        "mean sum amax amin max min var std var_mean argmax argmin any all linalg_vector_norm norm prod logsumexp",
    ),
    (_embedding, "embedding"),
    (_conv, "conv1d conv2d conv3d convolution"),
    (_layer_norm_native, "native_layer_norm native_group_norm"),
    (_created, "new_ones new_zeros new_empty new_full zeros ones full empty eye rand randn"),
    (_created, "arange linspace meshgrid scalar_tensor tril_indices triu_indices"),
    (_outer, "outer ger"),
    (_unfolded_complex, "view_as_real view_as_complex"),
    (_glu, "glu"),
)
RULES[operator.getitem] = _getitem


def propagate(graph: fx.Graph) -> Walk:
    """Walks a graph in normal form and says of every dimension of every value what it enumerates."""
    walk = Walk(RULES)
    walk.run(graph)
    return walk
