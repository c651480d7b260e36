"""The sparse variant of a region: which rows its values have, and the graph that computes only those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from ...rewrite import aten
from .rows import Known, Part, Rows, Site, Step, TokensMixed, sizes_of
from .rules import rule_of


def propagate(nodes: Iterable[fx.Node], seeds: Mapping[fx.Node, Rows]) -> tuple[Known, dict[fx.Node, Step]]:
    """Follows rows from the entries of a region through its nodes.

    Args:
        nodes: of the region, in program order.
        seeds: rows of the streams that enter it.

    Returns:
        The rows of all values that have any, and what becomes of each node that reads some. What is not listed is
        computed as in a dense step.

    Raises:
        TokensMixed: a node is not proven to treat each token on its own.
    """
    known, steps = Known(seeds), dict[fx.Node, Step]()
    for node in nodes:
        if all(known.get(operand) is None for operand in node.all_input_nodes):
            continue
        rule = rule_of(node)
        if rule is None:
            raise TokensMixed(node, "there is no proof for this operator that it treats each token on its own")
        step = rule(node, known)
        steps[node] = step
        many = step.out if isinstance(step.out, tuple) else (step.out,)
        if any(rows is not None for rows in many):
            known[node] = step.out
    return known, steps


class Sparse:
    """Writes the sparse variant of a region into a graph.

    Args:
        graph: takes the nodes at its insertion point.
        mode: the fake mode of the region's values.
        index: int64 ``[K]`` or, where samples have chunks of their own, ``[S, K]``: the tokens that are computed.
    """

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode, index: fx.Node) -> None:
        self.graph, self.mode = graph, mode
        self.index = index
        self.count = int(index.meta["val"].shape[-1])
        self._indices: dict[tuple[Part, ...], fx.Node] = {}

    def write(
        self,
        nodes: Iterable[fx.Node],
        steps: Mapping[fx.Node, Step],
        seeds: Mapping[fx.Node, Rows],
        outside: Mapping[fx.Node, fx.Node],
        kept: Mapping[fx.Node, tuple[fx.Node, fx.Node]],
    ) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, tuple[fx.Node, fx.Node]]]:
        """Writes all nodes.

        Args:
            nodes, steps, seeds: as for and from :func:`propagate`.
            outside: the operands of the region in this graph, entries with all their tokens.
            kept: by attention, keys and values of all tokens as they were.

        Returns:
            Each node's twin, and by attention the keys and values of all tokens as they are now.
        """
        inside = dict(outside)
        for entry, rows in seeds.items():
            inside[entry] = self.take(outside[entry], rows)
        fresh: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for node in nodes:
            step = steps.get(node)
            if step is None:
                inside[node] = self.graph.node_copy(node, inside.__getitem__)
                continue
            operands = {operand: self.take(inside[operand], rows) for operand, rows in step.take.items()}
            if step.site is not None:
                site = step.site
                both = tuple(
                    self.put(old, inside[new], site.rows)
                    for old, new in zip(kept[node], (site.key, site.value), strict=True)
                )
                fresh[node] = (both[0], both[1])
                operands |= {site.key: both[0], site.value: both[1]}
            inside[node] = self._twin(node, step, lambda n, own=operands: own.get(n) or inside[n])  # type: ignore[misc]
        return inside, fresh

    def _twin(self, node: fx.Node, step: Step, operand: Callable[[fx.Node], fx.Node]) -> fx.Node:
        args = list(fx.map_arg(node.args, operand))
        for position, size in step.args.items():
            args[position] = size(self.count)
        twin = self._call(node.target, tuple(args), fx.map_arg(node.kwargs, operand), node)
        if isinstance(step.out, Rows):
            wanted = list(sizes_of(node))
            wanted[step.out.dim] = step.out.count(self.count)
            if list(twin.meta["val"].shape) != wanted:
                raise TokensMixed(node, f"its rows give {list(twin.meta['val'].shape)}, expected are {wanted}")
        return twin

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, args, dict(kwargs))
        values = fx.map_arg((args, dict(kwargs)), lambda n: n.meta["val"])
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            node.meta = {**like.meta, "val": target(*values[0], **values[1])}
        return node

    # --- rows of all tokens, and back ---

    def take(self, full: fx.Node, rows: Rows) -> fx.Node:
        """The rows of a value that has all tokens."""
        index = self._index(rows)
        if rows.batch is None:
            return self._call(aten.index_select.default, (full, rows.dim, index), {}, full)
        sizes = list(full.meta["val"].shape)
        missing = max(0, -rows.batch)
        dim, batch = rows.dim + missing, rows.batch + missing
        samples = index.meta["val"].shape[0]
        if missing:
            sizes = [1] * missing + sizes
            full = self._call(aten.reshape.default, (full, list(sizes)), {}, full)
        if sizes[batch] != samples:
            sizes[batch] = samples
            full = self._call(aten.expand.default, (full, list(sizes)), {}, full)
        return self._call(aten.gather.default, (full, dim, self._spread(index, sizes, dim, batch)), {}, full)

    def put(self, full: fx.Node, fresh: fx.Node, rows: Rows) -> fx.Node:
        """A value that has all tokens, with these rows anew."""
        index = self._index(rows)
        if rows.batch is None:
            return self._call(aten.index_copy.default, (full, rows.dim, index, fresh), {}, full)
        spread = self._spread(index, list(full.meta["val"].shape), rows.dim, rows.batch)
        return self._call(aten.scatter.src, (full, rows.dim, spread, fresh), {}, full)

    def _spread(self, index: fx.Node, sizes: list[int], dim: int, batch: int) -> fx.Node:
        """The index for every element of the other dimensions."""
        samples, count = index.meta["val"].shape
        if batch > dim:
            index = self._call(aten.transpose.int, (index, 0, 1), {}, index)
        narrow = [samples if i == batch else count if i == dim else 1 for i in range(len(sizes))]
        wide = [count if i == dim else size for i, size in enumerate(sizes)]
        index = self._call(aten.reshape.default, (index, narrow), {}, index)
        return self._call(aten.expand.default, (index, wide), {}, index)

    def _index(self, rows: Rows) -> fx.Node:
        """The positions along the dimension: those of whole parts, and of gathered parts those that are computed."""
        if rows.parts in self._indices:
            return self._indices[rows.parts]
        if rows.parts == (Part(rows.size, True),):
            return self.index
        found, offset = [], 0
        value = self.index.meta["val"]
        for part in rows.parts:
            if part.gathered:
                found.append(self._call(aten.add.Tensor, (self.index, offset), {}, self.index))
            else:
                args = (offset, offset + part.size)
                run = self._call(aten.arange.start, args, {"dtype": torch.int64, "device": value.device}, self.index)
                if rows.batch is not None:
                    run = self._call(aten.expand.default, (run, [value.shape[0], part.size]), {}, run)
                found.append(run)
            offset += part.size
        self._indices[rows.parts] = self._call(aten.cat.default, (found, -1), {}, self.index)
        return self._indices[rows.parts]


def sites_of(steps: Mapping[fx.Node, Step]) -> list[Site]:
    """The attentions that read keys of all tokens, in program order."""
    return [step.site for step in steps.values() if step.site is not None]
