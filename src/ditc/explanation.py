"""``ditc.explain``: what the compiler sees in a model, and what it would do with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import fx

from ditc.passes.attention.use import UseAttention
from ditc.passes.backend import reason_to_pass_through
from ditc.passes.base import PassReport
from ditc.passes.capture import capture_dynamo
from ditc.passes.errors import CaptureError, PassError
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan
from ditc.passes.structure import Structure
from ditc.passes.structure.table import render

from .text import as_text


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: its structure, what the passes did to it, or why it stays as it is."""

    structure: Structure | None
    passes: tuple[PassReport, ...]
    operators: int
    untouched: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What ditc sees in a model. ``str()`` of it is a table.

    ``structure`` and ``passes`` are those of the main graph (the one with the most linears); ``graphs`` holds all of
    them, in the order of their capture, when the model breaks into several. ``notes`` says what could not be found or
    done, and why.
    """

    model: str
    plan: Plan
    structure: Structure
    passes: tuple[PassReport, ...]
    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...]

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(f"ditc explain: {self.model}", style="bold"), Text(f"plan: {self.plan}")]
        parts.append(render(self.structure))
        parts.append(_passes_table(self.passes))
        for report in self.passes:
            if report.decisions:
                attends = report.name == UseAttention.name
                parts.append((_attentions_table if attends else _linears_table)(report.decisions))
        if self.notes:
            parts.append(Text("notes", style="bold"))
            parts += [Text(f"  {note}") for note in self.notes]
        return Group(*parts)

    def __str__(self) -> str:
        return as_text(self)

    def to_data(self) -> dict[str, Any]:
        """Plain dictionaries and lists, for JSON."""
        return {
            "model": self.model,
            "plan": self.plan.to_options(),
            "structure": asdict(self.structure),
            "passes": [asdict(report) for report in self.passes],
            "notes": list(self.notes),
        }


def explain(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    plan: Plan | Mapping[str, Any] | None = None,
) -> Explanation:
    """Captures ``model``, analyses it and runs the passes of ``plan``, without compiling anything.

    The model is called once, in evaluation mode and without gradients; it is left as it was.

    Args:
        model: any module that Dynamo can capture, broken into several graphs if need be.
        args, kwargs: inputs of its ``forward``. With neither, inputs are made up from the model's configuration, which
            works for models of diffusers.
        plan: what the passes should do; the default plan when ``None``.

    Raises:
        CaptureError: nothing could be captured, or no inputs were given and none could be made up.
        PlanError: the plan is none.
    """
    chosen = Plan.from_options(plan)
    if not args and not kwargs:
        from .example_inputs import example_inputs

        kwargs = example_inputs(model)
    named = _by_name(model, tuple(args), dict(kwargs or {}))
    collector = _Collector(chosen)
    # a cache limit that the model's own compilations have used up must not silence us
    limits = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}
    with _evaluating(model), torch.no_grad(), torch._dynamo.config.patch(limits):
        torch.compile(model, backend=collector)(*named[0], **named[1])
    return collector.explanation(type(model).__name__)


@dataclass
class _Collector:
    """A backend that analyses each graph and runs it as it is."""

    plan: Plan
    graphs: list[GraphReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.breaks += _graph_break(gm)
        self.graphs.append(self._report(gm, example_inputs))
        return gm.forward

    def _report(self, gm: fx.GraphModule, example_inputs: list[Any]) -> GraphReport:
        operators = sum(1 for node in gm.graph.nodes if node.op.startswith("call"))
        reason = reason_to_pass_through(gm, example_inputs)
        if reason is not None:
            return GraphReport(None, (), operators, reason)
        try:
            capture = capture_dynamo(gm, example_inputs)
        except CaptureError as error:
            return GraphReport(None, (), operators, str(error))
        if capture.unsupported is not None:
            structure = rewrite(capture, self.plan, passes=()).structure
            return GraphReport(structure, (), operators, capture.unsupported)
        rewritten = self._rewrite(gm, example_inputs)
        return GraphReport(rewritten.structure, rewritten.reports, operators)

    def _rewrite(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Rewritten:
        try:
            return rewrite(capture_dynamo(gm, example_inputs), self.plan)
        except PassError as error:
            self.notes.append(str(error))
            return rewrite(capture_dynamo(gm, example_inputs), self.plan, passes=())

    def explanation(self, name: str) -> Explanation:
        found = [graph for graph in self.graphs if graph.structure is not None]
        notes = [*self.notes, *(f"not analysed: {g.untouched}" for g in self.graphs if g.untouched)]
        if not found:
            raise CaptureError(f"nothing of {name} could be analysed: " + ("; ".join(notes) or "no graph was captured"))
        main = max(found, key=lambda graph: len(graph.structure.linears if graph.structure else ()))
        if len(self.graphs) > 1:
            notes.append(f"the model breaks into {len(self.graphs)} graphs; shown is the one with the most linears")
            if not self.breaks:
                # a break inside of a loop: Dynamo runs the function around it eagerly, and says so only in its log
                notes.append("Dynamo gives no reason for it; TORCH_LOGS=graph_breaks names the place")
        notes += [f"graph break: {reason}" for reason in dict.fromkeys(self.breaks)]
        assert main.structure is not None
        return Explanation(name, self.plan, main.structure, main.passes, tuple(self.graphs), tuple(notes))


def _graph_break(gm: fx.GraphModule) -> list[str]:
    """Why Dynamo ended this graph, and where in the user's code, if it was for a graph break."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return []
    where = f" at {reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}" if reason.user_stack else ""
    return [str(reason.reason).split("\n")[0] + where]


