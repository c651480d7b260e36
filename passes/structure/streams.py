"""What crosses the borders of blocks: streams, read-only inputs, long skips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .facts import Block, LongSkip, Stream
from .findings import Findings
from .flow import CUTS, VIEWS
from .ops import argument, aten, packet, shape, tensors

Key = tuple[tuple[str, ...], int, int]
"""Tells streams apart: token axes, width, and a number among those that are alike in both."""


@dataclass
class Crossing:
    """One block's borders: values of the token path that enter and leave."""

    nodes: list[fx.Node]
    entries: list[fx.Node]
    exits: list[fx.Node]


@dataclass(frozen=True)
class Borders:
    """The outcome for a whole stack."""

    streams: tuple[Stream, ...]
    blocks: tuple[Block, ...]
    shared: tuple[str, ...]
    long_skips: tuple[LongSkip, ...]


def borders(found: Findings, blocks: Sequence[Sequence[fx.Node]]) -> Borders:
    """Streams and shared inputs of blocks given as node sets, in order."""
    crossings = [_crossing(found, list(nodes)) for nodes in blocks]
    owner = {node: i for i, crossing in enumerate(crossings) for node in crossing.nodes}
    came_from = _came_from(found, owner)
    keys: list[dict[Key, fx.Node]] = []
    skips: list[LongSkip] = []
    for i, crossing in enumerate(crossings):
        carried = [e for e in crossing.entries if i and i - 1 in came_from.get(e, ())]
        keys.append(_keyed(found, carried))
        for entry in crossing.entries:
            sources = came_from.get(entry, frozenset())
            if i and sources and i - 1 not in sources:
                skips.append(LongSkip(_name(entry), max(sources), i))
    names = _stream_keys(found, crossings, keys)
    shared = _shared(found, crossings, owner)
    if crossings:
        fresh = [e for e in crossings[0].entries if e.name not in shared or len(crossings) == 1]
        keys[0] = _like(found, _keyed(found, fresh), names, keys[1] if len(keys) > 1 else {})
    outputs = [_outputs(found, crossings, came_from, keys, names, i) for i in range(len(crossings))]
    streams = tuple(_stream(key, names) for key in names)
    result: list[Block] = []
    for i, crossing in enumerate(crossings):
        inputs = tuple(_input(i, at, key, keys, outputs) for at, key in enumerate(names))
        result.append(Block(i, tuple(n.name for n in crossing.nodes), inputs, outputs[i]))
    entering = {name for block in result for name in block.inputs if name}
    return Borders(streams, tuple(result), tuple(n for n in shared if n not in entering), tuple(skips))


def _name(node: fx.Node) -> str:
    return str(node.name)


def _input(
    i: int, at: int, key: Key, keys: list[dict[Key, fx.Node]], outputs: list[tuple[str | None, ...]]
) -> str | None:
    if key in keys[i]:
        return _name(keys[i][key])
    # a block that does not read a stream leaves it as the one before it did
    return next((name for row in reversed(outputs[:i]) if (name := row[at])), None)


# --- one block ---------------------------------------------------------------------------------------------------


def _crossing(found: Findings, nodes: list[fx.Node]) -> Crossing:
    inside = set(nodes)
    _strip_front(found, nodes, inside)
    exits = _strip_back(found, nodes, inside)
    nodes = [node for node in nodes if node in inside]
    entries: dict[fx.Node, None] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and _carries(found, operand):
                entries[operand] = None
    return Crossing(nodes, sorted(entries, key=found.position.__getitem__), exits)


def _carries(found: Findings, node: fx.Node) -> bool:
    """Whether a value is content of the token path (not a table, not conditioning)."""
    if not found.tokens.carried_by(found.walk, node) or node in found.conditioning:
        return False
    return node in found.flow.learned or (node.op == "placeholder" and bool(found.flow.inputs.get(node)))


def _strip_front(found: Findings, nodes: list[fx.Node], inside: set[fx.Node]) -> None:
    """Leaves out a block's first views and the concatenation of its streams: the stream is what comes out of them."""
    changed = True
    while changed:
        changed = False
        for node in nodes:
            if node not in inside or not _joins(found, node):
                continue
            operands = [n for n in tensors(node) if _carries(found, n)]
            if not operands or any(n in inside for n in tensors(node)):
                continue
            if all(set(n.users) & inside == {node} for n in operands):
                inside.discard(node)
                changed = True
        nodes[:] = [node for node in nodes if node in inside]


def _joins(found: Findings, node: fx.Node) -> bool:
    op = packet(node)
    if op in VIEWS:
        return _carries(found, node)
    if op is not aten.cat or not _carries(found, node):
        return False
    rank, dim = len(shape(node) or ()), argument(node, 1, "dim", 0)
    return isinstance(dim, int) and dim % max(rank, 1) != rank - 1


