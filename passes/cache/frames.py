"""Where the frames of a video stand in a stream of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..rewrite import facts_of
from ..structure import Stream, Structure

FRAMES = "frames"
"""What the structure analysis calls the axis of a grid that time goes along."""


@dataclass(frozen=True)
class Frames:
    """Where a video's frames are in the main stream: ``count`` of ``size`` positions each along ``dim``, from
    position ``start`` on."""

    dim: int
    start: int
    count: int
    size: int

    def apart(self, x: Tensor) -> Tensor:
        """``x`` with the frames in a dimension of their own, ``dim``, and each frame's positions behind it."""
        own = x.narrow(self.dim, self.start, self.count * self.size)
        return torch.unflatten(own, self.dim, (self.count, self.size))


def find_frames(structure: Structure, node: fx.Node, stream: Stream) -> Frames | None:
    """The frames in a node of ``stream``; ``None`` where it has none, or their number depends on the call.

    They are known where tokens are counted frame by frame, the slowest axis of a grid, or have a dimension of their
    own.
    """
    facts = facts_of(node)
    axis = structure.token_axis
    sizes = tuple(node.meta["val"].shape)
    if facts is None or axis is None or len(facts.axes) != len(sizes):
        return None
    for dim, name in enumerate(facts.axes):
        if name == FRAMES and isinstance(sizes[dim], int) and sizes[dim] > 1:
            return Frames(dim, 0, sizes[dim], 1)
    if not axis.sub_axes or axis.sub_axes[0].name != FRAMES or facts.axes.count("tokens") != 1:
        return None
    dim, count = facts.axes.index("tokens"), axis.sub_axes[0].size
    known = {tokens.name: tokens.size for tokens in structure.tokens}
    if axis.name not in stream.tokens or not all(name in known for name in stream.tokens):
        return None
    start = sum(known[name] for name in stream.tokens[: stream.tokens.index(axis.name)])
    whole = sum(known[name] for name in stream.tokens)
    if not isinstance(sizes[dim], int) or sizes[dim] != whole or count < 2 or axis.size % count:
        return None
    return Frames(dim, start, count, axis.size // count)
