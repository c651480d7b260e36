"""Quantisation of linears: activations with ranges found in the graph, weights packed once."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from ditc.kernels import linear as _linear  # registers the ops  # noqa: F401
from ditc.kernels import quantize as _quantize  # noqa: F401

from ..base import PACK, PACKED_FROM, PassContext, PassReport, Skip
from ..plan import Plan
from ..rewrite import aten, calls, made_from_weights, new_call
from .calibration import Calibration
from .cost import CostTable
from .decide import Decision, Judge
from .parts import unpack

_ALPHA = 0.5
"""How much of the activations' outliers smoothing moves into the weight (SmoothQuant's usual value)."""


@dataclass(frozen=True)
class QuantizeLinears:
    """Rewrite rules, for each linear that :class:`Judge` gives a format ``f``:

    1. ``linear(x, w, b)`` becomes ``quantized_linear(quantize(x, f), quantize_weight(w, f), b, f)``, with a static
       range in ``quantize`` where the plan wants it;
    2. linears that read one ``x`` in one format share one ``quantize(x, f)``;
    3. where the weight alone is quantised, it becomes ``weight_linear(x, quantize_weight(w, f), b, f)``;
    4. with ``lowrank`` the weight is split first, ``w * s = up @ down + rest``; the rest is quantised, and
       ``linear(linear(x / s, down), up)`` is added. ``s`` smooths outlier channels and needs a calibration;
    5. a weight that arrives quantised (``dequantize(parts, f)``, from a checkpoint) is used as it is, in its format;
    6. everything that depends on weights alone is marked to be computed once per set of weights.
    """

    name: ClassVar[str] = "quantize"

    calibration: Calibration | None = None
    table: CostTable | None = None

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Quantises every linear that is to be, and says of each what became of it and why."""
        judge = Judge(ctx.plan, ctx.device, self.calibration, self.table)
        work = _Work(graph, ctx.plan, self.calibration)
        decisions, skipped = list[Decision](), list[Skip]()
        rewrites = 0
        for node in calls(graph, aten.linear.default):
            decision, impossible = judge.decide(node)
            decision = work.stored_format(node, decision)
            decisions.append(decision)
            if impossible is not None:
                skipped.append(Skip(node.name, impossible))
            elif decision.format != "none":
                work.rewrite(node, decision)
                rewrites += 1
        asked = ctx.plan.quantize != "auto" or bool(skipped)
        details = _summary(decisions, len(work.shared)) if rewrites else ()
        rows = tuple(decision.row() for decision in decisions)
        notes = (*details, *dict.fromkeys(work.notes))
        return PassReport(self.name, rewrites, tuple(skipped), requested=asked, details=notes, decisions=rows)


