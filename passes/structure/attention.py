"""Turns attentions into facts: kind, which tokens, norms and RoPE in front, name and place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from .facts import AttentionKind, AttentionSite, NormKind
from .findings import Findings
from .ops import module_path, shared_prefix
from .sites import Site


def describe(found: Findings, places: Mapping[fx.Node, tuple[str, int]]) -> list[AttentionSite]:
    """Facts about every attention in program order; ``places`` gives the stack and block of a node."""
    result: list[AttentionSite] = []
    for site in sorted(found.sites.values(), key=lambda s: found.position[s.node]):
        query_tokens = found.tokens.names_of((site.query_dim,))
        key_tokens = found.tokens.names_of((site.key_dim,))
        stack, block = places.get(site.node, (None, None))
        result.append(
            AttentionSite(
                name=_name(found, site),
                node=site.node.name,
                kind=_kind(found, site, query_tokens, key_tokens),
                axis=_axis(found, site),
                query_tokens=query_tokens,
                key_tokens=key_tokens,
                layout=site.layout,
                batch=site.batch,
                heads=site.heads,
                kv_heads=site.key_heads,
                q_len=site.q_len,
                kv_len=site.kv_len,
                head_dim=site.head_dim,
                mask=site.mask,
                q_norm=_norm(found, site.query),
                k_norm=_norm(found, site.key),
                rope=_rope(found, site.query) or _rope(found, site.key),
                stack=stack,
                block=block,
                written=site.written,
                query=site.query.name,
                key=site.key.name,
                value=site.value.name,
            )
        )
    return result


def _name(found: Findings, site: Site) -> str:
    """The module's path; without modules, what the names of the weights around have in common."""
    path = module_path(site.node)
    if path:
        return path
    origins = found.trace.of(site.query) | found.trace.of(site.value)
    names = [found.products[p].name.split(".") for p in origins if p in found.products]
    return ".".join(shared_prefix(names)) or site.node.name


def _data_axes(found: Findings, names: tuple[str, ...]) -> set[str]:
    of_data = {axis.name for axis in found.tokens.axes if axis.source == "data"}
    return {name for name in names if name in of_data}


def _kind(found: Findings, site: Site, query: tuple[str, ...], key: tuple[str, ...]) -> AttentionKind:
    """Joint: over a concatenation of token axes. Cross: keys from other tokens than queries. Learned tokens (class
    tokens, registers) do not make an attention joint."""
    queries, keys = _data_axes(found, query), _data_axes(found, key)
    if len(queries | keys) > 1 and queries & keys:
        return "joint"
    if queries != keys and (queries or keys):
        return "cross"
    if not queries and query != key:
        return "cross"
    if site.q_len != site.kv_len and not set(found.trace.of(site.query)) & set(found.trace.of(site.key)):
        return "self" if queries else "cross"
    return "self"


def _axis(found: Findings, site: Site) -> str:
    """Which part of the grid attends: all of it, or the sub-axes of a factorised attention."""
    if not site.over_tokens:
        return "features"
    mine = found.tokens.sub_axes_of(site.query_dim)
    names = set(found.tokens.names_of((site.query_dim,)))
    for axis in found.tokens.axes:
        if axis.name in names and axis.sub_axes and mine:
            whole = [sub.name for sub in axis.sub_axes]
            part = [name for name in whole if name in mine]
            if len(part) < len(whole) and any(found.tokens.in_dim(dim) for dim in site.lead):
                return " × ".join(part)
    if any(found.tokens.in_dim(dim) for dim in site.lead):
        return "windows"
    return "full"


def _norm(found: Findings, operand: fx.Node) -> NormKind | None:
    return next((trace.norm for trace in found.trace.of(operand).values() if trace.norm), None)


def _rope(found: Findings, operand: fx.Node) -> bool:
    return any(trace.rope for trace in found.trace.of(operand).values())
