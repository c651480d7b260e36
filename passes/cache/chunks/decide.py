"""Which chunks a step computes. Plain traceable torch; ``S`` samples (or one decision for all), ``C`` chunks.

The blocks' result for a chunk is expected to go on changing as it did between the last two times that it was computed
(the output's change of RAS, 2502.10389, and RegionE, 2510.25590). The latent itself says nothing: it moves along the
velocity, at the same pace everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .grid import Grid

State = Mapping[str, Tensor]

CHUNK_STATE = ("change", "waited", "score")
"""State of every chunk, float32 ``[S, C]``: part by which the result last changed in a step, steps since it was
computed, and the number that the last step decided by."""


def capacity(part: float, chunks: int) -> int:
    """How many chunks a part of all is, rounded up."""
    return min(chunks, math.ceil(part * chunks - 1e-9))


def decide(
    state: State, controls: Mapping[str, Tensor], finite: Tensor, capacities: Sequence[int], chunks: int
) -> dict[str, Tensor]:
    """What a step computes.

    Args:
        state: ``step`` float32 ``[S]`` and :data:`CHUNK_STATE`.
        controls: the numbers of :class:`ChunkOptions`, each a scalar.
        finite: bool, whether what enters the region holds neither NaN nor infinity.
        capacities: numbers of chunks, rising, that there is a program for.
        chunks: number of all.

    Returns:
        ``dense``, bool: whether all is computed; ``fits.i``, bool: whether the i-th capacity is enough; ``order``
        int64 ``[S, C]``: chunks, most urgent first; ``computed`` bool ``[S, C]`` and ``active`` bool ``[S, C]``:
        which are computed, and which had to be; ``score`` ``[S, C]``.
    """
    step = state["step"]
    score = state["change"] * torch.exp(controls["age"] * state["waited"])
    active = score > controls["threshold"]
    most = active.sum(1).max()
    late = (controls["steps"] > 0) & (step >= controls["steps"] - controls["last"])
    again = (controls["reset"] > 0) & (torch.remainder(step, controls["reset"].clamp(min=1)) == 0)
    # before the second step nothing is known of changes
    start = step < controls["warmup"].clamp(min=2)
    dense = (start | late | again).any() | ~finite | ~score.isfinite().all() | (most > capacities[-1])
    order = score.argsort(1, descending=True)
    found = {f"fits.{i}": most <= count for i, count in enumerate(capacities[:-1])}
    room = torch.full_like(most, capacities[-1])
    for i in reversed(range(len(capacities) - 1)):
        room = torch.where(found[f"fits.{i}"], capacities[i], room)
    room = torch.where(dense, chunks, room)
    computed = order.argsort(1) < room
    return {"dense": dense, **found, "order": order, "computed": computed, "active": active | dense, "score": score}


def settle(state: State, computed: Tensor, score: Tensor, grid: Grid, new: Tensor, old: Tensor) -> dict[str, Tensor]:
    """The state of chunks after a step.

    Args:
        state: before it, as for :func:`decide`.
        computed, score: from :func:`decide`.
        grid: of the tokens.
        new, old: what the blocks added to each token, after the step and before: ``[S, tokens, ...]``.
    """

    def magnitude(x: Tensor) -> Tensor:
        return x.flatten(2).abs().float().mean(-1)

    gap = state["waited"] + 1
    change = grid.mean(magnitude(new - old)) / gap / magnitude(new).mean(1, keepdim=True)
    return {
        "step": state["step"] + 1,
        "change": torch.where(computed, change, state["change"]),
        "waited": torch.where(computed, 0.0, gap),
        "score": score.clone(),
    }
