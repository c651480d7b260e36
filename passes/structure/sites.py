"""Finds attentions: one op, or matrix products around a softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from .axes import FEATURE, Dim, rank_of
from .facts import MaskKind
from .flow import VIEWS, Dependence, _packets
from .ops import argument, aten, packet, shape, tensors, value
from .walk import Walk

_FUSED = _packets(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math"
)
_SOFTMAX = _packets("softmax _softmax _safe_softmax special_softmax")
_SCORES = _packets("matmul bmm baddbmm einsum")
_ON_SCORES = VIEWS | _packets("mul div add sub masked_fill where clamp tanh nan_to_num float index_put")


Written = Literal["sdpa", "explicit", "linear"]


@dataclass(frozen=True)
class Site:
    """An attention before anything is known about tokens; operands are nodes, dimensions carry axes."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    written: Written
    mask: MaskKind | None
    layout: str
    batch: int
    heads: int
    key_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    query_dim: Dim
    key_dim: Dim
    lead: tuple[Dim, ...]

    @property
    def over_tokens(self) -> bool:
        """Whether positions, not features, attend to each other."""
        return rank_of(self.query_dim) != FEATURE or rank_of(self.key_dim) != FEATURE


def find_sites(graph: fx.Graph, walk: Walk, flow: Dependence) -> list[Site]:
    """Every attention of a graph, in program order."""
    found: list[Site] = []
    for node in graph.nodes:
        op = packet(node)
        site: Site | None = None
        if op in _FUSED or _is_attention_op(node):
            site = _fused(node, walk)
        elif op in _SOFTMAX:
            site = _explicit(node, walk, flow)
        if site is not None:
            found.append(site)
    return found