def _by_name(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with as many arguments by name as possible: names are the analysis' second witness."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    kinds = {p.kind for name, p in signature.parameters.items() if name in bound.arguments}
    if kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}:
        return (), dict(bound.arguments)
    return args, kwargs


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _passes_table(passes: tuple[PassReport, ...]) -> Table:
    table = Table(title="passes", title_justify="left")
    for column in ("pass", "rewrites", "skipped", "operators", "ms"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    table.add_column("what and why")
    for report in passes:
        reasons: dict[str, int] = {}
        for skip in report.skipped:
            reasons[skip.reason] = reasons.get(skip.reason, 0) + 1
        remarks = [*report.details, *(f"skipped {count} ×: {reason}" for reason, count in reasons.items())]
        operators = f"{report.operators_before} → {report.operators_after}"
        row = (report.name, str(report.rewrites), str(len(report.skipped)), operators, f"{report.milliseconds:.0f}")
        table.add_row(*row, "\n".join(remarks))
    return table


def _linears_table(decisions: Sequence[Mapping[str, Any]]) -> Table:
    """What becomes of each linear; the linears of many blocks that share a fate share a row."""
    table = _table("linears", ("role", "linears", "M × N × K", "format"))
    for rows in _fates(decisions, ("role", "M", "N", "K", "format", "activations", "reason")):
        row = rows[0]
        how = {"dynamic": "", "static": " static", "none": " weight-only"}[row["activations"]]
        format = "kept" if row["format"] == "none" else row["format"] + how
        size = f"{row['M']} × {row['N']} × {row['K']}"
        table.add_row(row["role"], str(len(rows)), size, format, *_expected(rows), row["reason"])
    return table


def _attentions_table(decisions: Sequence[Mapping[str, Any]]) -> Table:
    """What becomes of each attention; the attentions of many blocks that share a fate share a row."""
    table = _table(
        "attentions", ("kind", "axis", "mask", "sites", "batch × heads", "queries × keys", "features", "how")
    )
    sizes = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim")
    for rows in _fates(decisions, ("kind", "axis", "mask", *sizes, "recipe", "sparse", "window", "reason")):
        row = rows[0]
        heads = f"{row['heads']}" + (f" of {row['kv_heads']}" if row["kv_heads"] != row["heads"] else "")
        how = [row["recipe"]]
        how += [f"blocks above {row['sparse']:g}"] if row["sparse"] else []
        how += [f"window {row['window']}"] if row["window"] else []
        table.add_row(
            row["kind"], row["axis"], row["mask"], str(len(rows)), f"{row['batch']} × {heads}",
            f"{row['q_len']} × {row['kv_len']}", str(row["head_dim"]), "\n".join(how), *_expected(rows), row["reason"],
        )  # fmt: skip
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = column in ("linears", "sites", "features") or "×" in column
        table.add_column(column, justify="right" if numeric else "left")
    for column in ("SQNR dB", "gain ×"):
        table.add_column(column, justify="right")
    table.add_column("why")
    return table


def _fates(decisions: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> list[list[Mapping[str, Any]]]:
    """Rows that agree in all fields named."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in decisions:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def _expected(rows: list[Mapping[str, Any]]) -> tuple[str, str]:
    """SQNR, of a calibrated model the worst of the rows, and gain."""
    sqnr = [row["sqnr"] for row in rows if row["sqnr"] is not None]
    gain = rows[0]["gain"]
    return f"{min(sqnr):.1f}" if sqnr else "-", "-" if gain is None else f"{gain:.2f}"