def _strip_back(found: Findings, nodes: list[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    """The values that leave, with the cuts and views behind a stream left out of the block."""
    bases: dict[fx.Node, None] = {}
    for node in list(nodes):
        if node not in inside or not _carries(found, node) or all(user in inside for user in node.users):
            continue
        base = node
        while packet(base) in VIEWS | CUTS:
            above = [n for n in tensors(base)[:1] if n in inside and _carries(found, n)]
            if not above:
                break
            base = above[0]
        bases[base] = None
    for node in reversed(nodes):
        tail = packet(node) in VIEWS | CUTS and node not in bases and _carries(found, node)
        if tail and all(user not in inside for user in node.users):
            inside.discard(node)
    return sorted(bases, key=found.position.__getitem__)


# --- between blocks ----------------------------------------------------------------------------------------------


def _came_from(found: Findings, owner: dict[fx.Node, int]) -> dict[fx.Node, frozenset[int]]:
    """For values outside the blocks (and in them): which blocks they come from with no other block in between."""
    result: dict[fx.Node, frozenset[int]] = {}
    for node in found.nodes:
        if node in owner:
            result[node] = frozenset((owner[node],))
        elif found.on_tokens(node):
            result[node] = frozenset().union(*(result.get(n, frozenset()) for n in node.all_input_nodes))
    return result


def _keyed(found: Findings, values: Sequence[fx.Node]) -> dict[Key, fx.Node]:
    counted: Counter[tuple[tuple[str, ...], int]] = Counter()
    result: dict[Key, fx.Node] = {}
    for node in values:
        names, width = found.tokens.names_of(found.walk.dims(node)), (shape(node) or (0,))[-1]
        result[(names, width, counted[names, width])] = node
        counted[names, width] += 1
    return result


def _like(found: Findings, held: dict[Key, fx.Node], names: list[Key], later: dict[Key, fx.Node]) -> dict[Key, fx.Node]:
    """The first block's entries, with those whose axes have another origin matched to streams by their shape."""
    result = {key: node for key, node in held.items() if key in names}
    spare = [node for key, node in held.items() if key not in names]
    for key in names:
        if key not in result and key in later:
            alike = [node for node in spare if shape(node) == shape(later[key])]
            if alike:
                result[key] = alike[0]
                spare.remove(alike[0])
    return result


def _stream_keys(found: Findings, crossings: list[Crossing], keys: list[dict[Key, fx.Node]]) -> list[Key]:
    """The streams: what most blocks take over from the one before; for a single block, what it returns."""
    if len(crossings) > 1:
        counted = Counter(key for held in keys[1:] for key in held)
        chosen = [key for key, times in counted.items() if times * 2 >= len(crossings) - 1]
    else:
        chosen = list(_keyed(found, crossings[0].exits)) if crossings else []
    main = found.tokens.main.name if found.tokens.main else ""
    return sorted(chosen, key=lambda key: (main not in key[0], key[0], -key[1], key[2]))


def _stream(key: Key, all_keys: list[Key]) -> Stream:
    names, width, number = key
    alike = [other for other in all_keys if other[:2] == key[:2]]
    name = "+".join(names) or "hidden"
    return Stream(f"{name}#{number}" if len(alike) > 1 else name, names, width)


def _outputs(
    found: Findings,
    crossings: list[Crossing],
    came_from: dict[fx.Node, frozenset[int]],
    keys: list[dict[Key, fx.Node]],
    names: list[Key],
    i: int,
) -> tuple[str | None, ...]:
    """The node of block ``i`` that each stream leaves by."""
    exits = crossings[i].exits
    before = crossings[i - 1].exits if i else []
    sums = any(node in found.trace.residual for node in before)
    # where the block before left its streams in residual sums, anything else that leaves this one is no stream
    own = _keyed(found, [node for node in exits if not sums or node in found.trace.residual])
    result: list[str | None] = []
    for key in names:
        base: fx.Node | None = None
        if i + 1 < len(crossings) and key in keys[i + 1]:
            base = _reached(found, keys[i + 1][key], set(exits))
        base = base or own.get(key)
        result.append(_name(base) if base is not None else None)
    return tuple(result)


def _reached(found: Findings, entry: fx.Node, exits: set[fx.Node]) -> fx.Node | None:
    """Walks back from a value between two blocks to the exits that it is made of; the one most like it."""
    seen: set[fx.Node] = set()
    pending, hits = [entry], []
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in exits:
            hits.append(node)
        elif len(seen) < 200:
            pending.extend(n for n in node.all_input_nodes if found.on_tokens(n))
    return max(hits, key=lambda n: (shape(n) == shape(entry), found.position[n]), default=None)


def _shared(found: Findings, crossings: list[Crossing], owner: dict[fx.Node, int]) -> tuple[str, ...]:
    """Nodes from outside that several blocks read: conditioning, tables, masks, context."""
    readers: dict[fx.Node, set[int]] = {}
    for i, crossing in enumerate(crossings):
        for node in crossing.nodes:
            for operand in node.all_input_nodes:
                weight = operand in found.flow.weights
                if operand not in owner and not weight and tensors(node) and operand in tensors(node):
                    readers.setdefault(operand, set()).add(i)
    least = min(2, len(crossings))
    chosen = [node for node, blocks in readers.items() if len(blocks) >= least]
    return tuple(_name(node) for node in sorted(chosen, key=found.position.__getitem__))