def _is_attention_op(node: fx.Node) -> bool:
    """A custom operator that says in its own name that it is an attention, over three tensors of one rank."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims"):
        return False
    operands = [shape(n) for n in tensors(node)[:3]]
    ranks = {len(sizes) for sizes in operands if sizes is not None}
    return "attention" in target._schema.name and len(operands) == 3 and None not in operands and ranks == {4}


def _mask_kind(mask: Any, causal: Any) -> MaskKind | None:
    if isinstance(mask, fx.Node):
        tensor = value(mask)
        return "bool" if isinstance(tensor, torch.Tensor) and tensor.dtype is torch.bool else "additive"
    return "causal" if causal is True else None


def _fused(node: fx.Node, walk: Walk) -> Site | None:
    operands = tensors(node)[:3]
    if len(operands) < 3:
        return None
    query, key, val = operands
    mask = _mask_kind(argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False))
    return _make(node, query, key, val, walk, "sdpa", mask, q_axis=-2, k_axis=-2)


def _make(
    node: fx.Node,
    query: fx.Node,
    key: fx.Node,
    val: fx.Node,
    walk: Walk,
    written: Written,
    mask: MaskKind | None,
    *,
    q_axis: int,
    k_axis: int,
    features: int = -1,
) -> Site | None:
    """Reads sizes and axes off the operands; ``q_axis``, ``k_axis`` and ``features`` are dimensions of them."""
    q_sizes, k_sizes = shape(query), shape(key)
    q_dims, k_dims = walk.dims(query), walk.dims(key)
    if q_sizes is None or k_sizes is None or len(q_sizes) < 2 or len(k_sizes) < 2 or len(q_dims) != len(q_sizes):
        return None
    rank = len(q_sizes)
    at, feature_at = q_axis % rank, features % rank
    lead = [i for i in range(rank) if i not in (at, feature_at)]
    heads_at = _heads(lead, q_dims, written)
    letters = ["B"] * rank
    letters[at], letters[feature_at] = "L", "D"
    for i in heads_at:
        letters[i] = "H"
    merged = [i for i in lead if i not in heads_at and _heads_inside(q_dims[i]) > 1]
    layout = "".join("(BH)" if i in merged else letter for i, letter in enumerate(letters))
    heads, key_heads, batch = 1, 1, 1
    for i in lead:
        inside = q_sizes[i] if i in heads_at else _heads_inside(q_dims[i])
        heads, batch = heads * inside, batch * (q_sizes[i] // max(inside, 1))
        if len(k_sizes) == rank:
            key_heads *= _heads_before_repeats(k_dims[i], k_sizes[i]) if i in heads_at else _heads_inside(k_dims[i])
    k_at = k_axis % len(k_sizes)
    return Site(
        node=node,
        query=query,
        key=key,
        value=val,
        written=written,
        mask=mask,
        layout=layout,
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        q_len=q_sizes[at],
        kv_len=k_sizes[k_at],
        head_dim=q_sizes[feature_at],
        query_dim=q_dims[at],
        key_dim=k_dims[k_at],
        lead=tuple(q_dims[i] for i in lead if i not in heads_at),
    )


def _heads(lead: list[int], dims: tuple[Dim, ...], written: str) -> list[int]:
    """The dimensions that count heads: made of features; in four-dimensional SDPA the second, by definition."""
    if written == "sdpa" and len(lead) == 2:
        return [lead[1]]
    return [i for i in lead if dims[i] and all(atom.rank == FEATURE for atom in dims[i])]


def _heads_before_repeats(dim: Dim, size: int) -> int:
    """How many different heads a dimension holds: grouped queries repeat keys."""
    times = 1
    for atom in dim:
        if atom.relation == "repeat":
            times *= atom.size
    return size // times


def _heads_inside(dim: Dim) -> int:
    """How many heads a merged dimension holds."""
    heads = 1
    for atom in dim:
        if atom.rank == FEATURE:
            heads *= atom.size
    return heads


# --- written out -------------------------------------------------------------------------------------------------


def _explicit(softmax: fx.Node, walk: Walk, flow: Dependence) -> Site | None:
    scores, mask = _scores(softmax, flow)
    output = _output(softmax, flow)
    if scores is None or output is None:
        return None
    operands = tensors(scores)[-2:]
    if packet(scores) is aten.baddbmm and argument(scores, 3, "beta", 1) != 0:
        mask = mask or "additive"
    weights_on = [n for n in tensors(output)[-2:] if n in flow.learned]
    carried = _carried(softmax, output)
    vals = [n for n in weights_on if n not in carried]
    if not vals or len(operands) < 2:
        return None
    if packet(scores) is aten.einsum:
        return _einsum_site(output, scores, vals[0], walk, mask)
    query, key = operands
    return _make(output, query, key, vals[0], walk, "explicit", mask, q_axis=-2, k_axis=-1)


def _scores(softmax: fx.Node, flow: Dependence) -> tuple[fx.Node | None, MaskKind | None]:
    """Walks back from a softmax over scaling and masking to the product of query and key."""
    mask: MaskKind | None = None
    node = tensors(softmax)[0]
    for _ in range(24):
        op, operands = packet(node), tensors(node)
        if op in _SCORES:
            both = [n for n in operands[-2:] if flow.inputs.get(n, 0)]
            return (node, mask) if len(both) == 2 else (None, None)
        if op not in _ON_SCORES or not operands:
            return None, None
        following = [n for n in operands if n in flow.learned and shape(n) is not None]
        if not following:
            return None, None
        if op in (aten.masked_fill, aten.where):
            mask = "bool"
        elif op in (aten.add, aten.sub) and len(operands) > 1:
            mask = mask or "additive"
        node = max(following, key=lambda n: (len(shape(n) or ()), sum(shape(n) or ())))
    return None, None


def _carried(softmax: fx.Node, output: fx.Node) -> set[fx.Node]:
    """The softmax and the views of it on the way to the second product."""
    found, node = {softmax}, softmax
    while output not in node.users:
        node = next(user for user in node.users if packet(user) in VIEWS | _packets("mul where masked_fill nan_to_num"))
        found.add(node)
    return found


def _output(softmax: fx.Node, flow: Dependence) -> fx.Node | None:
    """Walks on from a softmax over casts and dropout to its product with the values."""
    node = softmax
    for _ in range(12):
        for user in node.users:
            if packet(user) in _SCORES and len([n for n in tensors(user)[-2:] if n in flow.learned]) == 2:
                return user
        onward = [u for u in node.users if packet(u) in VIEWS | _packets("mul where masked_fill nan_to_num")]
        if not onward:
            return None
        node = onward[0]
    return None


def _einsum_site(output: fx.Node, scores: fx.Node, val: fx.Node, walk: Walk, mask: MaskKind | None) -> Site | None:
    equation = str(scores.args[0]).replace(" ", "")
    inputs, _, result = equation.partition("->")
    terms, operands = inputs.split(","), tensors(scores)
    if len(terms) != 2 or not result or "." in equation:
        return None
    last = result[-1]
    query_at = 0 if last in terms[1] else 1
    q_term, k_term = terms[query_at], terms[1 - query_at]
    query, key = operands[query_at], operands[1 - query_at]
    contracted = [c for c in q_term if c in k_term and c not in result]
    rows = [c for c in q_term if c in result and c not in k_term]
    if len(contracted) != 1 or len(rows) != 1:
        return None
    return _make(
        output, query, key, val, walk, "explicit", mask,
        q_axis=q_term.index(rows[0]), k_axis=k_term.index(last), features=q_term.index(contracted[0]),
    )  # fmt: skip
