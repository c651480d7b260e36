"""Which operators treat the samples of a batch one by one: a proof, operator by operator.

Every value is one of three things: the same for all samples (``None``); made of their rows, in their order
(:class:`Rows`); or unknown, with the operator to blame (:class:`Mixed`). An operator without a rule mixes, so that a
new one can cost speed and never truth.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..rewrite import aten


@dataclass(frozen=True)
class Rows:
    """Dimension ``dim`` is the samples one after the other, ``inner`` elements of it for each."""

    dim: int
    inner: int = 1


@dataclass(frozen=True)
class Mixed:
    """A value in which samples cannot be told apart behind the operator ``node``."""

    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.node} {self.why}"


Layout = Rows | Mixed | None
Rule = Callable[["Walk", fx.Node], Layout]


class _Mixes(Exception):  # noqa: N818 - control flow of this file alone
    """A rule does not hold; the text says why."""


@dataclass
class Walk:
    """Carries layouts through a graph.

    Attributes:
        samples: how many there are.
        layouts: of the nodes seen so far.
    """

    samples: int
    layouts: dict[fx.Node, Layout]

    def run(self, nodes: Iterable[fx.Node]) -> None:
        """Finds the layouts of ``nodes``, in program order; those of what they read must be known."""
        for node in nodes:
            if node not in self.layouts and node.op in ("call_function", "get_attr"):
                self.layouts[node] = self._layout(node)

    def _layout(self, node: fx.Node) -> Layout:
        blamed = next((found for n in node.all_input_nodes if isinstance(found := self.layouts.get(n), Mixed)), None)
        if blamed is not None:
            return blamed
        read = any(self.layouts.get(n) is not None for n in node.all_input_nodes)
        if node.op == "get_attr" or (not read and packet(node) not in _MAKERS):
            return None
        rule = RULES.get(packet(node)) or (_pointwise if _is_pointwise(node) else None)
        if rule is None:
            return Mixed(node.name, f"is {packet(node)}, of which nothing is known")
        try:
            return rule(self, node)
        except _Mixes as reason:
            return Mixed(node.name, str(reason))

    def rows(self, node: Any) -> Rows | None:
        """The layout of an operand that is not mixed; ``None`` for what is no tensor of rows."""
        found = self.layouts.get(node) if isinstance(node, fx.Node) else None
        assert not isinstance(found, Mixed)
        return found

    def first(self, node: fx.Node) -> tuple[Rows, tuple[int, ...]]:
        """The layout and sizes of the first operand, which is to be one of rows; the others are to be none."""
        found = self.rows(node.args[0])
        if found is None or any(self.rows(n) is not None for n in node.all_input_nodes if n is not node.args[0]):
            raise _Mixes("takes samples where it is to take none")
        return found, sizes(node.args[0])

    def aligned(self, nodes: Iterable[fx.Node], rank: int) -> Rows:
        """The layout of a result of ``rank`` dimensions over which ``nodes`` broadcast."""
        nodes = list(nodes)
        found = {(rows.dim - len(sizes(n)), rows.inner) for n in nodes if (rows := self.rows(n)) is not None}
        if len(found) != 1:
            raise _Mixes("takes samples along several dimensions")
        ((at, inner),) = found
        for node in nodes:
            shape = sizes(node)
            if self.rows(node) is None and len(shape) >= -at and shape[at] != 1:
                raise _Mixes(f"takes {node.name}, whose rows belong to no sample")
        return Rows(rank + at, inner)


def packet(node: fx.Node) -> Any:
    """The operator without its overload."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def sizes(node: Any) -> tuple[int, ...]:
    """The sizes of a node's tensor, or of the first of its tensors."""
    value = node.meta["val"]
    return tuple((value if isinstance(value, torch.Tensor) else value[0]).shape)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument wherever it is written."""
    for i, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            found = node.kwargs.get(name, node.args[i] if i < len(node.args) else default)
            return default if found is None else found
    return default


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor | list | tuple)]


def _dims(given: Any, rank: int) -> set[int]:
    listed = [given] if isinstance(given, int) else list(given)
    return {dim % rank for dim in listed} if rank else set()


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


# --- one rule for each kind of operator ---


def _pointwise(walk: Walk, node: fx.Node) -> Layout:
    return walk.aligned(_tensors(node), len(sizes(node)))


def _same(walk: Walk, node: fx.Node) -> Layout:
    return walk.first(node)[0]


def _like(walk: Walk, node: fx.Node) -> Layout:
    return walk.rows(node.args[0])


def _reshape(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    new = sizes(node)
    lead = math.prod(old[: rows.dim])
    at = next((i for i in range(len(new) + 1) if math.prod(new[:i]) == lead), None)
    while at is not None and at < len(new) and new[at] == 1:
        at += 1
    if at is None or at >= len(new) or new[at] % walk.samples:
        raise _Mixes("joins samples with what stands in front of them")
    if (rows.inner * math.prod(old[rows.dim + 1 :])) % (new[at] // walk.samples):
        raise _Mixes("cuts through samples")
    return Rows(at, new[at] // walk.samples)


def _permute(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    order = [dim % len(old) for dim in argument(node, "dims")]
    return Rows(order.index(rows.dim), rows.inner)


def _transpose(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    a, b = (argument(node, "dim0", 0) % len(old), argument(node, "dim1", 1) % len(old)) if len(old) > 1 else (0, 0)
    return Rows({a: b, b: a}.get(rows.dim, rows.dim), rows.inner)


def _unsqueeze(walk: Walk, node: fx.Node) -> Layout:
    rows, _ = walk.first(node)
    return Rows(rows.dim + (argument(node, "dim") % len(sizes(node)) <= rows.dim), rows.inner)


def _squeeze(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    gone = [dim for dim in _dims(argument(node, "dim", range(len(old))), len(old)) if old[dim] == 1]
    return Rows(rows.dim - sum(dim < rows.dim for dim in gone), rows.inner)


def _expand(walk: Walk, node: fx.Node) -> Layout:
    rows, new = walk.rows(node.args[0]), sizes(node)
    old = sizes(node.args[0])
    if rows is not None:
        return Rows(rows.dim + len(new) - len(old), rows.inner)
    fresh = len(new) > len(old) or (bool(old) and old[0] == 1)
    return Rows(0) if fresh and len(new) > 1 and new[0] == walk.samples else None


def _repeat(walk: Walk, node: fx.Node) -> Layout:
    rows, new = walk.rows(node.args[0]), sizes(node)
    old, times = sizes(node.args[0]), argument(node, "repeats")
    if rows is None:
        ours = len(new) > 1 and times[0] == walk.samples
        return Rows(0, new[0] // walk.samples) if ours else None
    at = rows.dim + len(new) - len(old)
    if times[at] != 1:
        raise _Mixes("repeats samples")
    return Rows(at, rows.inner)


def _repeat_interleave(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    dim = argument(node, "dim")
    if dim is None or not isinstance(argument(node, "repeats"), int):
        raise _Mixes("repeats by no fixed number")
    return Rows(rows.dim, rows.inner * argument(node, "repeats")) if dim % len(old) == rows.dim else rows


def _make(walk: Walk, node: fx.Node) -> Layout:
    new = sizes(node)
    return Rows(0) if len(new) > 1 and new[0] == walk.samples else None


def _along(name: str = "dim", default: Any = None, keeps: bool = True) -> Rule:
    """Works along some dimensions; those of the samples must be none of them. Without ``keeps`` they go."""

    def rule(walk: Walk, node: fx.Node) -> Layout:
        rows, old = walk.first(node)
        given = argument(node, name, default)
        dims = _dims(given, len(old)) if given is not None and given != [] else set(range(len(old)))
        if rows.dim in dims:
            raise _Mixes("works along the samples")
        stay = keeps or argument(node, "keepdim", False)
        return rows if stay else Rows(rows.dim - sum(dim < rows.dim for dim in dims), rows.inner)

    return rule


def _slice(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    if argument(node, "dim", 0) % len(old) == rows.dim and sizes(node) != old:
        raise _Mixes("takes some of the samples")
    return rows


def _cat(walk: Walk, node: fx.Node) -> Layout:
    parts = list(node.args[0])  # type: ignore[arg-type]
    found = {walk.rows(part) for part in parts}
    new, old = sizes(node), sizes(parts[0])
    dim = argument(node, "dim", 0) % len(new)
    if len(found) != 1:
        raise _Mixes("joins samples with what belongs to none")
    (rows,) = found
    assert rows is not None
    if len(new) > len(old):  # stack
        return Rows(rows.dim + (dim <= rows.dim), rows.inner)
    if dim == rows.dim:
        raise _Mixes("joins along the samples")
    return rows


def _scatter(walk: Walk, node: fx.Node) -> Layout:
    rows = {walk.rows(n) for n in node.args[:2]}
    if len(rows) != 1 or len(sizes(node.args[0])) != len(sizes(node.args[1])):
        raise _Mixes("writes samples into what belongs to none")
    (found,) = rows
    if found is None or argument(node, "dim", 0) % len(sizes(node)) == found.dim:
        raise _Mixes("writes along the samples")
    return found


def _norm(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    if rows.dim >= len(old) - len(argument(node, "normalized_shape")):
        raise _Mixes("norms over the samples")
    return rows


def _linear(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    if rows.dim == len(old) - 1:
        raise _Mixes("multiplies along the samples")
    return rows


def _outermost(walk: Walk, node: fx.Node) -> Layout:
    rows, _ = walk.first(node)
    if rows.dim != 0:
        raise _Mixes("takes samples as channels or places")
    return rows


def _matrices(walk: Walk, node: fx.Node) -> Layout:
    """Products and attention over leading dimensions."""
    nodes = _tensors(node)
    if walk.rows(nodes[0]) is not None and len(sizes(nodes[1])) <= 2 and len(nodes) == 2:
        return _linear(walk, node)
    rows = walk.aligned(nodes, len(sizes(node)))
    if rows.dim >= len(sizes(node)) - 2:
        raise _Mixes("multiplies along the samples")
    return rows


def _embedding(walk: Walk, node: fx.Node) -> Layout:
    if walk.rows(node.args[0]) is not None:
        raise _Mixes("looks up in the samples")
    return walk.rows(node.args[1])


def _pad(walk: Walk, node: fx.Node) -> Layout:
    rows, old = walk.first(node)
    before = 2 * (len(old) - 1 - rows.dim)
    if any(argument(node, "pad")[before : before + 2]):
        raise _Mixes("pads the samples")
    return rows


def _einsum(walk: Walk, node: fx.Node) -> Layout:
    equation, parts = node.args[0].replace(" ", ""), list(node.args[1])  # type: ignore[union-attr, arg-type]
    if "." in equation or "->" not in equation:
        raise _Mixes("is written with dots")
    letters, result = equation.split("->")
    found = set()
    for letter, part in zip(letters.split(","), parts, strict=True):
        if (rows := walk.rows(part)) is not None:
            found.add((letter[rows.dim], rows.inner))
    if len(found) != 1:
        raise _Mixes("takes samples along several dimensions")
    ((sample, inner),) = found
    shared = [part for letter, part in zip(letters.split(","), parts, strict=True) if sample in letter]
    if sample not in result or any(walk.rows(part) is None for part in shared):
        raise _Mixes("multiplies along the samples")
    return Rows(result.index(sample), inner)


def _quantized(walk: Walk, node: fx.Node) -> Layout:
    """ditc's operators: ranges belong to rows along the last dimension, weights to no sample."""
    given = [(p.name, n) for p in node.target._schema.arguments for n in _listed(argument(node, p.name))]  # type: ignore[union-attr]
    taken = [n for name, n in given if not name.startswith(("weight", "norm_", "static"))]
    if any(walk.rows(n) is not None for _, n in given if n not in taken):
        raise _Mixes("takes samples as weights")
    rank = len(sizes(node))
    rows = walk.aligned([n for n in taken if n.meta["val"] is not None], rank)
    if rows.dim >= rank - (2 if "attention" in str(node.target) else 1):
        raise _Mixes("quantises along the samples")
    return rows


