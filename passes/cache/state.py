"""What a guard carries from step to step, and the guard in the making that its parts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from ..base import PassContext
from ..capture import fake_mode_of
from ..trace import trace_here
from .borders import BORDER, Border
from .frames import Frames
from .inputs import add_controls, add_state
from .inside import Inside
from .options import CacheOptions
from .policy import Rule
from .region import Region
from .rules import inside_of, rule_of
from .storage import Storage, storage_of

VECTORS = ("step", "run", "computed", "hit", "score")
"""State of every guard, float32 ``[S]``: steps so far, reused ones in a row, computed ones; and of the last step
whether it was reused, and the number by which the policy decided."""

FINITE = "finite"
"""State of every guard, float32 ``[S]``: whether the last step's result held neither NaN nor infinity."""

PART = "ditc_cache"
"""Key in the ``meta`` of a node that a guard added: the part of the guard that it belongs to."""

Part = Literal["decide", "branch", "settle"]


@dataclass
class Site:
    """One guard in the making.

    Attributes:
        graph, ctx, options: of the pass.
        region: what is guarded.
        entries: border nodes in front of the region, to which exits are residuals.
        seen: what the policy looks at in front of the region, by its name in :class:`.policy.Seen`.
        places: what it looks at inside, and the frames there, in the order in which it named them.
        state: the placeholder of each tensor of state by its name, in the order of declaration.
        controls: the placeholder of the numbers that come with each call.
    """

    graph: fx.GraphModule
    ctx: PassContext
    options: CacheOptions
    region: Region
    entries: list[fx.Node]
    seen: dict[str, fx.Node]
    places: list[tuple[fx.Node, Frames | None]] = field(default_factory=list)
    state: dict[str, fx.Node] = field(init=False, default_factory=dict)
    controls: fx.Node = field(init=False)

    def __post_init__(self) -> None:
        self.storages = [storage_of(exit, self.options.storage) for exit in self.region.exits]
        self._declare()

    @property
    def rule(self) -> Rule:
        """The policy."""
        return rule_of(self.options)

    @property
    def inside(self) -> Inside | None:
        """What the policy measures inside of the region."""
        return inside_of(self.options)

    @property
    def batch(self) -> bool:
        """Whether each sample has a decision of its own."""
        what: Border = self.region.exits[0].meta[BORDER]
        return what.batch

    @property
    def samples(self) -> Any:
        """How many decisions there are: an integer, or a symbolic one."""
        return self.region.exits[0].meta["val"].shape[0] if self.batch else 1

    @property
    def remembered(self) -> list[str]:
        """The state that policies read: all but what is kept of the exits and of the places inside."""
        return [*self.vectors, *self.rule.tensors]

    @property
    def vectors(self) -> list[str]:
        """The state of one number a sample."""
        return [*VECTORS, FINITE, *self.rule.vectors, *self.measured]

    @property
    def measured(self) -> tuple[str, ...]:
        """The numbers among them that are measured inside of the region; they stay where it does not run."""
        return self.inside.numbers if self.inside is not None else ()

    def storage(self, i: int) -> Storage:
        """How an exit is stored."""
        return self.storages[i][0]

    def kept(self, i: int) -> list[fx.Node]:
        """What is kept of an exit, in parts: its value or residual, and its differences from step to step."""
        return [node for name, node in self.state.items() if name.startswith(f"kept.{i}.")]

    @property
    def looked(self) -> list[fx.Node]:
        """What the policy remembers of the places inside."""
        return [node for name, node in self.state.items() if name.startswith("looked.")]

    @property
    def held(self) -> list[str]:
        """The state that the branches make: what is kept and looked at, and what was measured."""
        return [*(name for name in self.state if name.startswith(("kept.", "looked."))), *self.measured]

    def trace(
        self, part: Part, run: Callable[..., Any], operands: Sequence[fx.Node], graph: fx.Graph | None = None
    ) -> Any:
        """:func:`trace_here` in this guard's graph, or in that of a branch."""
        where = graph if graph is not None else self.graph.graph
        return trace_here(where, fake_mode_of(self.graph), run, operands, {PART: part})

    def _declare(self) -> None:
        """One placeholder for each tensor of state, and one for the controls."""
        for name in self.vectors:
            self._state(name, (self.samples,), torch.float32)
        for name, like in self.rule.tensors.items():
            value = (self.region.exits[0] if like == "output" else self.seen[like]).meta["val"]
            self._state(name, value.shape, value.dtype)
        for i in range(len(self.region.exits)):
            for order in range(self.options.order + 1):
                for part, (shape, dtype) in enumerate(self.storage(i).parts):
                    self._state(f"kept.{i}.{order}.{part}", shape, dtype)
        if self.inside is not None:
            with self.region.exits[0].meta["val"].fake_mode:
                looked = self.inside.looked([node.meta["val"] for node, _ in self.places])
            for i, value in enumerate(looked):
                self._state(f"looked.{i}", value.shape, value.dtype)
        named, table, like = self.options.controls(), self.options.table, self.region.exits[0].meta["val"]
        self.controls = add_controls(self.graph, self.ctx, "cache.controls", named, table, like)

    def _state(self, name: str, shape: Sequence[Any], dtype: torch.dtype) -> None:
        like = self.region.exits[0].meta["val"]
        self.state[name] = add_state(self.graph, self.ctx, f"cache.{name}", shape, dtype, like)
