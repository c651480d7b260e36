"""Which way a guard is lowered, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ditc.runtime.artifact import Segment, StateSpec
from ditc.runtime.branched import Branched

from ..errors import PlanError
from .cut import Guard, Lower, split
from .partial import on_fewer
from .schedule import host_entries, obstacle, schedule
from .state import Site


def choose(site: Site, guard: Guard) -> tuple[Guard, tuple[str, ...]]:
    """The guard with its lowering, and what a report says about that.

    ``auto`` is ``schedule`` where no data has a part in the decisions, and else ``split``. What ``torch.export`` gave
    is one graph and stays one: there it is ``cond``.

    Raises:
        PlanError: the plan asks for what is impossible here.
    """
    wanted = site.options.lowering
    whole = _one_graph(site)
    if whole is not None and wanted not in ("cond", "auto"):
        raise PlanError(f"lowering={wanted!r} is impossible {whole}: use 'cond'")
    if wanted == "cond" or whole is not None:
        return guard, ("one graph (cond): a batch is computed unless all its samples reuse",)
    state = [entry.name for entry in site.ctx.state]
    timed = site.options.indicator == "timestep"
    host = host_entries(StateSpec(tuple(site.ctx.state)), [*site.vectors, *(site.rule.tensors if timed else ())])
    why = obstacle(site.graph, guard, state, host, _timestep(site) if timed else None)
    if site.options.group is not None:
        why = "ranks agree on their devices"
    if why is not None and wanted == "schedule":
        raise PlanError(f"lowering='schedule' is impossible for the policy {site.options.policy!r}: {why}; use 'split'")
    if why is None and wanted != "split":
        site.ctx.controls = replace(site.ctx.controls, host=True)
        site.ctx.state[:] = [replace(entry, host=entry.name in host) for entry in site.ctx.state]
        return replace(guard, lowering="schedule"), (_ALONE["timestep" if timed else "steps"],)
    partial, note = on_fewer(site, guard.branches, guard.decided.hit)
    return replace(guard, lowering="split", partial=partial), ("split: the host takes the branch", note)


_ALONE = {
    "steps": "schedule: the host decides alone, and waits for nothing",
    "timestep": "schedule: the host decides alone from the timestep, for which it waits where that is on a device",
}


def _timestep(site: Site) -> str | None:
    found = site.ctx.structure.timestep if site.ctx.structure is not None else None
    return found.name if found is not None else None


def _one_graph(site: Site) -> str | None:
    """Why the program must stay one graph, if it must."""
    if site.ctx.exported:
        return "after torch.export, whose program is one graph"
    results: Sequence[Any] = site.graph.graph.output_node().args[0]  # type: ignore[assignment]
    if not all(isinstance(node, fx.Node) for node in results):
        return "for a model that returns numbers beside tensors"
    return None


def lower_guard(
    graph: fx.GraphModule, guard: Guard, state: StateSpec, lower: Lower, cuda_graphs: bool
) -> Branched | Segment:
    """A rewritten graph with its guard as a segment.

    Args:
        graph: it is handed over.
        guard: where its guard stands.
        state: what it carries between steps.
        lower: compiles graphs.
        cuda_graphs: whether what ``lower`` gives may overwrite at a call what it returned at the one before.
    """
    if guard.lowering == "cond":
        return lower(graph)
    names = [entry.name for entry in state.entries]
    if guard.lowering == "split":
        made = split(graph, guard, lower)
    else:
        made = schedule(graph, guard, names, frozenset(entry.name for entry in state.entries if entry.host), lower)
    return replace(made, copied=len(names)) if cuda_graphs else made
