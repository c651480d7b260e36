"""Blocks by name: groups of modules ``prefix.<i>`` that hold the token path's anchors.

Anchors are the operations that make up a block's skeleton: linears, convolutions and attentions on the token path.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import fx

from .findings import Findings
from .flow import CONVOLUTIONS
from .ops import module_stack, packet, shape

Symbol = Hashable


@dataclass(frozen=True)
class Anchor:
    """An operation on the token path with what makes it comparable: kind, sizes of its weight, token axes."""

    node: fx.Node
    position: int
    symbol: Symbol
    attention: bool


def anchors(found: Findings) -> list[Anchor]:
    """The token path's linears, convolutions and attentions in program order."""
    result: list[Anchor] = []
    for position, node in enumerate(found.nodes):
        site, product = found.sites.get(node), found.products.get(node)
        symbol: Symbol | None = None
        if site is not None:
            symbol = ("attention", site.heads, site.head_dim, found.tokens.names_of((site.key_dim,)))
        elif product is not None and found.on_tokens(node):
            names = found.tokens.names_of(found.walk.dims(product.source))
            symbol = ("linear", product.N, product.K, names)
        elif packet(node) in CONVOLUTIONS and found.on_tokens(node):
            symbol = ("conv", (shape(node) or ())[1:2])
        if symbol is not None:
            result.append(Anchor(node, position, symbol, site is not None))
    return result


@dataclass
class NamedStack:
    """Modules ``name.<i>`` in the order in which they are called; a module called twice counts twice."""

    name: str
    calls: list[tuple[int, str]]
    anchors: list[list[Anchor]]
    nodes: list[list[fx.Node]]

    @property
    def called(self) -> bool:
        """Whether the blocks are modules that are called, not lists of modules whose parts are."""
        return all(key for _, key in self.calls)


def _memberships(node: fx.Node) -> list[tuple[str, int, str]]:
    """Every ``prefix.<i>`` around a node, outermost first, with the key of the call."""
    found: list[tuple[str, int, str]] = []
    seen: set[str] = set()
    for path, key in module_stack(node):
        parts = path.split(".")
        for at, part in enumerate(parts):
            prefix = ".".join(parts[:at])
            if part.isdigit() and prefix and (member := f"{prefix}.{part}") not in seen:
                seen.add(member)
                found.append((prefix, int(part), key if at == len(parts) - 1 else ""))
    return found


def named_stacks(found: Findings, skeleton: Sequence[Anchor]) -> list[NamedStack]:
    """The outermost groups of numbered modules that are blocks, in program order."""
    by_group: dict[str, list[tuple[int, str, Anchor]]] = {}
    nested: dict[str, set[str]] = {}
    for anchor in skeleton:
        members = _memberships(anchor.node)
        for level, (prefix, index, key) in enumerate(members):
            by_group.setdefault(prefix, []).append((index, key, anchor))
            nested.setdefault(prefix, set()).update(inner for inner, _, _ in members[level + 1 :])
    chosen: list[str] = []
    for prefix in sorted(by_group, key=lambda p: p.count(".")):
        inside = any(prefix.startswith(f"{outer}.") for outer in chosen)
        if not inside and _are_blocks(by_group[prefix]) and not _are_stages(prefix, by_group, nested):
            chosen.append(prefix)
    stacks = [_collect(prefix, by_group[prefix], found) for prefix in chosen]
    return sorted(stacks, key=lambda stack: stack.anchors[0][0].position)


def _per_index(members: list[tuple[int, str, Anchor]]) -> dict[int, list[Anchor]]:
    result: dict[int, list[Anchor]] = {}
    for index, _, anchor in members:
        result.setdefault(index, []).append(anchor)
    return result


def _are_blocks(members: list[tuple[int, str, Anchor]]) -> bool:
    """A block holds an attention, or two layers at least; one layer of several in a list is no block."""
    per_index = _per_index(members)
    whole = [any(a.attention for a in held) or len(held) >= 2 for held in per_index.values()]
    return sum(whole) * 2 > len(whole)


def _are_stages(prefix: str, groups: dict[str, list[tuple[int, str, Anchor]]], nested: dict[str, set[str]]) -> bool:
    """Numbered modules that are unlike each other and hold blocks of their own are stages, not blocks."""
    per_index = _per_index(groups[prefix])
    shapes = {tuple(anchor.symbol for anchor in held) for held in per_index.values()}
    if len(shapes) <= 1 or len(shapes) * 2 <= len(per_index):
        return False
    inner = [group for group in nested[prefix] if group.startswith(f"{prefix}.") and _are_blocks(groups[group])]
    deep = [group for group in inner if any(a.attention for _, _, a in groups[group])]
    return any(len(_per_index(groups[group])) > 1 for group in deep)


def _collect(prefix: str, members: list[tuple[int, str, Anchor]], found: Findings) -> NamedStack:
    runs: list[tuple[int, str, list[Anchor]]] = []
    for index, key, anchor in members:
        if not runs or runs[-1][0] != index or (key and runs[-1][1] and key != runs[-1][1]):
            runs.append((index, key, []))
        runs[-1][2].append(anchor)
    runs = _merge_partial(runs)
    calls = [(index, key) for index, key, _ in runs]
    stack = NamedStack(prefix, calls, [held for _, _, held in runs], [[] for _ in runs])
    by_index: dict[int, list[int]] = {}
    for at, (index, _, _) in enumerate(runs):
        by_index.setdefault(index, []).append(at)
    for position, node in enumerate(found.nodes):
        if node.op != "call_function":
            continue
        mine = next((index for group, index, _ in _memberships(node) if group == prefix), None)
        candidates = by_index.get(mine, []) if mine is not None else []
        call = _call_at(candidates, stack, position) if candidates else None
        # a module of a block that is called again behind it (a shared embedder) is no part of the block
        if call is not None and (call + 1 == len(runs) or position < stack.anchors[call + 1][0].position):
            stack.nodes[call].append(node)
    return stack


def _merge_partial(runs: list[tuple[int, str, list[Anchor]]]) -> list[tuple[int, str, list[Anchor]]]:
    """Runs of one index that are unlike are parts of one call (projections made ahead), not calls of their own."""
    shapes: dict[int, set[tuple[Symbol, ...]]] = {}
    for index, _, held in runs:
        shapes.setdefault(index, set()).add(tuple(anchor.symbol for anchor in held))
    merged: dict[int, tuple[int, str, list[Anchor]]] = {}
    result: list[tuple[int, str, list[Anchor]]] = []
    for index, key, held in runs:
        if len(shapes[index]) > 1 and index in merged:
            merged[index][2].extend(held)
            continue
        entry = (index, key, list(held))
        merged[index] = entry
        result.append(entry)
    return result


def _call_at(candidates: list[int], stack: NamedStack, position: int) -> int:
    """Of several calls of a module, the one whose span a position falls into."""
    for at in candidates:
        if position <= stack.anchors[at][-1].position:
            return at
    # behind the last anchor of a call: whichever call ended last before it
    ended = [at for at in candidates if stack.anchors[at][-1].position < position]
    return ended[-1]
