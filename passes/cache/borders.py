"""Borders: marks on the edges of a region that other passes leave alone.

Regions are chosen from the structure, whose facts name nodes of the captured graph. Rewrites replace those nodes, so
the edges are marked before them, with an operator that no pattern matches, and the region is cut out after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from ..rewrite import aten, calls, new_call
from .frames import Frames

BORDER = "ditc_border"
"""Key in a border node's ``meta`` of its :class:`Border`."""

MAIN = "ditc_main"
"""Key in an entry's ``meta``: whether it is the stream with the main tokens."""

Kind = Literal["source", "entry", "indicator", "place", "exit"]


@dataclass(frozen=True)
class Border:
    """What a border node stands for.

    Attributes:
        kind: ``entry`` and ``exit`` of the region; the ``source`` is what the front blocks start from, the
            ``indicator`` what a policy looks at in front of the region, a ``place`` inside of it.
        batch: whether dimension 0 counts samples, so that each can have a decision of its own.
        base: of an exit: positions of the entries that it is a residual to, joined along ``dim``; empty where it is
            none.
        dim: see ``base``.
        place: of what a policy looks at inside: the main stream behind so many blocks of the region; 0 is an entry.
        frames: of a place, where it has any.
    """

    kind: Kind
    batch: bool = True
    base: tuple[int, ...] = ()
    dim: int = 0
    place: int | None = None
    frames: Frames | None = None


@torch.library.custom_op("ditc::border", mutates_args=())
def border(x: Tensor) -> Tensor:
    """A copy of ``x``: the edge of a region, gone before anything is compiled."""
    return x.clone()


@border.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def mark(graph: fx.GraphModule, node: fx.Node, what: Border) -> fx.Node:
    """Puts a border behind ``node``, between it and all its users."""
    with graph.graph.inserting_after(node):
        found = new_call(graph, node, torch.ops.ditc.border.default, (node,))
    found.meta = {**found.meta, BORDER: what, "val": node.meta["val"]}
    node.replace_all_uses_with(found, delete_user_cb=lambda user: user is not found)
    return found


def straighten(graph: fx.GraphModule) -> None:
    """Makes what borders look at contiguous in front of them.

    A stream that a convolution embedded is often a transposed view of its result, and sums with it stay transposed.
    Inside of one graph a compiler chooses another layout; across the edges of a region values have the strides that
    the graph says, and every part would pay for these.
    """
    for node in calls(graph, torch.ops.ditc.border.default):
        seen = node.all_input_nodes[0]
        if node.meta[BORDER].kind == "exit" or seen.target is node.target or seen.meta["val"].is_contiguous():
            continue
        with graph.graph.inserting_before(node):
            copy = new_call(graph, seen, aten.clone.default, (seen,), memory_format=torch.contiguous_format)
        copy.meta["val"] = seen.meta["val"]
        node.replace_input_with(seen, copy)


def borders(graph: fx.GraphModule, kind: Kind) -> list[fx.Node]:
    """The borders of one kind, in the order in which they were marked."""
    return [node for node in calls(graph, torch.ops.ditc.border.default) if node.meta[BORDER].kind == kind]


def remove_borders(graph: fx.GraphModule) -> int:
    """Takes all borders out again."""
    found = calls(graph, torch.ops.ditc.border.default)
    for node in found:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.graph.erase_node(node)
    return len(found)
