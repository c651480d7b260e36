"""The branches of chunks: all tokens, or those of as many chunks as a capacity holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from ..borders import BORDER, Border
from ..branches import _joined, _own, _placeholders
from .sparse import Sparse
from .state import Chunked

_COND = torch.ops.higher_order.cond


def branch(site: Chunked, decided: Mapping[str, fx.Node]) -> tuple[list[fx.Node], dict[str, fx.Node]]:
    """Adds the ``cond`` at the current insertion point: the exits' values, and what is kept from now on."""
    graph = site.graph.graph
    fits = [decided[f"fits.{i}"] for i in range(len(site.capacities) - 1)]
    kept = [site.state[name] for name in site.kept]
    operands = list(dict.fromkeys([*fits, decided["order"], *kept, *site.entries, *site.region.operands]))
    sparse = _chain(site, operands, decided["order"], fits, 0)
    names = []
    for kind, module in (("dense", _dense(site, operands)), ("sparse", sparse)):
        setattr(site.graph, f"chunks_{kind}", module)
        names.append(graph.get_attr(f"chunks_{kind}"))
    chosen = graph.call_function(_COND, (decided["dense"], *names, tuple(operands)))
    items = []
    for i, like in enumerate([*(exit.all_input_nodes[0] for exit in site.region.exits), *kept]):
        item = graph.call_function(operator.getitem, (chosen, i))
        value = like.meta["val"]
        with site.mode:
            item.meta["val"] = value.new_empty((value.numel(),))
        shape = tuple(value.shape)
        items.append(site.trace(lambda flat, shape=shape: flat.reshape(shape), [item]))
    exits = len(site.region.exits)
    return items[:exits], dict(zip(site.kept, items[exits:], strict=True))


def _chain(site: Chunked, operands: list[fx.Node], order: fx.Node, fits: list[fx.Node], i: int) -> fx.GraphModule:
    """The branch of the ``i``-th capacity, or of a later one where that is not enough."""
    here = _sparse(site, operands, order, site.capacities[i])
    if i == len(site.capacities) - 1:
        return here
    new = fx.Graph()
    inside = _placeholders(new, operands)
    names = [new.get_attr("enough"), new.get_attr("more")]
    chosen = new.call_function(_COND, (inside[fits[i]], *names, tuple(inside[node] for node in operands)))
    count = len(site.region.exits) + len(site.kept)
    new.output(tuple(new.call_function(operator.getitem, (chosen, k)) for k in range(count)))
    return fx.GraphModule({"enough": here, "more": _chain(site, operands, order, fits, i + 1)}, new)


def _dense(site: Chunked, operands: list[fx.Node]) -> fx.GraphModule:
    """Runs the region for all tokens, and keeps what a sparse step will need of them."""
    new = fx.Graph()
    inside = _placeholders(new, operands)
    for node in site.region.nodes:
        inside[node] = new.node_copy(node, inside.__getitem__)
    results, kept = [], []
    for exit in site.region.exits:
        value = inside[exit.all_input_nodes[0]]
        results.append(site.trace(_own, [value], new))
        if exit in site.exits:
            base, join = _base(site, exit, inside)

            def residual(z: Tensor, *parts: Tensor, join: Callable[..., Tensor] = join) -> Tensor:
                return _own(z - join(*parts) if parts else z)

            kept.append(site.trace(residual, [value, *base], new))
    for attention in site.sites:
        kept += [site.trace(_own, [inside[node]], new) for node in (attention.key, attention.value)]
    new.output((*results, *kept))
    return fx.GraphModule(site.graph, new)


def _sparse(site: Chunked, operands: list[fx.Node], order: fx.Node, count: int) -> fx.GraphModule:
    """Runs the region for the tokens of the ``count`` most urgent chunks; the others stay as they were."""
    new = fx.Graph()
    inside = _placeholders(new, operands)
    index = site.trace(lambda o: _tokens(site, o, count), [inside[order]], new)
    sparse = Sparse(new, site.mode, index)
    kept = {name: inside[site.state[name]] for name in site.kept}
    old = {s.node: (kept[f"site.{i}.key"], kept[f"site.{i}.value"]) for i, s in enumerate(site.sites)}
    twins, fresh = sparse.write(site.region.nodes, site.steps, site.seeds, inside, old)
    results: list[fx.Node] = []
    residuals: list[fx.Node] = []
    for exit in site.region.exits:
        value, rows = twins[exit.all_input_nodes[0]], site.exits.get(exit)
        if rows is None:
            results.append(site.trace(_own, [value], new))
            continue
        parts, join = _base(site, exit, inside)
        before = kept[f"exit.{len(residuals)}"]
        if not parts:
            everything = now = sparse.put(before, value, rows)
        else:
            base = site.trace(join, parts, new)
            added = site.trace(torch.sub, [value, sparse.take(base, rows)], new)
            now = sparse.put(before, added, rows)
            everything = site.trace(torch.add, [base, now], new)
        residuals.append(site.trace(_own, [now], new))
        results.append(site.trace(_own, [everything], new))
    for attention in site.sites:
        residuals += [site.trace(_own, [node], new) for node in fresh[attention.node]]
    new.output((*results, *residuals))
    return fx.GraphModule(site.graph, new)


def _base(
    site: Chunked, exit: fx.Node, inside: Mapping[fx.Node, fx.Node]
) -> tuple[list[fx.Node], Callable[..., Tensor]]:
    """The entries that an exit is a residual to, and how they are joined."""
    what: Border = exit.meta[BORDER]
    return [inside[site.entries[k]] for k in what.base], lambda *parts: _joined(parts, what.dim)


def _tokens(site: Chunked, order: Tensor, count: int) -> Tensor:
    """The tokens of the first ``count`` chunks of each sample: ``[S, K]``, or ``[K]`` where there is one."""
    chunks = order[:, :count].sort(1).values
    members = site.grid.members(order.device)
    tokens = members.index_select(0, chunks.reshape(-1)).reshape(order.shape[0], -1)
    return tokens if site.samples > 1 else tokens[0]
