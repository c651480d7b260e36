"""The branches of a guard: what is kept is reused, or the region computes and something is kept."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .borders import BORDER, Border
from .decide import Decision
from .forecast import differences, forecast
from .state import Site


def branch(site: Site, decided: Decision) -> tuple[list[fx.Node], list[fx.Node]]:
    """Adds the ``cond`` at the current insertion point: the exits' values, and what is kept of them from now on."""
    graph = site.graph.graph
    exits = len(site.region.exits)
    kept = [node for i in range(exits) for node in site.kept(i)]
    operands = list(dict.fromkeys([decided.hit, site.state["run"], *kept, *site.entries, *site.region.operands]))
    names = []
    for kind, module in (("reuse", _reuse(site, operands)), ("compute", _compute(site, operands, decided.hit))):
        setattr(site.graph, f"cache_{kind}", module)
        names.append(graph.get_attr(f"cache_{kind}"))
    chosen = graph.call_function(torch.ops.higher_order.cond, (decided.everyone, *names, tuple(operands)))
    items = []
    for i, like in enumerate([*(site.kept(i)[0] for i in range(exits)), *kept]):
        item = graph.call_function(operator.getitem, (chosen, i))
        size = like.meta["val"].numel()
        with like.meta["val"].fake_mode:
            item.meta["val"] = like.meta["val"].new_empty((size,))
        items.append(site.trace(lambda flat, shaped: flat.reshape(shaped.shape), [item, like]))
    return items[:exits], items[exits:]


def _reuse(site: Site, operands: list[fx.Node]) -> fx.GraphModule:
    """Adds what is kept to the entries; what is kept stays."""
    new = fx.Graph()
    inside = _placeholders(new, operands)
    count = site.options.order + 1
    results: list[fx.Node] = []
    copies: list[fx.Node] = []
    for i, exit in enumerate(site.region.exits):
        what: Border = exit.meta[BORDER]

        def reuse(run: Tensor, *values: Tensor, dim: int = what.dim) -> list[Tensor]:
            kept, base = values[:count], values[count:]
            again = forecast(kept, run + 1)
            return [_own(_joined(base, dim) + again if base else again), *map(_own, kept)]

        nodes = [site.state["run"], *site.kept(i), *(site.entries[k] for k in what.base)]
        output, *rest = site.trace(reuse, [inside[node] for node in nodes], new)
        results.append(output)
        copies += rest
    new.output((*results, *copies))
    return fx.GraphModule(site.graph, new)


def _compute(site: Site, operands: list[fx.Node], hit: fx.Node) -> fx.GraphModule:
    """Runs the region for all samples; those that reuse all the same get what they would have got."""
    new = fx.Graph()
    outer = _placeholders(new, operands)
    inside = dict(outer)
    for node in site.region.nodes:
        inside[node] = new.node_copy(node, inside.__getitem__)
    count = site.options.order + 1
    results: list[fx.Node] = []
    residuals: list[fx.Node] = []
    for i, exit in enumerate(site.region.exits):
        what: Border = exit.meta[BORDER]
        each = what.batch and site.samples != 1

        def compute(
            z: Tensor, mask: Tensor, run: Tensor, *values: Tensor, dim: int = what.dim, each: bool = each
        ) -> list[Tensor]:
            kept, base = values[:count], values[count:]
            start = _joined(base, dim) if base else None
            fresh = differences(z if start is None else z - start, kept, run + 1)
            if not each:
                return [_own(z), *map(_own, fresh)]
            mask = mask.reshape(-1, *[1] * (z.dim() - 1))
            again = forecast(kept, run + 1)
            again = again if start is None else start + again
            held = [torch.where(mask, old, new) for old, new in zip(kept, fresh, strict=True)]
            return [_own(torch.where(mask, again, z)), *map(_own, held)]

        nodes = [hit, site.state["run"], *site.kept(i), *(site.entries[k] for k in what.base)]
        value = inside[exit.all_input_nodes[0]]
        output, *rest = site.trace(compute, [value, *(outer[node] for node in nodes)], new)
        results.append(output)
        residuals += rest
    new.output((*results, *residuals))
    return fx.GraphModule(site.graph, new)


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
