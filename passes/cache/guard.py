"""Wraps a marked region in a branch: compute it, or reuse what it gave before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ditc.runtime.artifact import StateSpec

from ..base import PassContext, PassReport, Skip
from ..rewrite import aten
from .borders import BORDER, MAIN, Border, borders, mark, remove_borders
from .branches import branch
from .cut import GUARD, Guard
from .decide import decide
from .frames import Frames
from .lowering import choose
from .options import CacheOptions
from .ranks import said
from .region import find_region
from .rules import rule_of
from .settle import settle
from .state import Site
from .storage import stored_as


@dataclass(frozen=True)
class GuardRegion:
    """Cuts the marked region out into the branches of one ``cond``.

    1. In front of it the policy decides for each sample; a decision that rests on NaN is to compute.
    2. Where all samples reuse, the branch adds what is kept to the entries. Else the region runs for the whole batch,
       and samples that reuse all the same get what they would have got.
    3. State: what is kept, the policy's own, and :data:`.state.VECTORS`.

    The graph holds the ``cond`` whatever the lowering; those that take it apart find in ``graph.meta[GUARD]`` where.
    """

    options: CacheOptions
    name: ClassVar[str] = "guard"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Puts the guard in, or says why there is nothing to guard."""
        if not borders(graph, "exit"):
            return PassReport(self.name, 0)
        keep_gauges(graph, ctx)
        exits, entries = borders(graph, "exit"), borders(graph, "entry")
        needs = rule_of(self.options).needs
        seen = {"entry": next((e for e in entries if e.meta.get(MAIN)), None)}
        for kind in ("source", "indicator"):
            seen[kind] = next(iter(borders(graph, kind)), None)
        looked_at = {kind: node for kind, node in seen.items() if kind in needs and node is not None}
        places = _places(graph)
        region = find_region(graph.graph, exits, [*entries, *looked_at.values()])
        if not region.nodes:
            remove_borders(graph)
            return PassReport(self.name, 1, skipped=(Skip("graph", "the region computes nothing of its own"),))
        site = Site(graph, ctx, self.options, region, entries, looked_at, places)
        guard, notes = choose(site, _build(site))
        graph.meta[GUARD] = guard
        remove_borders(graph)
        size = f"{len(region.nodes)} operators in the region, {StateSpec(tuple(ctx.state)).bytes} bytes of state"
        stored, skipped = stored_as(site.storages, region.exits, self.options.order + 1)
        return PassReport(
            self.name, 1, skipped, requested=True, details=(size, *stored, *notes, *said(self.options.group))
        )


def keep_gauges(graph: fx.GraphModule, ctx: PassContext) -> None:
    """A step that is reused repeats what the last computed one measured."""
    count = len(ctx.gauges)
    returned = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
    gauges = returned[len(returned) - count - len(ctx.state) : len(returned) - len(ctx.state)]
    for node in dict.fromkeys(gauges):
        mark(graph, node, Border("exit", False))


def _places(graph: fx.GraphModule) -> list[tuple[fx.Node, Frames | None]]:
    """What a policy looks at inside of the region; the borders that marked it are taken out."""
    found: dict[int, tuple[fx.Node, Frames | None]] = {}
    for node in (*borders(graph, "entry"), *borders(graph, "place")):
        what: Border = node.meta[BORDER]
        if what.place is None:
            continue
        found[what.place] = (node, what.frames)
        if what.kind == "place":
            inner = node.all_input_nodes[0]
            found[what.place] = (inner, what.frames)
            node.replace_all_uses_with(inner)
            graph.graph.erase_node(node)
    return [found[place] for place in sorted(found)]


def _build(site: Site) -> Guard:
    """Decides, branches and settles behind the last node that any of it reads."""
    graph = site.graph.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    read = [*site.entries, *site.seen.values(), *site.region.operands, *site.state.values(), site.controls]
    read += [node for node, _ in site.places if node not in site.region.nodes]
    last = max(read, key=order.__getitem__)
    with graph.inserting_after(last):
        anchor = graph.call_function(aten.sym_size.int, (last, 0))  # only a place
    with graph.inserting_before(anchor):
        decided = decide(site)
        branches = branch(site, decided)
        new = settle(site, decided, branches.exits)
    graph.erase_node(anchor)
    for exit, output in zip(site.region.exits, branches.exits, strict=True):
        exit.replace_all_uses_with(output)
    new |= dict(zip(site.held, branches.kept, strict=True))
    result = graph.output_node()
    result.args = ((*result.args[0], *(new[name] for name in site.state)),)  # type: ignore[misc]
    return Guard("cond", decided, branches, site.samples if isinstance(site.samples, int) else 1)
