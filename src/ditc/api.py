"""``ditc.compile`` and ``ditc.stats``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from ditc.passes.backend import check_plan
from ditc.passes.base import PassReport
from ditc.passes.plan import Plan
from ditc.runtime.chunks import ChunkStats
from ditc.runtime.guards import GuardStats
from ditc.runtime.program import programs_of
from ditc.runtime.weights import Memory

from .text import as_text, megabytes


def compile(
    model: torch.nn.Module,
    plan: Plan | Mapping[str, Any] | None = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
) -> torch.nn.Module:
    """``torch.compile(model, backend="ditc", options=plan)``, with the plan checked at once.

    Args:
        model: a diffusion transformer. It is neither changed nor copied; compilation happens at the first call.
        plan: a :class:`ditc.Plan`, its fields as a mapping, or ``None`` for the default plan.
        fullgraph, dynamic: as for :func:`torch.compile`.

    Returns:
        The compiled module, to be called like ``model`` under ``torch.no_grad()`` or ``torch.inference_mode()``.

    Raises:
        PlanError: the plan is none, or cannot be carried out on this machine.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"ditc.compile takes a torch.nn.Module, got {type(model).__name__}")
    chosen = Plan.from_options(plan)
    check_plan(chosen)
    compiled = torch.compile(model, backend="ditc", options=chosen.to_options(), fullgraph=fullgraph, dynamic=dynamic)
    assert isinstance(compiled, torch.nn.Module)
    return compiled


@dataclass(frozen=True)
class ProgramStats:
    """What one compiled graph did for one module.

    ``untouched`` says why the graph runs as captured, or is ``None``. ``precise_calls`` are the calls that ran at full
    precision because of their step. ``measured`` holds what the graph measured at its other calls, as means over them,
    by name and label: under ``attention kept`` the part of all blocks of keys that each sparse attention looked at.
    ``guard`` holds what a cache guard decided, step by step, and ``chunks`` which chunks were computed. ``packs``
    counts how often weights were packed, over all modules that share the graph; ``memory`` is what that holds now (a
    graph that finds everything packed by another holds it too), and ``unreleased`` names the weights that
    ``free_originals`` could not release, with the reason.
    """

    number: int
    calls: int
    untouched: str | None
    plan: Plan
    graph_hash: str
    passes: tuple[PassReport, ...]
    notes: tuple[str, ...]
    packs: int
    memory: Memory
    state_bytes_per_branch: int
    precise_calls: int = 0
    unreleased: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    guard: GuardStats | None = None
    chunks: ChunkStats | None = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed weights."""
        return self.memory.packed

    @property
    def remarks(self) -> str:
        """What is worth knowing beside the numbers."""
        found = [self.untouched] if self.untouched else list(self.notes)
        for reason, count in Counter(self.unreleased.values()).items():
            found.append(f"{count} weights not released: {reason}")
        for name, values in self.measured.items():
            mean, many = sum(values.values()) / len(values), len(values)
            found.append(
                f"{name} {mean:.3g} ({min(values.values()):.3g} to {max(values.values()):.3g}) of {many} sites"
            )
        return "; ".join(found)


@dataclass(frozen=True)
class Stats:
    """What ran for a compiled module, one entry per compiled graph; ``str()`` of it is a table."""

    programs: tuple[ProgramStats, ...]

    @property
    def calls(self) -> int:
        """Calls of compiled graphs."""
        return sum(program.calls for program in self.programs)

    def __rich__(self) -> Table:
        table = Table(title="ditc: what ran", title_justify="left")
        for column in ("graph", "calls", "plan", "rewrites", "weights", "remarks"):
            table.add_column(column, justify="right" if column in ("graph", "calls") else "left")
        for program in self.programs:
            rewrites = ", ".join(f"{report.name} {report.rewrites}" for report in program.passes if report.rewrites)
            calls = f"{program.calls}" + (f"\n{program.precise_calls} precise" if program.precise_calls else "")
            if program.guard is not None:
                calls += f"\n{program.guard.skipped} reused"
            if program.chunks is not None:
                calls += f"\n{program.chunks.sparse} sparse"
            weights = _weights(program)
            table.add_row(str(program.number), calls, str(program.plan), rewrites or "-", weights, program.remarks)
        return table

    def __str__(self) -> str:
        return as_text(self)


def _weights(program: ProgramStats) -> str:
    memory = program.memory
    if not memory.packed:
        return "-"
    lines = [f"packed {megabytes(memory.packed)} ({program.packs}×)", f"of {megabytes(memory.originals)}"]
    if memory.released:
        lines.append(f"released {megabytes(memory.released)}")
    lines += [f"resident {megabytes(memory.resident)}", f"peak {megabytes(memory.peak)}"]
    return "\n".join(lines)


def stats(compiled: torch.nn.Module) -> Stats:
    """What ran for a module that was compiled with ditc (or for the module behind it).

    Graphs that read no weight of the module (fragments between graph breaks) belong to no module and are not listed.

    Raises:
        TypeError: ``compiled`` is no module.
    """
    if not isinstance(compiled, torch.nn.Module):
        raise TypeError(f"ditc.stats takes a compiled module, got {type(compiled).__name__}")
    owned = {id(tensor): tensor for tensor in (*compiled.parameters(), *compiled.buffers())}
    found = []
    for program in programs_of(compiled):
        manifest = program.artifact.manifest
        found.append(
            ProgramStats(
                program.number,
                program.calls_by(owned),
                manifest.untouched,
                Plan.from_toml(manifest.plan),
                manifest.graph_hash,
                manifest.reports,
                manifest.notes,
                sum(cache.packs for cache in program.caches),
                program.memory(),
                program.artifact.state.bytes,
                program.precise_calls_by(owned),
                {name: reason for cache in program.caches for name, reason in cache.unreleased().items()},
                program.gauges_by(owned),
                program.guard_by(owned),
                program.chunks_by(owned),
            )
        )
    return Stats(tuple(found))
