"""What a pass is: a frozen dataclass that rewrites a graph in place and says what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import fx

from ditc.runtime.artifact import Controls, Gauge, StateEntry

from .plan import Plan
from .structure import Structure

PACK = "ditc_pack"
"""Key in a node's ``meta``: the node depends on weights alone and is to be computed once per set of weights."""

PACKED_FROM = "ditc_packed_from"
"""Key in the ``meta`` of a quantised weight's scale: the name of that weight."""


@dataclass(frozen=True)
class Skip:
    """Something that a pass could have rewritten and did not, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    ``rewrites`` counts what it changed, ``skipped`` what it could have changed and why it did not. Where the plan asked
    for the pass by name (``requested``) and everything was skipped, the runner makes that an error. The runner fills in
    the time and the numbers of operators. ``decisions`` holds one row per candidate of a pass that chooses between
    ways to run it, ready for a table: plain data with the same keys in each row.
    """

    name: str
    rewrites: int
    skipped: tuple[Skip, ...] = ()
    requested: bool = False
    details: tuple[str, ...] = ()
    decisions: tuple[Mapping[str, Any], ...] = ()
    milliseconds: float = 0.0
    operators_before: int = 0
    operators_after: int = 0


@dataclass
class PassContext:
    """What a pass may know besides the graph, and where it declares what a program takes and returns beside its own.

    ``controls`` are numbers that come with every call, in one placeholder of kind ``control`` behind the state.
    """

    plan: Plan
    device: torch.device
    structure: Structure | None = None
    state: list[StateEntry] = field(default_factory=list)
    gauges: list[Gauge] = field(default_factory=list)
    controls: Controls = field(default_factory=Controls)
    exported: bool = False
    """Whether ``torch.export`` gave the graph, which then stays one graph."""

    def declare_state(self, entry: StateEntry) -> None:
        """Announces a tensor that the session carries from step to step.

        The pass adds one placeholder of kind ``state`` and one output for it, in the order of declaration.
        """
        self.state.append(entry)

    def declare_gauge(self, graph: fx.GraphModule, gauge: Gauge, value: fx.Node) -> None:
        """Makes ``value``, float32 ``[labels]``, something that the program measures at every call.

        It is returned behind the outputs and the gauges so far, in front of the state.
        """
        output = graph.graph.output_node()
        returned = list(output.args[0])  # type: ignore[arg-type]
        returned.insert(len(returned) - len(self.state), value)
        output.args = (tuple(returned),)
        self.gauges.append(gauge)


@runtime_checkable
class Pass(Protocol):
    """A rewrite. Options are the fields of the dataclass; calling it rewrites ``graph`` in place.

    A pass neither recompiles nor lints nor propagates shapes: the runner does that, and verifies the result.
    New nodes that replace a node take over its ``meta`` (``pipeline.replace`` does it).
    """

    name: ClassVar[str]

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrites ``graph`` and reports."""
        ...


def count_operators(graph: fx.GraphModule) -> int:
    """The number of operator calls in a graph, views and tuple accesses included."""
    return sum(1 for node in graph.graph.nodes if node.op == "call_function")
