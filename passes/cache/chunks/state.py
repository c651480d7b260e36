"""What chunks carry from step to step, and the region in the making that its parts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...base import PassContext
from ...capture import fake_mode_of
from ...trace import trace_here
from ..borders import borders
from ..inputs import add_controls, add_state
from ..region import Region
from ..state import PART
from .decide import CHUNK_STATE, capacity
from .grid import Grid
from .options import ChunkOptions
from .rows import Known, Rows, Site, Step
from .sparse import sites_of


@dataclass
class Chunked:
    """One region in the making.

    Attributes:
        graph, ctx, options: of the pass.
        grid: of the tokens.
        region: whose tokens are computed in part.
        seeds: rows of the streams that enter it.
        known, steps: rows of its values, and what becomes of its nodes.
        samples: how many of them have chunks of their own; 1 where they share them.
        state: the placeholder of each tensor of state by its name, in the order of declaration.
        controls: the placeholder of the numbers that come with each call.
    """

    graph: fx.GraphModule
    ctx: PassContext
    options: ChunkOptions
    grid: Grid
    region: Region
    seeds: dict[fx.Node, Rows]
    known: Known
    steps: dict[fx.Node, Step]
    samples: int
    state: dict[str, fx.Node] = field(init=False, default_factory=dict)
    controls: fx.Node = field(init=False)

    def __post_init__(self) -> None:
        self._declare()

    @property
    def mode(self) -> FakeTensorMode:
        """The fake mode of the graph's values."""
        return fake_mode_of(self.graph)

    @property
    def entries(self) -> list[fx.Node]:
        """The streams in front of the region."""
        return borders(self.graph, "entry")

    @property
    def sites(self) -> list[Site]:
        """The attentions whose keys and values are kept."""
        return sites_of(self.steps)

    @property
    def exits(self) -> dict[fx.Node, Rows]:
        """The exits that hold rows; the others are computed at every step."""
        return {e: rows for e in self.region.exits if (rows := self.known.rows(e.all_input_nodes[0])) is not None}

    @property
    def capacities(self) -> list[int]:
        """Numbers of chunks, less than all, that there is a program for."""
        found = {capacity(part, self.grid.chunks) for part in self.options.capacities}
        return sorted(found - {self.grid.chunks})

    @property
    def kept(self) -> dict[str, fx.Node]:
        """What is kept of the region for all tokens, by name, and the values that it is shaped like."""
        found = {f"exit.{i}": exit for i, exit in enumerate(self.exits)}
        for i, site in enumerate(self.sites):
            found |= {f"site.{i}.key": site.key, f"site.{i}.value": site.value}
        return found

    def trace(self, run: Callable[..., Any], operands: Sequence[fx.Node], graph: fx.Graph | None = None) -> Any:
        """:func:`trace_here` in this region's graph, or in that of a branch."""
        return trace_here(graph if graph is not None else self.graph.graph, self.mode, run, operands, {PART: "chunks"})

    def _declare(self) -> None:
        """One placeholder for each tensor of state, and one for the controls."""
        self._state("step", (self.samples,), torch.float32)
        for name in CHUNK_STATE:
            self._state(name, (self.samples, self.grid.chunks), torch.float32)
        for name in ("computed", "active"):
            self._state(name, (self.samples, *self.grid.shape), torch.bool)
        for name, like in self.kept.items():
            self._state(name, like.meta["val"].shape, like.meta["val"].dtype)
        like = self.region.exits[0].meta["val"]
        self.controls = add_controls(self.graph, self.ctx, "chunks.controls", self.options.controls(), (), like)

    def _state(self, name: str, shape: Sequence[Any], dtype: torch.dtype) -> None:
        like = self.region.exits[0].meta["val"]
        self.state[name] = add_state(self.graph, self.ctx, f"chunks.{name}", shape, dtype, like)
