"""Wraps a marked region in branches: compute all tokens, or those of the active chunks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ditc.runtime.artifact import StateSpec

from ...base import PassContext, PassReport, Skip
from ...rewrite import aten
from ..borders import BORDER, borders, remove_borders
from ..guard import keep_gauges
from ..options import CacheOptions
from ..region import find_region
from .branches import branch
from .decide import CHUNK_STATE, decide, settle
from .grid import NoGrid, find_grid, seeds_of
from .options import ChunkOptions
from .rows import TokensMixed
from .sparse import propagate
from .state import Chunked

WHOLE = CacheOptions.model_validate({"policy": "fixed"})
"""How the borders of the region are marked: around all blocks."""


class DenseWarning(UserWarning):
    """Chunks were asked for, and the region computes all tokens at every step, for the reason given."""


@dataclass(frozen=True)
class ChunkRegion:
    """Cuts the marked region out into branches: one that computes all tokens, one for each capacity.

    1. In front of it :func:`decide` says for each sample which chunks are active; the smallest capacity that holds
       the most active chunks of any sample is taken, or all where none does.
    2. In a sparse branch only the tokens of as many chunks flow through the region: active ones, then those next in
       urgency. Their queries look at the keys and values of all tokens: theirs fresh, the others as they were kept.
    3. What the region adds to the other tokens is as it was.
    4. State: what the region adds, keys and values of each attention, and for each chunk what was decided.

    Where a node is not proven to treat each token on its own, or the grid is not, the region stays as it is.
    """

    options: ChunkOptions
    name: ClassVar[str] = "chunks"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Puts the branches in, or says why the region stays dense."""
        if not borders(graph, "exit"):
            return PassReport(self.name, 0)
        assert ctx.structure is not None
        keep_gauges(graph, ctx)
        exits, entries = borders(graph, "exit"), borders(graph, "entry")
        region = find_region(graph.graph, exits, entries)
        try:
            samples = _samples(exits[0])
            grid = find_grid(ctx.structure, entries, self.options)
            seeds = seeds_of(ctx.structure, entries, 0 if samples > 1 else None)
            known, steps = propagate(region.nodes, seeds)
        except (NoGrid, TokensMixed) as reason:
            remove_borders(graph)
            where = reason.node.name if isinstance(reason, TokensMixed) else "graph"
            warnings.warn(f"chunks: all tokens are computed at every step: {reason}", DenseWarning, stacklevel=2)
            return PassReport(self.name, 1, skipped=(Skip(where, str(reason)),))
        site = Chunked(graph, ctx, self.options, grid, region, seeds, known, steps, samples)
        _build(site)
        remove_borders(graph)
        sizes = " x ".join(map(str, grid.shape))
        details = (
            f"{grid.chunks} chunks ({sizes}) of {grid.tokens // grid.chunks} tokens, "
            f"{', '.join(map(str, site.capacities))} or all in a step",
            f"{len(region.nodes)} operators in the region, {len(site.sites)} attentions with kept keys, "
            f"{StateSpec(tuple(ctx.state)).bytes} bytes of state",
        )
        return PassReport(self.name, 1, requested=True, details=details)


def _samples(exit: fx.Node) -> int:
    """How many samples have chunks of their own."""
    if not exit.meta[BORDER].batch:
        return 1
    size = exit.meta["val"].shape[0]
    if not isinstance(size, int):
        raise NoGrid("the number of samples is symbolic: compile with dynamic=False")
    return size


def _build(site: Chunked) -> None:
    """Decides, branches and settles behind the last node that any of it reads."""
    graph = site.graph.graph
    places = {node: i for i, node in enumerate(graph.nodes)}
    read = [*site.entries, *site.region.operands, *site.state.values(), site.controls]
    last = max(read, key=places.__getitem__)
    with graph.inserting_after(last):
        anchor = graph.call_function(aten.sym_size.int, (last, 0))  # only a place
    with graph.inserting_before(anchor):
        decided = _decide(site)
        outputs, kept = branch(site, decided)
        new = kept | _settle(site, decided, kept)
    graph.erase_node(anchor)
    for exit, output in zip(site.region.exits, outputs, strict=True):
        exit.replace_all_uses_with(output)
    result = graph.output_node()
    result.args = ((*result.args[0], *(new[name] for name in site.state)),)  # type: ignore[misc]


def _decide(site: Chunked) -> dict[str, fx.Node]:
    names, numbers = ["step", *CHUNK_STATE], list(site.options.controls())

    def run(controls: Tensor, *operands: Tensor) -> dict[str, Tensor]:
        state = dict(zip(names, operands, strict=False))
        finite = torch.stack([x.isfinite().all() for x in operands[len(names) :]]).all()
        named = {name: controls[i] for i, name in enumerate(numbers)}
        return decide(state, named, finite, site.capacities, site.grid.chunks)

    operands = [site.controls, *(site.state[name] for name in names), *site.seeds]
    found: dict[str, fx.Node] = site.trace(run, operands)
    return found


def _settle(site: Chunked, decided: Mapping[str, fx.Node], kept: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """The state of chunks, judged by the first exit that holds them."""
    names = ["step", *CHUNK_STATE]
    rows = next(iter(site.exits.values()))
    gathered = next(i for i, part in enumerate(rows.parts) if part.gathered)
    start = sum(part.size for part in rows.parts[:gathered])

    def tokens(x: Tensor) -> Tensor:
        x = x.narrow(rows.dim, start, site.grid.tokens)
        return x.movedim(rows.dim, 1) if rows.batch is not None else x.movedim(rows.dim, 0)[None]

    def run(new: Tensor, old: Tensor, computed: Tensor, active: Tensor, score: Tensor, *rest: Tensor) -> Any:
        state = dict(zip(names, rest, strict=True))
        found = settle(state, computed, score, site.grid, tokens(new), tokens(old))
        shape = (site.samples, *site.grid.shape)
        return found | {"computed": computed.reshape(shape).clone(), "active": active.reshape(shape).clone()}

    operands = [kept["exit.0"], site.state["exit.0"], decided["computed"], decided["active"], decided["score"]]
    found: dict[str, fx.Node] = site.trace(run, [*operands, *(site.state[name] for name in names)])
    return found
