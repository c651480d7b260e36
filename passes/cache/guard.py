"""Wraps a marked region in a branch: compute it, or reuse what it gave before."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ditc.runtime.artifact import StateEntry, StateSpec

from ..base import PassContext, PassReport, Skip
from ..capture import INPUT, GraphInput, fake_mode_of
from ..rewrite import aten
from ..trace import trace_here
from .borders import BORDER, MAIN, Border, borders, mark, remove_borders
from .options import CacheOptions
from .policy import Seen, allowed, rule_of
from .region import Region, find_region
from .sizes import state_size

VECTORS = ("step", "run", "computed", "hit", "score")
"""State of every guard, float32 ``[S]``: steps so far, reused ones in a row, computed ones; and of the last step
whether it was reused, and the number by which the policy decided."""


@dataclass(frozen=True)
class GuardRegion:
    """Cuts the marked region out into the branches of one ``cond``.

    1. In front of it the policy decides for each sample; a decision that rests on NaN is to compute.
    2. Where all samples reuse, the branch adds what is kept to the entries. Else the region runs for the whole batch,
       and samples that reuse all the same get what they would have got.
    3. State: what is kept, the policy's own, and :data:`VECTORS`.
    """

    options: CacheOptions
    name: ClassVar[str] = "guard"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Puts the guard in, or says why there is nothing to guard."""
        if not borders(graph, "exit"):
            return PassReport(self.name, 0)
        self._keep_gauges(graph, ctx)
        exits, entries = borders(graph, "exit"), borders(graph, "entry")
        rule = rule_of(self.options)
        seen = {"entry": next((e for e in entries if e.meta.get(MAIN)), None)}
        for kind in ("source", "indicator"):
            seen[kind] = next(iter(borders(graph, kind)), None)
        looked_at = [node for kind, node in seen.items() if kind in rule.needs and node is not None]
        region = find_region(graph.graph, exits, [*entries, *looked_at])
        if not region.nodes:
            remove_borders(graph)
            return PassReport(self.name, 1, skipped=(Skip("graph", "the region computes nothing of its own"),))
        builder = _Guard(graph, ctx, self.options, region, entries, {k: v for k, v in seen.items() if k in rule.needs})
        builder.build()
        remove_borders(graph)
        details = (f"{len(region.nodes)} operators in the region, {StateSpec(tuple(ctx.state)).bytes} bytes of state",)
        return PassReport(self.name, 1, requested=True, details=details)

    @staticmethod
    def _keep_gauges(graph: fx.GraphModule, ctx: PassContext) -> None:
        """A step that is reused repeats what the last computed one measured."""
        count = len(ctx.gauges)
        returned = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
        gauges = returned[len(returned) - count - len(ctx.state) : len(returned) - len(ctx.state)]
        for node in dict.fromkeys(gauges):
            mark(graph, node, Border("exit", False))


