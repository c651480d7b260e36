"""The choice of how each attention is computed, and its place in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from ditc.kernels import attention as _attention  # registers the ops  # noqa: F401
from ditc.kernels import quantize as _quantize  # noqa: F401
from ditc.kernels.attention import recipe_of
from ditc.kernels.smooth import MAX_HEAD
from ditc.runtime.artifact import Gauge

from ..base import PassContext, PassReport, Skip
from ..quantize.calibration import Calibration
from ..quantize.tables import CPU_INT8, NATIVE, CostTable, DeviceKind
from ..rewrite import new_call
from ..structure import AttentionSite
from ..trace import trace_in
from .decide import Decision, Judge
from .emit import Call, attention, attention_of
from .recognise import SITE
from .tokens import Finder

KEPT = "attention kept"
"""Gauge: of each site that skips blocks of keys, the part of all blocks that it looked at."""


@dataclass(frozen=True)
class UseAttention:
    """Rewrite rules, for each attention that :class:`Judge` gives a recipe:

    1. on CPUs with the instructions, INT8 is ``attention_int8(q, k, v, scale, mask, causal, blocks, window)``;
    2. any other recipe is ``attention_quantized`` of ``quantize(q)``, ``quantize(k - mean)`` and ``quantize(v)``, whose
       quantisation stands in the graph, behind the norm and RoPE that make its operands;
    3. on CUDA, queries and keys of NVFP4 are ``smooth_queries`` and ``smooth_keys`` of what their projections made:
       norms and rotations in front of the attention, where they can be proven to be that, go into these calls;
    4. where blocks of keys are skipped, the map of blocks is computed in front of it, and the part that is kept
       becomes a gauge of the program.

    Operands with one dimension less or more than ``[B, H, L, D]`` are reshaped to it and back.
    """

    name: ClassVar[str] = "attention"

    calibration: Calibration | None = None
    table: CostTable | None = None
    kind: DeviceKind | None = None
    """The device, where it is not one of this machine."""

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrites every attention that is to be, and says of each what became of it and why."""
        assert ctx.structure is not None, "the analysis runs before any pass"
        kind = self.kind or DeviceKind.of(ctx.device)
        judge = Judge(ctx.plan, kind, ctx.structure, self.calibration, self.table)
        work = _Work(graph, kind.type == "cuda")
        decisions, skipped = list[Decision](), list[Skip]()
        for site, node in _sites(graph, ctx):
            decision, reasons = judge.decide(site, node)
            decisions.append(decision)
            skipped += [Skip(node.name, reason) for reason in reasons]
            if decision.recipe != NATIVE:
                work.rewrite(node, decision)
        if work.kept:
            ctx.declare_gauge(graph, *work.gauge())
        asked = {ctx.plan.attention_for(kind) for kind in ("self", "cross", "joint")} - {"native", "auto"}
        return PassReport(
            self.name, sum(decision.recipe != NATIVE for decision in decisions), tuple(skipped),
            requested=bool(asked), details=(*_summary(decisions), *work.origins()),
            decisions=tuple(d.row() for d in decisions),
        )  # fmt: skip


def _sites(graph: fx.GraphModule, ctx: PassContext) -> Iterator[tuple[AttentionSite, fx.Node]]:
    """The attentions that are still there, with the node that makes each one's output."""
    nodes = {node.meta.get(SITE, node.name): node for node in graph.graph.nodes}
    for site in ctx.structure.attentions if ctx.structure is not None else ():
        node = nodes.get(site.node)
        if node is not None and not str(node.target).startswith("ditc."):
            yield site, node


@dataclass
class _Work:
    """The rewriting of one graph: what its sites measure."""

    graph: fx.GraphModule
    fuse: bool
    """Whether queries and keys of NVFP4 are followed to their projections."""
    kept: dict[str, fx.Node] = field(default_factory=dict)
    finder: Finder | None = None
    found: dict[str, int] = field(default_factory=dict)

    def rewrite(self, node: fx.Node, decision: Decision) -> None:
        """Replaces one ``scaled_dot_product_attention``."""
        mask, scale = node.args[3], node.kwargs.get("scale")
        D = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        call = Call(
            decision.recipe,
            D**-0.5 if scale is None else float(scale),  # type: ignore[arg-type]
            bool(node.args[5]),
            decision.sparse,
            decision.window or -1,
        )
        operands = [arg for arg in (*node.args[:3], mask) if isinstance(arg, fx.Node)]
        reason = self._apart(call, operands[0])
        if reason is None:
            new, kept = self._followed(node, call, operands)
        else:
            new, kept = trace_in(self.graph, node, attention(call), *operands)
            if self.fuse and call.recipe != CPU_INT8 and recipe_of(call.recipe).smooth_queries:
                self._count(f"queries and keys smoothed where they are: {reason}")
        if kept is not None:
            self.kept[self._label(decision.site)] = kept
        node.replace_all_uses_with(new)
        self.graph.graph.erase_node(node)

    def _apart(self, call: Call, query: fx.Node) -> str | None:
        """Why queries and keys are not followed to their projections; ``None`` where they are."""
        shape = query.meta["val"].shape
        if not self.fuse or call.recipe == CPU_INT8 or not recipe_of(call.recipe).smooth_queries:
            return "inductor fuses it" if self.fuse else "no kernel for it here"
        if call.sparse:
            return "blocks of keys are chosen by them"
        if len(shape) != 4:
            return f"they have {len(shape)} dimensions"
        return f"heads of {shape[3]} features, the kernel takes {MAX_HEAD}" if shape[3] > MAX_HEAD else None

    def _followed(self, node: fx.Node, call: Call, operands: list[fx.Node]) -> tuple[fx.Node, None]:
        """The attention on what its queries and keys are made of."""
        if self.finder is None:
            self.finder = Finder.of(self.graph)
        query, key = (self.finder.find(operand, node) for operand in operands[:2])
        self._count(f"queries {query.what}")
        self._count(f"keys {key.what}")
        run = attention_of(call, query, key, operands[0].meta["val"].dtype)
        new, _ = trace_in(self.graph, node, run, *query.nodes(), *key.nodes(), *operands[2:])
        return new, None

    def _count(self, what: str) -> None:
        self.found[what] = self.found.get(what, 0) + 1

    def origins(self) -> tuple[str, ...]:
        """Where the queries and keys of NVFP4 are read, in words."""
        return tuple(f"nvfp4 {what} x {count}" for what, count in sorted(self.found.items()))

    def _label(self, site: str) -> str:
        """A name for a site that no other has: a module may be called more than once."""
        count = sum(label == site or label.startswith(f"{site} #") for label in self.kept)
        return f"{site} #{count + 1}" if count else site

    def gauge(self) -> tuple[Gauge, fx.Node]:
        """The part that each site keeps, as one tensor."""
        output = self.graph.graph.output_node()
        values = list(self.kept.values())
        with self.graph.graph.inserting_before(output):
            stacked = new_call(self.graph, values[-1], torch.ops.aten.stack.default, (values,))
        return Gauge(KEPT, tuple(self.kept)), stacked


def _summary(decisions: list[Decision]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for decision in decisions:
        what = f"kept: {decision.kind}" if decision.recipe == NATIVE else f"{decision.kind} in {decision.recipe}"
        what += f", blocks above {decision.sparse:g}" if decision.sparse else ""
        what += f", window {decision.window}" if decision.window else ""
        counts[what] = counts.get(what, 0) + 1
    return tuple(f"{what} x {count}" for what, count in sorted(counts.items()))
