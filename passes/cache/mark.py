"""Marks the borders of the region that a cache guard will wrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..base import PassContext, PassReport, Skip
from ..capture import INPUT
from ..rewrite import aten, calls, facts_of
from ..structure import Block, Role, Stream, Structure
from .borders import MAIN, Border, mark, straighten
from .frames import Frames, find_frames
from .inside import Inside
from .options import CacheOptions
from .rules import inside_of, rule_of


@dataclass(frozen=True)
class _Link:
    """A block of the chain, with the streams of its stack."""

    block: Block
    streams: tuple[Stream, ...]


@dataclass(frozen=True)
class MarkBorders:
    """Finds the chain of blocks that the main tokens go through and marks where its skippable middle begins and ends.

    1. Streams behind the front blocks become ``entry``; for policies that look at what those add, the main stream in
       front of them ``source``.
    2. What leaves the middle, streams and values that skip over to later blocks, becomes ``exit``; a stream that
       entered in the same shape, or joined of several that did, is kept as a residual to it.
    3. For policies that look at it, what the first block's first linear reads becomes ``indicator``; or, where the
       plan says so, the embedding of the timestep.
    4. For policies that look inside, the main stream behind some of the blocks becomes a ``place``.
    5. Where the whole model is skipped, the latent is the entry and the model's output the exit: a residual to it
       where both have one shape.
    """

    options: CacheOptions
    name: ClassVar[str] = "mark borders"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Marks all borders, or says why there is no region."""
        structure = ctx.structure
        assert structure is not None
        if calls(graph, torch.ops.ditc.border.default):
            return PassReport(self.name, 0)
        nodes = {node.name: node for node in graph.graph.nodes}
        needs = rule_of(self.options).needs
        chain = _chain(structure, nodes)
        if self.options.whole:
            return self._whole(graph, structure, chain, nodes)
        front, back = self.options.front_blocks, self.options.back
        if not chain:
            # a graph may be a fragment, or no transformer: there is no candidate, which is no error
            return PassReport(self.name, 0, requested=True)
        if front + back >= len(chain):
            return self._nothing(f"front={front} and back={back} leave nothing of {len(chain)} blocks")
        body = chain[front : len(chain) - back]
        # in the order of the graph, in which borders are found again
        places = {name: i for i, name in enumerate(nodes)}
        entries = sorted(_entering(chain, front, nodes), key=lambda entry: places[entry[0].name])
        exits = _leaving(chain, body, nodes)
        source = _main(structure, _streams_of(chain[0], _entering(chain, 0, nodes)))
        main = _main(structure, _streams_of(chain[max(front - 1, 0)], entries))
        indicator = self._indicator(graph, chain[0], nodes) if "indicator" in needs else None
        if "indicator" in needs and indicator is None:
            return self._nothing(_NOT_THERE[self.options.indicator])
        if "source" in needs and (source is None or main is None or _sizes(source) != _sizes(main)):
            return self._nothing("the main stream changes its shape in the front blocks")
        inside = inside_of(self.options)
        looks = _places(structure, chain, front, len(body), nodes, inside) if inside is not None else {}
        if inside is not None and not looks:
            return self._nothing("no block of the region leaves the main stream in the shape that it came in")
        looked_at = [node for node in (source if "source" in needs else None, indicator) if node is not None]
        looked_at += [node for node, _ in looks.values()]
        batch = all(map(_has_batch, [*(entry for entry, _ in entries), *exits, *looked_at]))
        residual = self.options.policy != "bwcache"  # which reuses outputs
        bases = {exit: _base(exits[exit], exit, entries) if residual else ((), 0) for exit in exits}
        wanted = [(exit, Border("exit", batch, *bases[exit])) for exit in exits]
        for entry, _ in entries:
            wanted.append((entry, Border("entry", batch, place=0 if entry is main and 0 in looks else None)))
        wanted += [(indicator, Border("indicator", batch))] if indicator is not None else []
        wanted += [(source, Border("source", batch))] if source is not None and "source" in needs else []
        wanted += [(at, Border("place", batch, place=i, frames=f)) for i, (at, f) in looks.items() if i]
        for node, what in wanted:
            mark(graph, node, what).meta[MAIN] = node is main and what.kind == "entry"
        straighten(graph)
        where = f"blocks {front} to {len(chain) - back - 1} of {len(chain)}, {len(entries)} in, {len(exits)} out"
        details = (where, _who_decides(batch), *_looks(self.options, looks))
        return PassReport(self.name, len(wanted), requested=True, details=details)

    def _whole(
        self, graph: fx.GraphModule, structure: Structure, chain: Sequence[_Link], nodes: dict[str, fx.Node]
    ) -> PassReport:
        outputs = [n for n in graph.graph.output_node().args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        axis = structure.token_axis.name if structure.token_axis is not None else None
        latent = next((n for n in graph.graph.find_nodes(op="placeholder") if n.meta[INPUT].name == axis), None)
        if len(outputs) != 1 or latent is None:
            return self._nothing("the model does not turn one latent into one output")
        output, looks = outputs[0], "indicator" in rule_of(self.options).needs
        indicator = self._indicator(graph, chain[0], nodes) if looks and chain else None
        if looks and indicator is None:
            return self._nothing(_NOT_THERE[self.options.indicator])
        batch = all(map(_has_batch, [output, latent, *([indicator] if indicator is not None else [])]))
        mark(graph, output, Border("exit", batch, (0,) if _sizes(latent) == _sizes(output) else ()))
        mark(graph, latent, Border("entry", batch)).meta[MAIN] = True
        if indicator is not None:
            mark(graph, indicator, Border("indicator", batch))
        straighten(graph)
        return PassReport(self.name, 2, requested=True, details=("the whole model", _who_decides(batch)))

    def _indicator(self, graph: fx.GraphModule, first: _Link, nodes: dict[str, fx.Node]) -> fx.Node | None:
        return _embedded(graph, first) if self.options.indicator == "timestep" else _modulated(graph, first, nodes)

    def _nothing(self, reason: str) -> PassReport:
        return PassReport(self.name, 0, skipped=(Skip("graph", reason),), requested=True)


def _chain(structure: Structure, nodes: dict[str, fx.Node]) -> list[_Link]:
    """All blocks that work on the main tokens, in program order; stacks may follow each other or alternate."""
    if structure.token_axis is None:
        return []
    order = {name: i for i, name in enumerate(nodes)}
    links = [
        _Link(block, stack.streams)
        for stack in structure.stacks
        if any(structure.token_axis.name in stream.tokens for stream in stack.streams)
        for block in stack.blocks
        if block.nodes and all(name in nodes for name in block.nodes)
    ]
    return sorted(links, key=lambda link: max(order[name] for name in link.block.nodes))


Entering = list[tuple[fx.Node, Stream]]


def _entering(chain: Sequence[_Link], position: int, nodes: dict[str, fx.Node]) -> Entering:
    """The streams in front of block ``position``."""
    link = chain[max(position - 1, 0)]
    names = link.block.inputs if position == 0 else _current(link.block)
    return [(nodes[name], stream) for name, stream in zip(names, link.streams, strict=True) if name in nodes]


def _current(block: Block) -> tuple[str | None, ...]:
    """The streams behind a block: what it rewrote, and else what came in."""
    return tuple(out or into for out, into in zip(block.outputs, block.inputs, strict=True))


def _streams_of(link: _Link, entries: Entering) -> Entering:
    return [entry for entry in entries if entry[1] in link.streams]


def _main(structure: Structure, entries: Entering) -> fx.Node | None:
    """The stream with the main tokens."""
    axis = structure.token_axis
    return next((node for node, stream in entries if axis is not None and axis.name in stream.tokens), None)


def _leaving(chain: Sequence[_Link], body: Sequence[_Link], nodes: dict[str, fx.Node]) -> dict[fx.Node, Stream | None]:
    """What the rest of the model reads of the middle: the last block's streams, and what skips over to later blocks."""
    order = {node: i for i, node in enumerate(nodes.values())}
    inside = {nodes[name] for link in body for name in link.block.nodes}
    end = max(order[node] for node in inside)
    last = body[-1]
    found: dict[fx.Node, Stream | None] = {
        nodes[name]: stream for name, stream in zip(last.block.outputs, last.streams, strict=True) if name in nodes
    }
    for node in sorted(inside, key=order.__getitem__):
        crosses = any(order.get(user, end + 1) > end and user not in inside for user in node.users)
        if crosses and node not in found and isinstance(node.meta.get("val"), torch.Tensor):
            found[node] = None
    return found


Places = dict[int, tuple[fx.Node, Frames | None]]


def _places(
    structure: Structure, chain: Sequence[_Link], front: int, count: int, nodes: dict[str, fx.Node], inside: Inside
) -> Places:
    """Where a policy looks at the main stream, 0 in front of the ``count`` blocks of the region and i behind the i-th;
    nowhere, where the stream cannot be followed."""
    found: list[tuple[fx.Node, Frames | None]] = []
    for position in range(front, front + count + 1):
        streams = _streams_of(chain[max(position - 1, 0)], _entering(chain, position, nodes))
        node = _main(structure, streams)
        if node is None:
            return {}
        found.append((node, find_frames(structure, node, dict(streams)[node])))
    return {place: found[place] for place in inside.places([_sizes(node) for node, _ in found])}


def _who_decides(batch: bool) -> str:
    return "each sample decides" if batch else "one decision for all samples: dimension 0 is not the batch alone"


def _looks(options: CacheOptions, places: Places) -> tuple[str, ...]:
    """What a policy sees inside, in words."""
    if options.policy != "adacache":
        return (f"the outputs of {len(places)} blocks are compared",) if places else ()
    last = max(places)
    frames = places[last][1]
    moves = f"motion over {frames.count} frames" if frames is not None else "no motion: no frames are known"
    return (
        f"the residual of block {options.front_blocks + last - 1} is compared",
        moves if options.motion else "no motion",
    )


def _base(stream: Stream | None, exit: fx.Node, entries: Entering) -> tuple[tuple[int, ...], int]:
    """The entries that an exit is a residual to, and the dimension along which they are joined."""
    if stream is None:
        return (), 0
    sizes = _sizes(exit)
    for i, (node, entering) in enumerate(entries):
        if entering.tokens == stream.tokens and _sizes(node) == sizes:
            return (i,), 0
    chosen: list[int] = []
    rest = stream.tokens
    while rest:
        found = next(
            (i for i, (_, s) in enumerate(entries) if i not in chosen and rest[: len(s.tokens)] == s.tokens), None
        )
        if found is None:
            return (), 0
        chosen.append(found)
        rest = rest[len(entries[found][1].tokens) :]
    shapes = [_sizes(entries[i][0]) for i in chosen]
    if any(len(shape) != len(sizes) for shape in shapes):
        return (), 0
    dims = [d for d in range(len(sizes)) if any(shape[d] != sizes[d] for shape in shapes)]
    if len(dims) != 1 or sum(shape[dims[0]] for shape in shapes) != sizes[dims[0]]:
        return (), 0
    return tuple(chosen), dims[0]


_NOT_THERE = {
    "modulated": "the first block has no linear on the token path whose input could be looked at",
    "timestep": "no linear embeds the timestep alone: indicator='modulated' needs none",
}


def _modulated(graph: fx.GraphModule, first: _Link, nodes: dict[str, fx.Node]) -> fx.Node | None:
    """What the first block's first linear on the token path reads: in most models, what its queries are made of."""
    inside = set(first.block.nodes)
    for node in calls(graph, aten.linear.default):
        facts = facts_of(node)
        if node.name in inside and facts is not None and facts.role not in (None, Role.MODULATION, Role.UNKNOWN):
            found = node.args[0]
            return found if isinstance(found, fx.Node) else None
    return None


def _embedded(graph: fx.GraphModule, first: _Link) -> fx.Node | None:
    """What the timestep's embedder gives: in front of the first block, the last linear of those that embed nothing but
    the timestep."""
    inside, found = set(first.block.nodes), None
    for node in graph.graph.nodes:
        if node.name in inside:
            break
        facts = facts_of(node) if node.target is aten.linear.default else None
        found = node if facts is not None and facts.role is Role.TIMESTEP else found
    return found


def _has_batch(node: fx.Node) -> bool:
    facts = facts_of(node)
    return facts is not None and bool(facts.axes) and facts.axes[0] == "batch"


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