class _Guard:
    """One guard in the making."""

    def __init__(
        self,
        graph: fx.GraphModule,
        ctx: PassContext,
        options: CacheOptions,
        region: Region,
        entries: list[fx.Node],
        seen: dict[str, fx.Node | None],
    ) -> None:
        self.graph, self.ctx, self.options, self.region = graph, ctx, options, region
        self.rule = rule_of(options)
        self.entries = entries
        self.seen = {kind: node for kind, node in seen.items() if node is not None}
        self.batch = region.exits[0].meta[BORDER].batch
        self.samples = region.exits[0].meta["val"].shape[0] if self.batch else 1
        self.state: dict[str, fx.Node] = {}

    def build(self) -> None:
        """Declares state, decides, branches, settles."""
        self._declare()
        last_needed = self._after([*self.entries, *self.seen.values(), *self.region.operands, *self.state.values()])
        with self.graph.graph.inserting_after(last_needed):
            anchor = self.graph.graph.call_function(aten.sym_size.int, (last_needed, 0))  # only a place
        with self.graph.graph.inserting_before(anchor):
            decided = self._decide()
            outputs, kept = self._branch(decided["hit"], decided["all"])
            new = self._settle(decided, outputs)
        self.graph.graph.erase_node(anchor)
        for exit, output in zip(self.region.exits, outputs, strict=True):
            exit.replace_all_uses_with(output)
        names = [name for name in self.state if name.startswith("kept.")]
        new |= dict(zip(names, kept, strict=True))
        result = self.graph.graph.output_node()
        result.args = ((*result.args[0], *(new[name] for name in self.state)),)  # type: ignore[misc]

    # --- state ---

    def _declare(self) -> None:
        """One placeholder for each tensor of state, and one for the controls."""
        for name in (*VECTORS, *self.rule.vectors):
            self._state(name, (self.samples,), torch.float32)
        for name, like in self.rule.tensors.items():
            value = (self.region.exits[0] if like == "output" else self.seen[like]).meta["val"]
            self._state(name, value.shape, value.dtype)
        for i, exit in enumerate(self.region.exits):
            value = exit.meta["val"]
            for order in range(self.options.order + 1):
                self._state(f"kept.{i}.{order}", value.shape, value.dtype)
        count = len(self.options.controls()) + len(self.options.table)
        self.controls = self._placeholder("cache_controls", (count,), torch.float32)
        self.controls.meta[INPUT] = GraphInput("cache.controls", "control")

    def _state(self, name: str, shape: Sequence[Any], dtype: torch.dtype) -> None:
        entry = StateEntry(f"cache.{name}", tuple(state_size(self.graph, size) for size in shape), dtype)
        self.ctx.declare_state(entry)
        node = self._placeholder(f"state_cache_{name.replace('.', '_')}", shape, dtype)
        node.meta[INPUT] = GraphInput(entry.name, "state")
        self.state[name] = node

    def _placeholder(self, name: str, shape: Sequence[Any], dtype: torch.dtype) -> fx.Node:
        with self.graph.graph.inserting_after(self.graph.graph.find_nodes(op="placeholder")[-1]):
            node = self.graph.graph.placeholder(name)
        example = self.region.exits[0].meta["val"]
        with example.fake_mode:
            node.meta = {"val": torch.empty(tuple(shape), dtype=dtype, device=example.device)}
        return node

    def _trace(self, graph: fx.Graph, run: Callable[..., Any], operands: Sequence[fx.Node]) -> Any:
        return trace_here(graph, fake_mode_of(self.graph), run, operands, {})

    def _kept(self, i: int) -> list[fx.Node]:
        """What is kept of an exit: its value or residual, and its differences from step to step."""
        return [self.state[f"kept.{i}.{order}"] for order in range(self.options.order + 1)]

    def _after(self, nodes: list[fx.Node]) -> fx.Node:
        order = {node: i for i, node in enumerate(self.graph.graph.nodes)}
        return max([*nodes, self.controls], key=order.__getitem__)

    # --- decision ---

    def _unpack(self, controls: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        names = list(self.options.controls())
        return {name: controls[i] for i, name in enumerate(names)}, controls[len(names) :]

    def _decide(self) -> dict[str, fx.Node]:
        kinds, names = list(self.seen), [*VECTORS, *self.rule.vectors, *self.rule.tensors]

        def decide(controls: Tensor, *operands: Tensor) -> dict[str, Tensor]:
            looked = dict(zip(kinds, operands, strict=False))
            state = dict(zip(names, operands[len(kinds) :], strict=True))
            named, table = self._unpack(controls)
            step = state["step"].to(torch.int64)
            seen = Seen(self.batch, step, **looked)
            would, score, vectors = self.rule.decide(seen, state, named, table)
            may = allowed(step, state["run"], named) & (state["computed"] > self.options.order)
            hit = would & may & score.isfinite()
            return {**{f"decided.{k}": v for k, v in vectors.items()}, "hit": hit, "all": hit.all(), "score": score}

        operands = [self.controls, *self.seen.values(), *(self.state[name] for name in names)]
        found: dict[str, fx.Node] = self._trace(self.graph.graph, decide, operands)
        return found

    # --- branches ---

    def _branch(self, hit: fx.Node, everyone: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The exits' values and what is kept of them."""
        kept = [node for i in range(len(self.region.exits)) for node in self._kept(i)]
        operands = list(dict.fromkeys([hit, self.state["run"], *kept, *self.entries, *self.region.operands]))
        names = []
        for kind, module in (("reuse", self._reuse(operands)), ("compute", self._compute(operands, hit))):
            setattr(self.graph, f"cache_{kind}", module)
            names.append(self.graph.graph.get_attr(f"cache_{kind}"))
        branch = self.graph.graph.call_function(torch.ops.higher_order.cond, (everyone, *names, tuple(operands)))
        exits = len(self.region.exits)
        shapes = [*(self._kept(i)[0] for i in range(exits)), *kept]
        items = []
        for i, like in enumerate(shapes):
            item = self.graph.graph.call_function(operator.getitem, (branch, i))
            size = like.meta["val"].numel()
            with like.meta["val"].fake_mode:
                item.meta["val"] = like.meta["val"].new_empty((size,))
            items.append(self._trace(self.graph.graph, lambda flat, shaped: flat.reshape(shaped.shape), [item, like]))
        return items[:exits], items[exits:]

    def _reuse(self, operands: list[fx.Node]) -> fx.GraphModule:
        new = fx.Graph()
        inside = _placeholders(new, operands)
        results, copies = [], []
        for i, exit in enumerate(self.region.exits):
            what: Border = exit.meta[BORDER]
            count = self.options.order + 1

            def reuse(run: Tensor, *values: Tensor, dim: int = what.dim, count: int = count) -> list[Tensor]:
                kept, base = values[:count], values[count:]
                again = forecast(kept, run + 1)
                return [_own(_joined(base, dim) + again if base else again), *map(_own, kept)]

            nodes = [self.state["run"], *self._kept(i), *(self.entries[k] for k in what.base)]
            output, *rest = self._trace(new, reuse, [inside[node] for node in nodes])
            results.append(output)
            copies += rest
        new.output((*results, *copies))
        return fx.GraphModule(self.graph, new)

    def _compute(self, operands: list[fx.Node], hit: fx.Node) -> fx.GraphModule:
        new = fx.Graph()
        outer = _placeholders(new, operands)
        inside = dict(outer)
        for node in self.region.nodes:
            inside[node] = new.node_copy(node, inside.__getitem__)
        results, residuals = [], []
        for i, exit in enumerate(self.region.exits):
            what: Border = exit.meta[BORDER]
            count = self.options.order + 1

            def compute(
                z: Tensor,
                mask: Tensor,
                run: Tensor,
                *values: Tensor,
                dim: int = what.dim,
                count: int = count,
                batch: bool = what.batch and self.samples != 1,
            ) -> list[Tensor]:
                kept, base = values[:count], values[count:]
                start = _joined(base, dim) if base else None
                fresh = differences(z if start is None else z - start, kept, run + 1)
                if not batch:
                    return [_own(z), *map(_own, fresh)]
                mask = mask.reshape(-1, *[1] * (z.dim() - 1))
                again = forecast(kept, run + 1)
                again = again if start is None else start + again
                held = [torch.where(mask, old, new) for old, new in zip(kept, fresh, strict=True)]
                return [_own(torch.where(mask, again, z)), *map(_own, held)]

            nodes = [hit, self.state["run"], *self._kept(i), *(self.entries[k] for k in what.base)]
            value = inside[exit.all_input_nodes[0]]
            output, *rest = self._trace(new, compute, [value, *(outer[node] for node in nodes)])
            results.append(output)
            residuals += rest
        new.output((*results, *residuals))
        return fx.GraphModule(self.graph, new)

    # --- behind the region ---

    def _settle(self, decided: dict[str, fx.Node], outputs: list[fx.Node]) -> dict[str, fx.Node]:
        kinds = list(self.seen)
        names = [*VECTORS, *self.rule.vectors, *self.rule.tensors]
        mine = [name for name in decided if name.startswith("decided.")]

        def settle(hit: Tensor, score: Tensor, output: Tensor, *operands: Tensor) -> dict[str, Tensor]:
            looked = dict(zip(kinds, operands, strict=False))
            rest = operands[len(kinds) :]
            state = dict(zip(names, rest, strict=False))
            vectors = dict(zip((n.removeprefix("decided.") for n in mine), rest[len(names) :], strict=True))
            seen = Seen(self.batch, state["step"].to(torch.int64), output=output, **looked)
            new = self.rule.settle(seen, state, vectors, hit)
            reused = hit.float()
            computed = state["computed"] + (1 - reused)
            if not self.rule.needs:
                # a policy that looks at nothing would not see NaN: what holds it does not count as computed
                computed = torch.where(seen.finite(output), computed, 0.0)
            return new | {
                "step": state["step"] + 1,
                "run": (state["run"] + 1) * reused,
                "computed": computed,
                "hit": reused,
                "score": score.clone(),
            }

        operands = [decided["hit"], decided["score"], outputs[0], *self.seen.values()]
        operands += [*(self.state[name] for name in names), *(decided[name] for name in mine)]
        found: dict[str, fx.Node] = self._trace(self.graph.graph, settle, operands)
        return found


def forecast(kept: Sequence[Tensor], k: Tensor) -> Tensor:
    """Taylor's forecast ``k`` steps (``[S]``) after the last computed one: TaylorSeer (2503.06923)."""
    result = kept[0]
    factor = k.reshape(-1, *[1] * (result.dim() - 1)).to(result.dtype)
    term = torch.ones_like(factor)
    for order, difference in enumerate(kept[1:], start=1):
        term = term * factor / order
        result = result + difference * term
    return result


def differences(value: Tensor, kept: Sequence[Tensor], gap: Tensor) -> list[Tensor]:
    """The value and its backward differences a step, from those of the computed step ``gap`` steps ago."""
    found = [value]
    for old in kept[:-1]:
        found.append((found[-1] - old) / gap.reshape(-1, *[1] * (value.dim() - 1)).to(value.dtype))
    return found


def _placeholders(new: fx.Graph, operands: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    found = {}
    for i, operand in enumerate(operands):
        found[operand] = new.placeholder(f"operand_{i}")
        found[operand].meta = {"val": operand.meta["val"]}
    return found


def _own(x: Tensor) -> Tensor:
    """The values in a vector that is no operand and no view of one: what a branch may return, whatever its sizes are.
    (``cond`` understands the strides of symbolic sizes in one dimension only.)"""
    return x.clone(memory_format=torch.contiguous_format).reshape(-1)


def _joined(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
