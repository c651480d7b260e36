"""Policies that look inside of the region, at what its blocks make: that exists on computed steps alone.

What is measured there are numbers, and the next step's decision goes by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .frames import Frames
from .policy import Controls, Seen, State


class Inside(Protocol):
    """The half of a policy that runs inside of the region.

    ``numbers`` names what it measures: vectors of the policy's state, which its ``decide`` and ``settle`` read and
    nobody else writes. They stay as they are for samples that are reused.
    Places are where the main stream can be looked at: 0 in front of the region's first block, i behind its i-th.
    """

    numbers: ClassVar[tuple[str, ...]]

    def places(self, sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The places it looks at, given the shapes of the stream at all of them."""

    def looked(self, at: Sequence[Tensor]) -> list[Tensor]:
        """What it remembers of the values at its places, in their shapes and dtypes."""

    def measure(
        self, seen: Seen, now: Sequence[Tensor], before: Sequence[Tensor], gap: Tensor, frames: Frames | None
    ) -> State:
        """The numbers, float32 ``[S]``.

        Args:
            seen: what means and changes are taken by.
            now, before: what is remembered of this step, and of the computed step ``gap`` (``[S]``) steps ago.
            gap: see there.
            frames: of the values, where they have any.
        """


class AllBlocks:
    """Mean over all blocks of the relative change of their outputs."""

    numbers: ClassVar[tuple[str, ...]] = ("change",)

    def places(self, sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(range(1, len(sizes)))

    def looked(self, at: Sequence[Tensor]) -> list[Tensor]:
        return list(at)

    def measure(
        self, seen: Seen, now: Sequence[Tensor], before: Sequence[Tensor], gap: Tensor, frames: Frames | None
    ) -> State:
        changes = [seen.change(a, b) for a, b in zip(now, before, strict=True)]
        return {"change": torch.stack(changes).mean(0)}


class MiddleBlock:
    """How fast what the middle block adds is changing, and how much it differs from frame to frame."""

    numbers: ClassVar[tuple[str, ...]] = ("rate", "difference")

    def places(self, sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        fitting = [i for i in range(1, len(sizes)) if sizes[i] == sizes[i - 1]]
        if not fitting:
            return ()
        middle = min(fitting, key=lambda i: abs(2 * i - len(sizes)))
        return (middle - 1, middle)

    def looked(self, at: Sequence[Tensor]) -> list[Tensor]:
        return [at[1] - at[0]]

    def measure(
        self, seen: Seen, now: Sequence[Tensor], before: Sequence[Tensor], gap: Tensor, frames: Frames | None
    ) -> State:
        rate = seen.change(now[0], before[0]) / gap
        if frames is None:
            return {"rate": rate, "difference": torch.full_like(rate, -1.0)}
        apart, dim = frames.apart(now[0]), frames.dim
        later, earlier = apart.narrow(dim, 1, frames.count - 1), apart.narrow(dim, 0, frames.count - 1)
        difference = seen.mean(later - earlier) / (seen.mean(later) + seen.mean(earlier))
        return {"rate": rate, "difference": difference}


class BWCache:
    """BWCache (2509.13789): where the outputs of all blocks changed by less than the threshold on average, from one
    computed step to the next, the steps that follow are reused: ``max_run`` of them, or a ``share`` of all steps. After
    the first reused step k, the last ``tail * k`` steps are computed."""

    needs: ClassVar[frozenset[str]] = frozenset()
    vectors: ClassVar[tuple[str, ...]] = ("first",)
    tensors: ClassVar[Mapping[str, str]] = {}

    def decide(self, seen: Seen, state: State, controls: Controls, table: Tensor) -> tuple[Tensor, Tensor, State]:
        shared = (controls["share"] * controls["steps"]).round().clamp(min=1)
        longest = torch.where(controls["max_run"] > 0, controls["max_run"], shared)
        first, step = state["first"], seen.step
        over = (first > 0) & (controls["steps"] > 0) & (step >= controls["steps"] - controls["tail"] * first)
        score = state["change"]
        return (score < controls["threshold"]) & (state["run"] < longest) & ~over, score, {}

    def settle(self, seen: Seen, state: State, decided: State, hit: Tensor) -> State:
        begins = hit & (state["first"] == 0)
        return {"first": torch.where(begins, seen.step.float(), state["first"])}


class AdaCache:
    """AdaCache (2411.02397): the rate at which one block's residual changes, times what moves in the picture, is looked
    up in a codebook (the table: bounds, each followed by the steps until the next computed one; beyond the last bound
    the last number holds).

    What moves is ``m = (difference / motion_reference) ** motion_power`` of the mean difference between neighbouring
    frames over their magnitudes, plus ``motion_change`` times how fast ``m`` itself changes; from a tenth of the steps
    to nine tenths, where somebody said how many there are. Without frames it is 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    vectors: ClassVar[tuple[str, ...]] = ("gap", "motion")
    tensors: ClassVar[Mapping[str, str]] = {}

    def decide(self, seen: Seen, state: State, controls: Controls, table: Tensor) -> tuple[Tensor, Tensor, State]:
        run = state["run"]
        looked = seen.step - run - 1
        steps = controls["steps"]
        within = (steps == 0) | ((looked >= 0.1 * steps) & (looked <= 0.9 * steps))
        known = (state["difference"] >= 0) & (controls["motion_reference"] > 0)
        moving = (state["difference"].clamp(min=0) / controls["motion_reference"]) ** controls["motion_power"]
        motion = torch.where(within & known, moving, 1.0)
        turned = controls["motion_change"] * (motion - state["motion"]).abs() / state["gap"].clamp(min=1)
        score = state["rate"] * (motion + turned)
        interval = table[-1].expand_as(score)
        for i in reversed(range(0, table.shape[0] - 2, 2)):
            interval = torch.where(score < table[i], table[i + 1], interval)
        return run + 1 < interval, score, {"motion": motion}

    def settle(self, seen: Seen, state: State, decided: State, hit: Tensor) -> State:
        return {
            "gap": torch.where(hit, state["gap"], state["run"] + 1),
            "motion": torch.where(hit, state["motion"], decided["motion"]),
        }
