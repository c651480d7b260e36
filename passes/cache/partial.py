"""Partial hits: a branch that computes those samples of a batch that do not reuse, and only those.

Their rows are gathered from everything that the region reads, the region runs on them, and its results go back to
their places. A program has such branches for 1, 2, 4, ... samples, all compiled with it, so nothing is compiled later;
where fewer are missing than there is room for, samples that reuse fill it up, and what is computed for them is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from ..capture import fake_mode_of
from ..rewrite import aten, facts_of, input_of
from ..trace import trace_here
from .branches import BODY, Branches
from .rows import Layout, Mixed, Rows, Walk, argument, packet, sizes
from .state import PART, Site

Partial = tuple[tuple[int, fx.GraphModule], ...]


def on_fewer(site: Site, branches: Branches, hit: fx.Node) -> tuple[Partial, str]:
    """Branches like ``branches.compute`` by how many samples they have room for, and what a report says about them.

    There are none where decisions are not the samples' own, or where the region is not proven to treat samples one by
    one; the report says which operator is in the way.
    """
    if not site.batch or site.samples == 1:
        return (), "one decision for the whole batch"
    if not isinstance(site.samples, int) or _symbolic(branches.compute):
        return (), "all samples are computed unless all reuse: sizes are known at the call only"
    walk, why = _prove(site, branches, named=False)
    if why is not None:
        walk, why = _prove(site, branches, named=True)
    if why is not None:
        return (), f"all samples are computed unless all reuse: {why}"
    inner = branches.compute.graph.find_nodes(op="placeholder")
    position = branches.operands.index(hit)
    rooms = [2**i for i in range(site.samples.bit_length()) if 2**i < site.samples]
    made = tuple((room, _Fewer(branches.compute, walk, inner[position], room).build()) for room in rooms)
    return made, f"samples that reuse are not computed: {', '.join(map(str, rooms))} or {site.samples} run"


def _symbolic(branch: fx.GraphModule) -> bool:
    values = (node.meta.get("val") for node in branch.graph.nodes)
    return any(isinstance(size, torch.SymInt) for v in values if isinstance(v, Tensor) for size in v.shape)


def _prove(site: Site, branches: Branches, named: bool) -> tuple[Walk, str | None]:
    """A walk through the graph and the region, and why its results are not made sample by sample, if so.

    That an input begins with rows of samples is only supposed: whatever it really holds, operators that go through it
    row by row, in step with the samples, may be given some of its rows, and others would be found.

    Args:
        site: the guard.
        branches: of the guard.
        named: suppose it of inputs alone whose first axis the structure analysis calls the batch; else of all that
            are as long as the batch.
    """
    walk = Walk(site.samples, {})
    for node in site.graph.graph.find_nodes(op="placeholder"):
        walk.layouts[node] = Rows(0) if _has_rows(node, site.samples, named) else None
    walk.run(site.graph.graph.nodes)
    inner = branches.compute.graph.find_nodes(op="placeholder")
    walk.layouts |= {node: walk.layouts[operand] for node, operand in zip(inner, branches.operands, strict=True)}
    body = [node for node in branches.compute.graph.nodes if node.meta.get(PART) == BODY]
    walk.run(body)
    ends = [node for node in body if any(user.meta.get(PART) != BODY for user in node.users)]
    found = (_obstacle(walk.layouts[node], node) for node in ends)
    return walk, next((str(why) for why in found if why is not None), None)


def _has_rows(node: fx.Node, samples: int, named: bool) -> bool:
    value = node.meta["val"]
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != samples or input_of(node).kind != "data":
        return False
    facts = facts_of(node)
    return not named or (facts is not None and bool(facts.axes) and facts.axes[0] == "batch")


def _obstacle(layout: Layout, node: fx.Node) -> Layout | str:
    if layout == Rows(0) or isinstance(layout, Mixed):
        return layout if isinstance(layout, Mixed) else None
    return f"{node.name} does not begin with one row for each sample"


class _Fewer:
    """One branch in the making: a copy of ``branch`` whose body has ``room`` samples."""

    def __init__(self, branch: fx.GraphModule, walk: Walk, hit: fx.Node, room: int) -> None:
        self.branch, self.walk, self.hit, self.room = branch, walk, hit, room
        self.mode = fake_mode_of(branch)
        self.new = fx.Graph()
        self.full: dict[fx.Node, fx.Node] = {}
        """Of each node of the branch its copy for all samples."""
        self.few: dict[fx.Node, fx.Node] = {}
        """And its copy for those that run."""

    def build(self) -> fx.GraphModule:
        """The branch, with the same operands and results."""
        for node in self.branch.graph.find_nodes(op="placeholder"):
            self.full[node] = self.new.node_copy(node)
        self.rows, self.places = self._trace(self._choose, self.full[self.hit])
        for node in self.branch.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.meta.get(PART) == BODY:
                self.few[node] = self._resized(node)
            else:
                self.full[node] = self.new.node_copy(node, self._whole)
                self._keep_meta(node)
        self.new.output(tuple(self._whole(node) for node in self.branch.graph.output_node().args[0]))  # type: ignore[union-attr, arg-type]
        return fx.GraphModule(self.branch, self.new)

    def _choose(self, hit: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the samples that run, those that must first, and the place of each sample among them."""
        order = hit.to(torch.int32).argsort(stable=True)
        return order[: self.room], order.argsort().clamp(max=self.room - 1)

    def _trace(self, run: Any, *operands: fx.Node) -> Any:
        return trace_here(self.new, self.mode, run, operands, {PART: "branch"})

    def _keep_meta(self, node: fx.Node) -> None:
        """References from node to node go along."""
        self.full[node].meta = {k: self._whole(v) if isinstance(v, fx.Node) else v for k, v in node.meta.items()}

    def _whole(self, node: fx.Node) -> fx.Node:
        """A value for all samples: results of the body go back to their places."""
        if node not in self.full:
            self.full[node] = self._trace(lambda z, places: z.index_select(0, places), self.few[node], self.places)
        return self.full[node]

    def _some(self, node: fx.Node) -> fx.Node:
        """A value for the samples that run: their rows of an operand."""
        if node not in self.few:
            layout = self.walk.layouts[node]
            assert not isinstance(layout, Mixed)
            self.few[node] = self.full[node] if layout is None else self._gather(node, layout)
        return self.few[node]

    def _gather(self, node: fx.Node, layout: Rows) -> fx.Node:
        samples, at = self.walk.samples, layout.dim

        def gather(x: Tensor, rows: Tensor) -> Tensor:
            each = x.reshape(*x.shape[:at], samples, layout.inner, *x.shape[at + 1 :]) if layout.inner > 1 else x
            chosen = each.index_select(at, rows)
            return chosen.flatten(at, at + 1) if layout.inner > 1 else chosen

        found: fx.Node = self._trace(gather, self.full[node], self.rows)
        return found

    def _resized(self, node: fx.Node) -> fx.Node:
        """A copy of a node of the body for fewer samples, with its value."""
        if node.op == "get_attr":
            return self.new.node_copy(node)
        copy = self.new.node_copy(node, self._some)
        layout = self.walk.layouts[node]
        if isinstance(layout, Rows):
            _resize(copy, node, layout, self.room)
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            args, kwargs = fx.node.map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
            copy.meta["val"] = copy.target(*args, **kwargs)  # type: ignore[operator]
        wanted = list(sizes(node))
        if isinstance(layout, Rows):
            wanted[layout.dim] = self.room * layout.inner
        if list(sizes(copy)) != wanted:
            raise AssertionError(f"{node.name} has {sizes(copy)} for {self.room} samples, {wanted} is right")
        return copy


