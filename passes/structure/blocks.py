"""Stacks of repeated blocks: by structure and by name, and where the two witnesses agree."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .facts import Stack, Witness
from .findings import Findings
from .named import Anchor, NamedStack, anchors, named_stacks
from .ops import module_path, shared_prefix
from .repeats import Repeat, tandem_repeats, trimmed
from .streams import borders


@dataclass
class Segments:
    """A stack before its borders are known: per block, its anchors and its nodes."""

    name: str
    anchors: list[list[Anchor]]
    nodes: list[list[fx.Node]]
    witness: Witness


def find_stacks(found: Findings) -> tuple[list[Stack], list[str]]:
    """The stacks of a graph in program order, and notes on what the witnesses say of each other."""
    skeleton = anchors(found)
    by_name = named_stacks(found, skeleton)
    by_structure = _by_structure(found, skeleton)
    notes: list[str] = []
    chosen: list[Segments] = []
    claimed: set[fx.Node] = set()
    for named in by_name:
        chosen.append(_confirmed(named, by_structure, notes))
        claimed |= {a.node for held in named.anchors for a in held}
    for segments in by_structure:
        held = [a.node for block in segments.anchors for a in block]
        if sum(node in claimed for node in held) * 2 < len(held):
            segments.name = _unique(segments.name, chosen)
            chosen.append(segments)
            notes.append(f"{segments.name}: {len(segments.anchors)} repetitions without numbered modules.")
    chosen.sort(key=lambda s: s.anchors[0][0].position)
    if not chosen:
        notes.append("No stack: nothing on the token path repeats.")
    stacks: list[Stack] = []
    for segments in chosen:
        found_borders = borders(found, segments.nodes)
        stacks.append(
            Stack(
                segments.name,
                len(segments.anchors),
                found_borders.streams,
                found_borders.blocks,
                found_borders.shared,
                segments.witness,
                found_borders.long_skips,
            )
        )
    return stacks, notes


def _unique(name: str, taken: Sequence[Segments]) -> str:
    names = {segments.name for segments in taken}
    number = 2
    result = name
    while result in names:
        result, number = f"{name}_{number}", number + 1
    return result


# --- names confirmed by structure --------------------------------------------------------------------------------


def _confirmed(named: NamedStack, by_structure: Sequence[Segments], notes: list[str]) -> Segments:
    """A named stack with its witness: structure agrees where its repeats begin and end where the names do."""
    mine = {a.node: i for i, held in enumerate(named.anchors) for a in held}
    overlapping = [s for s in by_structure if any(a.node in mine for block in s.anchors for a in block)]
    depth = len(named.anchors)
    witness: Witness = "names"
    within = [s for s in overlapping if all(a.node in mine for block in s.anchors for a in block)]
    if depth == 1:
        notes.append(f"{named.name}: one block only, known by its name.")
    elif not overlapping:
        notes.append(f"{named.name}: {depth} blocks by name that do not repeat: {_unlike(named)}.")
    elif any(_aligned(s, mine) and len(s.anchors) == depth for s in within):
        witness = "names and structure"
    elif within and all(_aligned(s, mine) for s in within):
        witness = "names and structure"
        seen = sum(len(s.anchors) for s in within)
        notes.append(f"{named.name}: {depth} blocks by name, of which {seen} repeat alike: {_unlike(named)}.")
    elif all(_tiled(s, mine) for s in overlapping):
        witness = "names and structure"
        others = sum(1 for s in overlapping for a in s.anchors[0] if a.node not in mine)
        what = "alternate with another stack's" if others else "repeat in groups"
        notes.append(f"{named.name}: its blocks {what}; structure sees {_depths(overlapping)} repetitions.")
    else:
        notes.append(f"{named.name}: {depth} blocks by name; structure sees {_depths(overlapping)} with other borders.")
    return Segments(named.name, named.anchors, named.nodes, witness)


def _depths(many: Sequence[Segments]) -> str:
    return " + ".join(str(len(s.anchors)) for s in many)


def _aligned(segments: Segments, mine: dict[fx.Node, int]) -> bool:
    """Whether each repetition lies in one named block, and no two in the same."""
    blocks = [{mine.get(a.node) for a in held} for held in segments.anchors]
    return all(len(block) == 1 for block in blocks) and len({next(iter(b)) for b in blocks}) == len(blocks)


def _tiled(segments: Segments, mine: dict[fx.Node, int]) -> bool:
    """Whether each repetition consists of whole named blocks."""
    where = [{mine[a.node] for a in held if a.node in mine} for held in segments.anchors]
    flat = [index for block in where for index in block]
    return len(flat) == len(set(flat)) and all(where)


def _unlike(named: NamedStack) -> str:
    """Which blocks differ from the most common one."""
    shapes = [tuple(anchor.symbol for anchor in held) for held in named.anchors]
    common = max(set(shapes), key=lambda s: (shapes.count(s), len(s)))
    odd = [str(i) for i, s in enumerate(shapes) if s != common]
    if not odd:
        return "no difference in their linears"
    return f"{'block' if len(odd) == 1 else 'blocks'} {', '.join(odd)} differ{'s' if len(odd) == 1 else ''}"


# --- structure alone ---------------------------------------------------------------------------------------------


def _by_structure(found: Findings, skeleton: list[Anchor]) -> list[Segments]:
    symbols = [anchor.symbol for anchor in skeleton]

    def accept(start: int, stop: int) -> bool:
        period = skeleton[start:stop]
        return any(a.attention for a in period) or _feeds_residual(found, period)

    result: list[Segments] = []
    live = _Liveness(found)
    for repeat in tandem_repeats(symbols, accept, lambda repeat: _placed(repeat, skeleton, live)):
        ranges = [
            (repeat.start + i * repeat.period, repeat.start + (i + 1) * repeat.period) for i in range(repeat.count)
        ]
        pattern = symbols[ranges[0][0] : ranges[0][1]]
        extra = trimmed(symbols, pattern, repeat.stop)
        if extra and any(a.attention for a in skeleton[repeat.stop : repeat.stop + extra]):
            ranges.append((repeat.stop, repeat.stop + extra))
        cuts = [live.cut(skeleton, low) for low, _ in ranges] + [live.cut(skeleton, ranges[-1][1])]
        held = [skeleton[low:high] for low, high in ranges]
        nodes = [_between(found, low, high) for low, high in itertools.pairwise(cuts)]
        result.append(Segments(_derived_name(held), held, nodes, "structure"))
    return result


def _feeds_residual(found: Findings, period: Sequence[Anchor]) -> bool:
    """Whether at least two layers without attention end in a residual sum: a block of a mixer."""
    if len(period) < 2:
        return False
    last, steps = {period[-1].node}, 0
    while last and steps < 12:
        if last & found.trace.residual:
            return True
        last, steps = {user for node in last for user in node.users if user not in found.products}, steps + 1
    return False


def _placed(repeat: Repeat, skeleton: list[Anchor], live: _Liveness) -> Repeat:
    """Of the possible beginnings, the one whose borders fewest values cross."""
    options: list[tuple[int, int]] = []
    for start in range(repeat.start, repeat.start + repeat.slack + 1):
        inner = [start + i * repeat.period for i in range(1, repeat.count)]
        options.append((sum(live.crossing(skeleton, at)[0] for at in inner), start))
    return Repeat(min(options)[1], repeat.period, repeat.count, 0)


class _Liveness:
    """How many values of the token path are alive between two nodes."""

    def __init__(self, found: Findings) -> None:
        self.found = found
        last: dict[fx.Node, int] = {}
        for position, node in enumerate(found.nodes):
            for operand in node.all_input_nodes:
                last[operand] = position
        change = [0] * (len(found.nodes) + 2)
        for position, node in enumerate(found.nodes):
            if found.on_tokens(node) and found.tokens.carried_by(found.walk, node) and node in last:
                change[position + 1] += 1
                change[last[node] + 1] -= 1
        self.alive = [0]
        for delta in change:
            self.alive.append(self.alive[-1] + delta)

    def crossing(self, skeleton: list[Anchor], at: int) -> tuple[int, int]:
        """The least number of live values in front of anchor ``at``, and where: in front of which node."""
        low = skeleton[at - 1].position + 1 if at > 0 else 0
        high = skeleton[at].position if at < len(skeleton) else len(self.found.nodes) - 1
        return min((self.alive[position + 1], position) for position in range(low, max(high, low) + 1))

    def cut(self, skeleton: list[Anchor], at: int) -> int:
        return self.crossing(skeleton, at)[1]


def _between(found: Findings, low: int, high: int) -> list[fx.Node]:
    return [node for node in found.nodes[low:high] if node.op == "call_function"]


def _derived_name(blocks: Sequence[Sequence[Anchor]]) -> str:
    """What the paths of a block's modules have in common, numbers at its end left out."""
    common = [shared_prefix([module_path(a.node).split(".") for a in held]) for held in blocks]
    paths = [".".join(parts) for parts in common]
    name = paths[0] if len(set(paths)) == 1 else "".join(shared_prefix(paths))
    name = re.sub(r"[._]*\d*[._]*$", "", name)
    return name or "blocks"
