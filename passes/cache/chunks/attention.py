"""Attentions: few queries look at the keys and values of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import fx

from .rows import Known, Rows, Site, Step, TokensMixed, along, sizes_of


def _attention(node: fx.Node, known: Known) -> Step:
    named = _named(node)
    query, key, value = (named[name] for name in _operands(node))
    _refuse_order(node, named)
    rank = len(sizes_of(query))
    at = rank - 2
    rows, keys, values = known.rows(query), known.rows(key), known.rows(value)
    for found in (rows, keys, values):
        if found is not None and (found.dim != at or (found.batch or 0) >= at):
            raise TokensMixed(node, "the dimension that it runs over is not that of the tokens")
    if (keys is None) != (values is None) or (keys is not None and values is not None and keys != values):
        raise TokensMixed(node, "keys and values are not of the same tokens")
    taken: dict[fx.Node, Rows] = {}
    mask = named.get("attn_mask", named.get("mask"))
    if isinstance(mask, fx.Node):
        if known.get(mask) is not None:
            raise TokensMixed(node, "its mask is made of tokens")
        where = along(node, rank, rows, mask) if rows is not None else None
        taken = {mask: where} if where is not None else {}
    site = Site(node, key, value, keys) if keys is not None else None
    return Step(rows, taken, site=site)


def _operands(node: fx.Node) -> tuple[str, str, str]:
    return ("query", "key", "value") if "query" in _named(node) else ("q", "k", "v")


def _named(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _refuse_order(node: fx.Node, named: dict[str, Any]) -> None:
    """Refuses attentions in which it matters which position a query has."""
    if named.get("is_causal") or named.get("causal"):
        raise TokensMixed(node, "it is causal: a query's position tells what it sees")
    if named.get("blocks") is not None:
        raise TokensMixed(node, "attention_sparse chooses keys for blocks of queries")
    if named.get("window", -1) >= 0:
        raise TokensMixed(node, "attention_window counts from a query's position")


ATTENTIONS: Mapping[str, Callable[[fx.Node, Known], Step]] = MappingProxyType(
    {"aten::scaled_dot_product_attention": _attention, "ditc::attention_int8": _attention}
)
"""The rule of every attention that takes queries, keys and values as they are, by the operator's name."""
