"""The branches of a guard: what is kept is reused, or the region computes and something is kept."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .borders import BORDER, Border
from .decide import Decision
from .forecast import differences, forecast
from .policy import Seen
from .state import PART, Site
from .storage import Storage

OWNED = "ditc_owned"
"""Key in the ``meta`` of a branch's result: the node, in the branch, whose values it holds in a vector of its own."""

BODY = "body"
"""What :data:`.state.PART` says of the region's nodes inside of the branch that computes."""


@dataclass(frozen=True)
class Branches:
    """A ``cond`` and what it chooses between.

    Attributes:
        cond: the call.
        reuse, compute: the branches; each returns the exits' values, then the state that :attr:`.Site.held` names.
        exits, kept: these results behind the ``cond``, in their shapes.
    """

    cond: fx.Node
    reuse: fx.GraphModule
    compute: fx.GraphModule
    exits: tuple[fx.Node, ...]
    kept: tuple[fx.Node, ...]

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """What both branches take, in order."""
        found: tuple[fx.Node, ...] = self.cond.args[3]  # type: ignore[assignment]
        return found


def branch(site: Site, decided: Decision) -> Branches:
    """Adds the ``cond`` at the current insertion point."""
    graph = site.graph.graph
    exits = len(site.region.exits)
    kept = [site.state[name] for name in site.held]
    operands = list(dict.fromkeys([decided.hit, site.state["run"], *kept, *site.entries, *site.region.operands]))
    operands += [node for node, _ in site.places if node not in {*operands, *site.region.nodes}]
    modules = {"reuse": _reuse(site, operands), "compute": _compute(site, operands, decided.hit)}
    names = []
    for kind, module in modules.items():
        setattr(site.graph, f"cache_{kind}", module)
        names.append(graph.get_attr(f"cache_{kind}"))
    cond = graph.call_function(torch.ops.higher_order.cond, (decided.everyone, *names, tuple(operands)))
    items = []
    for i, like in enumerate([*site.region.exits, *kept]):
        item = graph.call_function(operator.getitem, (cond, i))
        size = like.meta["val"].numel()
        with like.meta["val"].fake_mode:
            item.meta = {"val": like.meta["val"].new_empty((size,)), PART: "branch"}

        stored = site.storage(i) if i < exits else None

        def shaped(flat: Tensor, part: Tensor, stored: Storage | None = stored) -> Tensor:
            return flat.reshape(part.shape if stored is None else stored.sizes(part))

        items.append(site.trace("branch", shaped, [item, site.kept(i)[0] if i < exits else like]))
    for node in (cond, *names):
        node.meta[PART] = "branch"
    return Branches(cond, **modules, exits=tuple(items[:exits]), kept=tuple(items[exits:]))


def _reuse(site: Site, operands: list[fx.Node]) -> fx.GraphModule:
    """Adds what is kept to the entries; what is kept stays."""
    new = fx.Graph()
    inside = _placeholders(new, operands)
    results: list[fx.Node] = []
    for i, exit in enumerate(site.region.exits):
        what: Border = exit.meta[BORDER]

        stored, count = site.storage(i), len(site.kept(i))

        def reuse(
            run: Tensor, *values: Tensor, dim: int = what.dim, stored: Storage = stored, count: int = count
        ) -> Tensor:
            kept, base = stored.read(values[:count]), values[count:]
            again = forecast(kept, run + 1)
            return _joined(base, dim) + again if base else again

        nodes = [site.state["run"], *site.kept(i), *(site.entries[k] for k in what.base)]
        results.append(site.trace("branch", reuse, [inside[node] for node in nodes], new))
    return _finish(site, new, results, [inside[site.state[name]] for name in site.held])


def _compute(site: Site, operands: list[fx.Node], hit: fx.Node) -> fx.GraphModule:
    """Runs the region for all samples; those that reuse all the same get what they would have got."""
    new = fx.Graph()
    outer = _placeholders(new, operands)
    inside = dict(outer)
    for node in site.region.nodes:
        inside[node] = new.node_copy(node, inside.__getitem__)
        inside[node].meta = {**node.meta, PART: BODY}
    results: list[fx.Node] = []
    kept: list[fx.Node] = []
    for i, exit in enumerate(site.region.exits):
        what: Border = exit.meta[BORDER]
        each = what.batch and site.samples != 1

        stored, count = site.storage(i), len(site.kept(i))

        def compute(
            z: Tensor,
            mask: Tensor,
            run: Tensor,
            *values: Tensor,
            dim: int = what.dim,
            each: bool = each,
            stored: Storage = stored,
            count: int = count,
        ) -> list[Tensor]:
            old, base = stored.read(values[:count]), values[count:]
            start = _joined(base, dim) if base else None
            fresh = stored.write(differences(z if start is None else z - start, old, run + 1))
            if not each:
                return [z, *fresh]
            again = forecast(old, run + 1)
            again = again if start is None else start + again
            held = [_pick(mask, before, now) for before, now in zip(values[:count], fresh, strict=True)]
            return [_pick(mask, again, z), *held]

        nodes = [hit, site.state["run"], *site.kept(i), *(site.entries[k] for k in what.base)]
        value = inside[exit.all_input_nodes[0]]
        output, *rest = site.trace("branch", compute, [value, *(outer[node] for node in nodes)], new)
        results.append(output)
        kept += rest
    kept += _look(site, new, outer, [inside[node] for node, _ in site.places], hit)
    return _finish(site, new, results, kept)


def _look(site: Site, new: fx.Graph, outer: dict[fx.Node, fx.Node], at: list[fx.Node], hit: fx.Node) -> list[fx.Node]:
    """What a policy remembers of the values ``at`` its places, and the numbers that it measures there."""
    half = site.inside
    if half is None:
        return []
    places, count, each = len(at), len(site.looked), site.batch and site.samples != 1
    frames = site.places[-1][1]

    def look(mask: Tensor, run: Tensor, *values: Tensor) -> list[Tensor]:
        before, numbers = values[places : places + count], values[places + count :]
        now = half.looked(values[:places])
        seen = Seen(site.batch, run)
        found = half.measure(seen, now, before, run + 1, frames)
        fresh = [*now, *(found[name] for name in half.numbers)]
        return [_pick(mask, a, b) for a, b in zip((*before, *numbers), fresh, strict=True)] if each else fresh

    nodes = [hit, site.state["run"]]
    held = [*site.looked, *(site.state[name] for name in half.numbers)]
    found: list[fx.Node] = site.trace(
        "branch", look, [*(outer[node] for node in nodes), *at, *(outer[node] for node in held)], new
    )
    return found


def _pick(hit: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """``old`` for samples that hit, ``new`` for the others."""
    return torch.where(hit.reshape(-1, *[1] * (new.dim() - 1)), old, new)


def _finish(site: Site, new: fx.Graph, results: list[fx.Node], kept: list[fx.Node]) -> fx.GraphModule:
    """Makes the values of ``results`` and ``kept`` what a branch returns."""
    returned = []
    for node in (*results, *kept):
        returned.append(site.trace("branch", _own, [node], new))
        returned[-1].meta[OWNED] = node
    new.output(tuple(returned))
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
