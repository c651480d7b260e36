"""The grid of the latent's tokens, and where they are in the streams of a region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...errors import PassError
from ...rewrite import facts_of
from ...structure import Structure
from ...structure.ops import shape
from .options import ChunkOptions, check_box
from .rows import Part, Rows


class NoGrid(Exception):  # noqa: N818 - no fault: an outcome of the analysis
    """It is not proven which token is where in the latent."""


@dataclass(frozen=True)
class Grid:
    """Tokens of a latent in boxes. ``sizes`` and ``box`` count tokens along (frames,) height and width."""

    sizes: tuple[int, ...]
    box: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return math.prod(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(size // part for size, part in zip(self.sizes, self.box, strict=True))

    @property
    def chunks(self) -> int:
        """Chunks of a sample."""
        return math.prod(self.shape)

    def _apart(self) -> list[int]:
        return [n for pair in zip(self.shape, self.box, strict=True) for n in pair]

    def members(self, device: torch.device) -> Tensor:
        """The tokens of each chunk: int64 ``[chunks, tokens in a chunk]``."""
        axes = range(len(self.sizes))
        order = [2 * i for i in axes] + [2 * i + 1 for i in axes]
        tokens = torch.arange(self.tokens, device=device).reshape(self._apart())
        return tokens.permute(order).reshape(self.chunks, -1)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every chunk: ``[S, tokens]`` to ``[S, chunks]``."""
        inner = [2 * i + 2 for i in range(len(self.sizes))]
        return x.reshape(x.shape[0], *self._apart()).mean(inner).flatten(1)


def find_grid(structure: Structure, entries: Sequence[fx.Node], options: ChunkOptions) -> Grid:
    """The grid of the main tokens, as the graph shows it or, where they arrive packed, as the plan says.

    Raises:
        NoGrid: the graph does not show it, and the plan does not say it.
        PassError: the box does not tile it, or the plan says another grid than the graph.
    """
    axis = structure.token_axis
    if axis is None:
        raise NoGrid("there is no token axis")
    runs = [run for entry in entries if (facts := facts_of(entry)) for run in facts.runs if run.name == axis.name]
    if not runs:
        raise NoGrid(f"no stream in front of the blocks consists of {axis.name}'s tokens")
    shown = {tuple(part.size for part in run.grid) for run in runs}
    if shown == {()}:
        if not options.grid:
            raise NoGrid(
                f"the graph does not show which of the {axis.size} tokens of {axis.name} is where: "
                "chunks = { grid = [frames, height, width] } says it, in tokens, row by row"
            )
        shown = {options.grid}
    elif len(shown) > 1:
        raise NoGrid(f"the tokens of {axis.name} come in different orders")
    (sizes,) = shown
    if options.grid and options.grid != sizes:
        raise PassError(f"chunks.grid={list(options.grid)}, but the graph shows {list(sizes)}: leave it out")
    if math.prod(sizes) != runs[0].size:
        raise PassError(f"chunks.grid={list(sizes)} has {math.prod(sizes)} tokens, the graph has {runs[0].size}")
    try:
        check_box(sizes, options.box)
    except ValueError as error:
        raise PassError(f"chunks: {error}") from None
    return Grid(sizes, options.box)


def seeds_of(structure: Structure, entries: Sequence[fx.Node], batch: int | None) -> dict[fx.Node, Rows]:
    """The rows of the streams that hold main tokens.

    Args:
        structure: names them.
        entries: the streams.
        batch: the dimension that counts samples, or ``None`` where they share their chunks.

    Raises:
        NoGrid: a stream's dimension of tokens is not known.
    """
    axis = structure.token_axis
    assert axis is not None
    found: dict[fx.Node, Rows] = {}
    for entry in entries:
        facts, sizes = facts_of(entry), shape(entry)
        if facts is None or sizes is None:
            raise NoGrid(f"nothing is known about {entry.name}")
        if not all(isinstance(size, int) for size in entry.meta["val"].shape):
            # a gather of fixed size is what keeps the branches from being compiled anew
            raise NoGrid(f"sizes of {entry.name} are symbolic: compile with dynamic=False")
        parts = tuple(Part(run.size, run.name == axis.name) for run in facts.runs)
        if not any(part.gathered for part in parts):
            if not facts.runs or any(run.name == "" for run in facts.runs):
                raise NoGrid(f"it is not known which tokens {entry.name} holds")
            continue
        dims = [i for i, name in enumerate(facts.axes) if name == "tokens"]
        if len(dims) != 1 or sizes[dims[0]] != sum(part.size for part in parts):
            raise NoGrid(f"it is not known which dimension of {entry.name} holds tokens")
        found[entry] = Rows(dims[0], batch, parts)
    return found