def _listed(value: Any) -> list[fx.Node]:
    listed = value if isinstance(value, list | tuple) else [value]
    return [n for n in listed if isinstance(n, fx.Node)]


def _table(rules: Mapping[str, Rule]) -> dict[Any, Rule]:
    return {getattr(aten, name): rule for names, rule in rules.items() for name in names.split() if hasattr(aten, name)}


_MAKERS = frozenset(_table({"zeros ones full empty expand repeat new_zeros new_ones new_full new_empty": _make}))
"""Make rows of nothing, or of what is the same for all samples."""

RULES: Mapping[Any, Rule] = {
    operator.getitem: _like,
    torch.ops.ditc.border: _like,
    **_table(
        {
            "_to_copy clone detach alias contiguous dropout view_as_complex view_as_real to copy": _pointwise,
            "__and__ __or__ isfinite isnan rsub where masked_fill polar clip": _pointwise,
            "zeros_like ones_like empty_like full_like rand_like type_as": _like,
            "reshape view _unsafe_view flatten unflatten _reshape_alias": _reshape,
            "permute": _permute,
            "transpose swapaxes": _transpose,
            "unsqueeze": _unsqueeze,
            "squeeze": _squeeze,
            "expand": _expand,
            "repeat": _repeat,
            "repeat_interleave": _repeat_interleave,
            "zeros ones full empty new_zeros new_ones new_full new_empty": _make,
            "mean sum amax amin any all var std prod linalg_vector_norm": _along(keeps=False),
            "softmax _softmax log_softmax _log_softmax cumsum glu": _along(),
            "split split_with_sizes chunk tensor_split narrow index_select": _along(default=0),
            "select unbind": _along(default=0, keeps=False),
            "flip roll": _along("dims"),
            "slice": _slice,
            "cat concat stack": _cat,
            "slice_scatter": _scatter,
            "layer_norm rms_norm": _norm,
            "linear": _linear,
            "matmul bmm scaled_dot_product_attention": _matrices,
            "conv1d conv2d conv3d group_norm": _outermost,
            "embedding": _embedding,
            "pad constant_pad_nd": _pad,
            "einsum": _einsum,
        }
    ),
    **{
        getattr(torch.ops.ditc, name): _quantized
        for name in (
            "quantize", "norm_quantize", "activation_quantize", "dequantize", "quantized_linear", "weight_linear",
            "vnni_linear", "vnni_norm_linear", "vnni_linear_quantize", "vnni_weight_linear", "attention_int8",
            "attention_quantized",
        )
        if hasattr(torch.ops.ditc, name)
    },
}  # fmt: skip
"""What each operator does with rows; those that PyTorch calls pointwise need no entry."""