@dataclass
class _Work:
    """The rewriting of one graph: what its linears share."""

    graph: fx.GraphModule
    plan: Plan
    calibration: Calibration | None
    shared: dict[tuple[fx.Node, str, float | None], list[fx.Node]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def stored_format(self, node: fx.Node, decision: Decision) -> Decision:
        """A weight that arrives quantised decides its own format: packing it anew would only lose."""
        stored = _stored(node.args[1])
        if stored is None or decision.format in ("none", stored[1]):
            return decision
        if decision.format == "fp8" and stored[1] in ("nvfp4", "mxfp4"):
            return replace(decision, reason=f"stored as {stored[1]}, encoded anew as the plan asks")
        return replace(decision, format=stored[1], reason=f"stored as {stored[1]}")

    def rewrite(self, node: fx.Node, decision: Decision) -> None:
        """Replaces one linear."""
        x, weight = node.args[:2]
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        bias = node.args[2] if len(node.args) > 2 else None
        format, ops = decision.format, torch.ops.ditc
        residual = None
        for made in made_from_weights(weight) or ():
            made.meta[PACK] = True
        with self.graph.graph.inserting_before(node):
            if self.plan.lowrank and _stored(weight) is None:
                x, weight, residual = self._split(node, x, weight, decision)
        with self.graph.graph.inserting_before(node):
            parts = self._weight_parts(node, weight, decision)
        if decision.activations == "none":
            with self.graph.graph.inserting_before(node):
                new = new_call(self.graph, node, ops.weight_linear.default, (x, parts, bias, format))
                if residual is not None:
                    new.meta["val"] = node.meta["val"]
                    new = new_call(self.graph, node, aten.add.Tensor, (new, residual))
        else:
            quantized = self._quantized(node, x, decision)
            dtype = node.meta["val"].dtype
            with self.graph.graph.inserting_before(node):
                args = (quantized, parts, bias, None, residual, format, dtype)
                new = new_call(self.graph, node, ops.quantized_linear.default, args)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        self.graph.graph.erase_node(node)

    def _weight_parts(self, node: fx.Node, weight: fx.Node, decision: Decision) -> list[fx.Node]:
        stored = _stored(weight)
        if stored is not None and stored[1] == decision.format:
            return stored[0]
        packed = new_call(self.graph, node, torch.ops.ditc.quantize_weight.default, (weight, decision.format))
        packed.meta[PACK] = True
        parts = unpack(self.graph, packed, decision.format)
        for part in parts:
            part.meta[PACK] = True
        # the last part is a float scale in all formats but MX, whose NaN is a byte
        (parts[1] if decision.format in ("int8", "fp8") else parts[-1]).meta[PACKED_FROM] = decision.weight
        return parts

    def _quantized(self, node: fx.Node, x: fx.Node, decision: Decision) -> list[fx.Node]:
        static = self._static(decision)
        key = (x, decision.format, static)
        if key not in self.shared:
            # right behind its producer, so that it stands in front of every reader
            with self.graph.graph.inserting_after(x):
                args: tuple[Any, ...] = (x, decision.format)
                made = new_call(self.graph, node, torch.ops.ditc.quantize.default, args)
            if static is not None:
                with self.graph.graph.inserting_before(made):
                    value = {"dtype": torch.float32, "device": x.meta["val"].device}
                    made.args = (*args, new_call(self.graph, node, aten.full.default, ([], static), **value))
            self.shared[key] = unpack(self.graph, made, decision.format)
        return self.shared[key]

    def _static(self, decision: Decision) -> float | None:
        if decision.activations != "static":
            return None
        assert self.calibration is not None
        return self.calibration.static_scale(decision.weight, decision.format)

    def _split(
        self, node: fx.Node, x: fx.Node, weight: fx.Node, decision: Decision
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The input and weight to be quantised, and the low-rank branch's output."""

        def packed(target: object, *args: object, **kwargs: object) -> fx.Node:
            made = new_call(self.graph, node, target, args, **kwargs)  # type: ignore[arg-type]
            made.meta[PACK] = True
            return made

        dtype = x.meta["val"].dtype
        if self.calibration is not None and decision.weight in self.calibration:
            channels = self.calibration.channel_amax(decision.weight).tolist()
            scale = packed(torch.ops.ditc.smoothing_scale.default, weight, channels, _ALPHA)
            weight = packed(aten.mul.Tensor, weight, scale)
            inverse = packed(aten._to_copy.default, packed(aten.reciprocal.default, scale), dtype=dtype)
            x = new_call(self.graph, node, aten.mul.Tensor, (x, inverse))
            x.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
        else:
            self.notes.append("lowrank without a calibration: outlier channels are not smoothed")
        split = packed(torch.ops.ditc.lowrank_split.default, weight, self.plan.lowrank)
        rest, down, up = (packed(operator.getitem, split, index) for index in range(3))
        down, up = (packed(aten._to_copy.default, part, dtype=dtype) for part in (down, up))
        narrow = new_call(self.graph, node, aten.linear.default, (x, down))
        branch = new_call(self.graph, node, aten.linear.default, (narrow, up))
        return x, rest, branch


def _stored(weight: object) -> tuple[list[fx.Node], str] | None:
    """The parts and the format of a weight that arrives quantised."""
    if isinstance(weight, fx.Node) and weight.target is torch.ops.ditc.dequantize.default:
        parts, format = weight.args[:2]
        assert isinstance(parts, (list, tuple)) and isinstance(format, str)
        return [part for part in parts if isinstance(part, fx.Node)], format
    return None


def _summary(decisions: list[Decision], inputs: int) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for decision in decisions:
        what = f"kept: {decision.role}" if decision.format == "none" else decision.format
        if decision.format != "none" and decision.activations != "dynamic":
            what += " weight-only" if decision.activations == "none" else " static"
        counts[what] = counts.get(what, 0) + 1
    read = sum(d.format != "none" and d.activations != "none" for d in decisions)
    return (f"{read} linears read {inputs} quantised inputs", *(f"{what} x {n}" for what, n in sorted(counts.items())))
