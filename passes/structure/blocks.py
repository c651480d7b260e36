"""Stacks of repeated blocks: by structure and by name, and where the two witnesses agree."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .facts import Stack, Witness
from .findings import Findings
from .named import Anchor, NamedStack, anchors, named_stacks
from .ops import module_path, packet, shared_prefix
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
    live = _Liveness(found, skeleton)
    by_name = named_stacks(found, skeleton)
    by_structure = _by_structure(found, skeleton, live)
    notes: list[str] = []
    chosen: list[Segments] = []
    claimed = {a.node: (s.name, i) for s in by_name for i, held in enumerate(s.anchors) for a in held}
    for named in by_name:
        witness, note = _witness(named, by_structure, claimed)
        notes += [note] if note else []
        nodes = named.nodes if named.called else _widened(found, named, live)
        chosen.append(Segments(named.name, named.anchors, nodes, witness))
    for segments in by_structure:
        held = [a.node for block in segments.anchors for a in block]
        if sum(node in claimed for node in held) * 2 < len(held):
            segments.name = _unique(segments.name, chosen)
            chosen.append(segments)
            notes.append(f"{segments.name}: {len(segments.anchors)} repetitions without numbered modules.")
    chosen.sort(key=lambda s: s.anchors[0][0].position)
    if not chosen:
        notes.append("No stack: nothing on the token path repeats.")
    return [_stack(found, segments) for segments in chosen], notes


def _stack(found: Findings, segments: Segments) -> Stack:
    edges = borders(found, segments.nodes)
    return Stack(
        name=segments.name,
        depth=len(segments.anchors),
        streams=edges.streams,
        blocks=edges.blocks,
        shared=edges.shared,
        witness=segments.witness,
        long_skips=edges.long_skips,
    )


def _unique(name: str, taken: Sequence[Segments]) -> str:
    names = {segments.name for segments in taken}
    number = 2
    result = name
    while result in names:
        result, number = f"{name}_{number}", number + 1
    return result


# --- names confirmed by structure --------------------------------------------------------------------------------

Claims = Mapping[fx.Node, tuple[str, int]]
"""Of anchors: the named stack and the block that they belong to."""


def _witness(named: NamedStack, by_structure: Sequence[Segments], claimed: Claims) -> tuple[Witness, str]:
    """Whether structure confirms a named stack: its repeats must begin and end where named blocks do."""
    depth, name = len(named.anchors), named.name
    if depth == 1:
        return "names", f"{name}: one block only, known by its name."
    mine = {a.node for held in named.anchors for a in held}
    overlapping = [s for s in by_structure if any(a.node in mine for block in s.anchors for a in block)]
    if not overlapping:
        return "names", f"{name}: {depth} blocks by name that do not repeat; {_unlike(named)}."
    # per repetition: the named blocks that it touches
    touched = [[{claimed.get(a.node, ("", -1)) for a in held} for held in s.anchors] for s in overlapping]
    flat = [blocks for repeats in touched for blocks in repeats if any(stack == name for stack, _ in blocks)]
    if all(len(blocks) == 1 for blocks in flat):
        if len(flat) == depth:
            return "names and structure", _others(name, touched)
        if len(flat) == len({next(iter(blocks)) for blocks in flat}):
            note = f"{name}: {depth} blocks by name, of which {len(flat)} repeat alike; {_unlike(named)}."
            return "names and structure", note
        return "names and structure", f"{name}: structure sees repetitions within each block, {len(flat)} in all."
    whole = [block for blocks in flat for block in blocks if block[0] == name]
    if len(whole) == len(set(whole)) and len(flat) > 1:
        return "names and structure", f"{name}: its blocks repeat in groups; structure sees {len(flat)} repetitions."
    return "names", f"{name}: {depth} blocks by name; structure sees {len(flat)} repetitions with other borders."


def _others(name: str, touched: list[list[set[tuple[str, int]]]]) -> str:
    """A note where a stack's blocks alternate with another stack's."""
    others = {stack for repeats in touched for blocks in repeats for stack, _ in blocks} - {name, ""}
    for repeats in touched:
        order = [next(iter(blocks))[0] for blocks in repeats]
        changes = sum(a != b for a, b in itertools.pairwise(order))
        if others and changes > len(set(order)):
            return f"{name}: its blocks alternate with those of {', '.join(sorted(others))}."
    return ""


def _widened(found: Findings, named: NamedStack, live: _Liveness) -> list[list[fx.Node]]:
    """Blocks that are lists of modules hold what lies between their modules, too."""
    index = {anchor.node: i for i, anchor in enumerate(live.skeleton)}
    ranges: list[tuple[int, int]] = []
    for held in named.anchors:
        at = [index[a.node] for a in held]
        # what was made ahead for all blocks stays where it is: the block is its longest run
        starts = [i for i, where in enumerate(at) if i == 0 or where != at[i - 1] + 1]
        longest = max((at[i:j] for i, j in itertools.pairwise([*starts, len(at)])), key=len)
        ranges.append((longest[0], longest[-1] + 1))
    return [
        sorted({*nodes, *spanned}, key=found.position.__getitem__)
        for nodes, spanned in zip(named.nodes, live.spans(ranges), strict=True)
    ]


def _unlike(named: NamedStack) -> str:
    """Which blocks differ from the most common one."""
    shapes = [tuple(anchor.symbol for anchor in held) for held in named.anchors]
    common = max(set(shapes), key=lambda s: (shapes.count(s), len(s)))
    odd = [str(i) for i, s in enumerate(shapes) if s != common]
    if not odd:
        return "no difference in their linears"
    return f"{'block' if len(odd) == 1 else 'blocks'} {', '.join(odd)} differ{'s' if len(odd) == 1 else ''}"


# --- structure alone ---------------------------------------------------------------------------------------------


def _by_structure(found: Findings, skeleton: list[Anchor], live: _Liveness) -> list[Segments]:
    symbols = [anchor.symbol for anchor in skeleton]

    def accept(start: int, stop: int) -> bool:
        period = skeleton[start:stop]
        return any(a.attention for a in period) or (len(period) > 1 and found.trace.reaches_residual(period[-1].node))

    result: list[Segments] = []
    for repeat in tandem_repeats(symbols, accept, live.placed):
        starts = range(repeat.start, repeat.stop, repeat.period)
        ranges = [(start, start + repeat.period) for start in starts]
        pattern = symbols[ranges[0][0] : ranges[0][1]]
        extra = trimmed(symbols, pattern, repeat.stop)
        if extra and any(a.attention for a in skeleton[repeat.stop : repeat.stop + extra]):
            ranges.append((repeat.stop, repeat.stop + extra))
        held = [skeleton[low:high] for low, high in ranges]
        result.append(Segments(_derived_name(held), held, live.spans(ranges), "structure"))
    return result


class _Liveness:
    """How many values of a block are alive behind it: blocks end where fewest are."""

    def __init__(self, found: Findings, skeleton: list[Anchor]) -> None:
        self.found = found
        self.skeleton = skeleton
        self.last: dict[fx.Node, int] = {}
        for position, node in enumerate(found.nodes):
            for operand in node.all_input_nodes:
                self.last[operand] = position

    def crossing(self, at: int, since: int) -> tuple[int, int]:
        """In front of anchor ``at``: the least number of live values made since anchor ``since``, and where first.

        Where is a position: in front of which node.
        """
        low = self.skeleton[at - 1].position + 1 if at > 0 else 0
        high = self.skeleton[at].position if at < len(self.skeleton) else len(self.found.nodes) - 1
        # what enters the block counts, too: it lies in front of the block's first anchor
        born = (self.skeleton[since - 1].position + 1 if since else 0) if 0 <= since < at else low
        change = [0] * (high - low + 2)
        for position in range(born, high):
            node = self.found.nodes[position]
            dies = min(self.last.get(node, position), high)
            if dies >= max(position + 1, low) and self.found.on_tokens(node):
                change[max(position + 1, low) - low] += 1
                change[dies - low + 1] -= 1
        alive = list(itertools.accumulate(change))
        return min((alive[position - low], position) for position in range(low, high + 1))

    def placed(self, repeat: Repeat) -> Repeat:
        """Of the possible beginnings of a repeat, the one whose inner borders fewest values cross."""
        options: list[tuple[int, int]] = []
        for start in range(repeat.start, repeat.start + repeat.slack + 1):
            inner = [start + i * repeat.period for i in range(1, repeat.count)]
            options.append((sum(self.crossing(at, at - repeat.period)[0] for at in inner), start))
        return Repeat(min(options)[1], repeat.period, repeat.count, 0)

    def spans(self, ranges: Sequence[tuple[int, int]]) -> list[list[fx.Node]]:
        """The nodes of blocks given as ranges of anchors, from border to border."""
        result: list[list[fx.Node]] = []
        for number, (low, high) in enumerate(ranges):
            before = ranges[number - 1][0] if number else -1
            start = self.crossing(low, before)[1] if number else self._opening(ranges)
            stop = self.crossing(high, low)[1]
            result.append([node for node in self.found.nodes[start:stop] if node.op == "call_function"])
        return result

    def _opening(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Where the first block begins: in front of it lies the conditioning, so it begins as the second one does."""
        low = ranges[0][0]
        first = self.skeleton[low].position
        floor = self.skeleton[low - 1].position + 1 if low else 0
        if len(ranges) < 2:
            return self._latest(floor, first)
        at = ranges[1][0]
        second, begins = self.skeleton[at].position, self.crossing(at, low)[1]
        steps, nodes = 0, self.found.nodes
        while steps < second - begins and first - steps > floor:
            if packet(nodes[first - steps - 1]) is not packet(nodes[second - steps - 1]):
                break
            steps += 1
        return first - steps

    def _latest(self, floor: int, first: int) -> int:
        """In front of a block on its own: behind the last value of the token path that has several readers."""
        for position in range(first - 1, floor - 1, -1):
            node = self.found.nodes[position]
            if self.found.on_tokens(node) and len(node.users) > 1:
                return position + 1
        return floor


def _derived_name(blocks: Sequence[Sequence[Anchor]]) -> str:
    """What the paths of a block's modules have in common, numbers at its end left out."""
    common = [shared_prefix([module_path(a.node).split(".") for a in held]) for held in blocks]
    paths = [".".join(parts) for parts in common]
    name = paths[0] if len(set(paths)) == 1 else "".join(shared_prefix(paths))
    name = re.sub(r"[._]*\d*[._]*$", "", name)
    return name or "blocks"