_SIZED = {aten.expand: "size", aten.repeat: "repeats"} | dict.fromkeys(
    (aten.zeros, aten.ones, aten.full, aten.empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty), "size"
)
_SHAPED = (aten.reshape, aten.view, aten._unsafe_view, aten.flatten, aten.unflatten, aten._reshape_alias)


def _resize(copy: fx.Node, node: fx.Node, layout: Rows, room: int) -> None:
    """Rewrites the sizes that a call names."""
    size = room * layout.inner
    op = packet(node)
    if op in _SHAPED:
        wanted = list(sizes(node))
        wanted[layout.dim] = size
        copy.target, copy.args, copy.kwargs = aten.reshape.default, (copy.args[0], wanted), {}
    elif op in _SIZED:
        given: Sequence[Any] = argument(node, _SIZED[op])
        was = sizes(node)[layout.dim]
        at = layout.dim
        # a repetition of samples is named as such, any other size as it is
        number = room if op is aten.repeat and given[at] != 1 else size
        if given[at] not in (-1, 1) or (was != 1 and op is not aten.repeat):
            _set(copy, _SIZED[op], [*given[:at], number if given[at] != -1 else -1, *given[at + 1 :]])
    elif op is aten.repeat_interleave and argument(node, "output_size") is not None:
        copy.kwargs = {k: v for k, v in copy.kwargs.items() if k != "output_size"}


def _set(node: fx.Node, name: str, value: Any) -> None:
    names = [parameter.name for parameter in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if name in node.kwargs or position >= len(node.args):
        node.kwargs = {**node.kwargs, name: value}
    else:
        node.args = (*node.args[:position], value, *node.args[position + 1 :])
