"""The passes in their order, and the one who runs them.

The runner alone recompiles, propagates shapes, verifies, times, dumps, bisects and writes repros; a pass only rewrites.

``DITC_DUMP=folder`` writes the captured graph and the graph after each pass that changed it; ``DITC_PASS_LIMIT=n``
stops after ``n`` rewriting passes, to find the one that does harm. When a pass fails, the graph before it is written
to ``DITC_REPRO`` (default: a temporary folder) together with the plan, and the error names the folder.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import fx

from ditc.runtime.artifact import Controls, Gauge, StateSpec

from .attention.recognise import RecogniseAttention
from .attention.sink import SinkTransposes
from .attention.use import UseAttention
from .base import Pass, PassContext, PassReport, Skip, count_operators
from .cache.calibrated import with_calibration
from .cache.chunks.guard import WHOLE, ChunkRegion
from .cache.cut import GUARD, Guard
from .cache.guard import GuardRegion
from .cache.mark import MarkBorders
from .canonicalize import Canonicalize
from .capture import Capture
from .errors import DitcError, PassError
from .fuse import FuseLinears
from .hoist import HoistWeights, Prologue
from .plan import Plan
from .quantize.files import PlanFiles, plan_files
from .quantize.linears import QuantizeLinears
from .quantize.modelopt import LowerModelopt
from .quantize.neighbours import FuseNeighbours
from .quantize.vnni import UseVnni
from .rewrite import device_of, submodules
from .structure import Structure, analyse
from .verify import Before, graph_text, output_types, propagate, verify


def passes_for(plan: Plan) -> tuple[Pass, ...]:
    """The rewriting passes of a plan, in order. Canonicalisation runs before them, always.

    Raises:
        CalibrationError, CostError: a file that the plan names, and a pass needs, is missing or damaged.
    """
    cache = plan.cache
    reads = plan.changes_attention or plan.quantizes or (cache is not None and cache.reads_calibration)
    files = plan_files(plan) if reads else PlanFiles()
    cache = with_calibration(cache, files.calibration) if cache is not None else None
    return (
        *([MarkBorders(cache)] if cache else []),
        *([MarkBorders(WHOLE)] if plan.chunks else []),
        LowerModelopt(),
        *((RecogniseAttention(), SinkTransposes(), UseAttention(*files)) if plan.changes_attention else ()),
        *([FuseLinears()] if plan.fuse else []),
        *([QuantizeLinears(*files)] if plan.quantizes else []),
        FuseNeighbours(),
        UseVnni(),
        HoistWeights(),
        *([GuardRegion(cache)] if cache else []),
        *([ChunkRegion(plan.chunks)] if plan.chunks else []),
    )


@dataclass(frozen=True)
class Rewritten:
    """A graph after the passes: what was found in it, what was done to it, and the weights' prologue.

    The graph returns the outputs that it was captured with, then ``gauges``, then ``state``; behind its state it takes
    ``controls``, where there are any. ``guard`` says where a cache guard stands in it.
    """

    graph: fx.GraphModule
    structure: Structure
    reports: tuple[PassReport, ...]
    state: StateSpec
    prologue: Prologue | None
    gauges: tuple[Gauge, ...] = ()
    controls: Controls = field(default_factory=Controls)
    guard: Guard | None = None


def rewrite(capture: Capture, plan: Plan, passes: tuple[Pass, ...] | None = None) -> Rewritten:
    """Canonicalises a captured graph, analyses it and runs the passes of ``plan`` on it.

    Args:
        capture: its graph is rewritten in place.
        plan: chooses the passes and their options.
        passes: run these instead of the plan's (for tests and for passes of one's own).

    Raises:
        PassError: a pass failed, broke its contract, or could do nothing of what was asked for.
    """
    graph = capture.graph
    ctx = PassContext(plan, device_of(graph), exported=capture.source == "export")
    outputs = output_types(graph)
    reports = [_run(Canonicalize(), graph, ctx, outputs, 0)]
    ctx.structure = analyse(graph)
    limit = _pass_limit()
    for number, item in enumerate(passes_for(plan) if passes is None else passes, start=1):
        if limit is not None and number > limit and item.name != HoistWeights.name:
            skip = Skip("graph", f"DITC_PASS_LIMIT={limit}")
            reports.append(PassReport(item.name, 0, skipped=(skip,)))
            continue
        reports.append(_run(item, graph, ctx, outputs, number))
    prologue = graph.meta.pop(HoistWeights.PROLOGUE, None)
    state, gauges = StateSpec(tuple(ctx.state)), tuple(ctx.gauges)
    guard = graph.meta.pop(GUARD, None)
    return Rewritten(graph, ctx.structure, tuple(reports), state, prologue, gauges, ctx.controls, guard)


def _run(item: Pass, graph: fx.GraphModule, ctx: PassContext, outputs: list[str], number: int) -> PassReport:
    before = Before(graph, outputs)
    operators = count_operators(graph)
    start = time.perf_counter()
    try:
        report = item(graph, ctx)
        graph.graph.eliminate_dead_code()
        for module in submodules(graph):
            module.recompile()
        if report.rewrites:
            propagate(graph)
        verify(graph, before, report, ctx)
    except (DitcError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        folder = _write_repro(item, before.text, ctx.plan, error)
        raise PassError(f"pass {item.name!r} failed: {error} (repro: {folder})") from error
    _dump(item, before.text, graph, number, bool(report.rewrites))
    return replace(
        report,
        milliseconds=1e3 * (time.perf_counter() - start),
        operators_before=operators,
        operators_after=count_operators(graph),
    )


def _pass_limit() -> int | None:
    text = os.environ.get("DITC_PASS_LIMIT")
    if text is None:
        return None
    if not text.isdigit():
        raise PassError(f"DITC_PASS_LIMIT={text!r}: a whole number of passes is wanted")
    return int(text)


def _dump(item: Pass, before: str, graph: fx.GraphModule, number: int, changed: bool) -> None:
    root = os.environ.get("DITC_DUMP")
    if root is None:
        return
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    if number == 0:
        (folder / "00.capture.txt").write_text(before, encoding="utf-8")
    if changed:
        (folder / f"{number:02}.{item.name}.after.txt").write_text(graph_text(graph), encoding="utf-8")
        (folder / f"{number:02}.{item.name}.after.py").write_text(graph.code, encoding="utf-8")


def _write_repro(item: Pass, before: str, plan: Plan, error: Exception) -> Path:
    root = os.environ.get("DITC_REPRO")
    folder = Path(root) if root else Path(tempfile.mkdtemp(prefix="ditc-repro-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.toml").write_text(plan.to_toml(), encoding="utf-8")
    (folder / "graph.before.txt").write_text(before, encoding="utf-8")
    (folder / "error.txt").write_text(
        f"pass {item!r}\n{type(error).__name__}: {error}\ntorch {torch.__version__}\n", encoding="utf-8"
    )
    return folder
