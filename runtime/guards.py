"""What cache guards decided: a record of each step, kept as tensors until somebody asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .artifact import StateSpec
from .session import current_branch, current_session
from .stopwatch import GuardTime, Stopwatch

ONE_GRAPH = "the guard is part of one graph (lowering 'cond'), whose parts have no times of their own"
UNMEASURED = "too few steps ran to tell: at least two that compute all samples"

MOST_STEPS = 4096
"""Steps of a program that are remembered; older ones are forgotten."""


@dataclass(frozen=True)
class GuardStep:
    """One call of a guarded program.

    Attributes:
        request, branch: of the session; ``None`` outside of sessions and branches.
        step: of this branch of the generation, from 0.
        scores: of each sample (or one for all), what the policy decided by.
        hits: of each sample, whether it was reused.
        run: of each sample, reused steps in a row, this one included.
        finite: of each sample, whether what left the region held neither NaN nor infinity.
    """

    request: str | None
    branch: str | None
    step: int
    scores: tuple[float, ...]
    hits: tuple[bool, ...]
    run: tuple[int, ...]
    finite: tuple[bool, ...] = ()


@dataclass(frozen=True)
class GuardStats:
    """The decisions of one program, oldest first, and what they cost and saved; ``untimed`` says why that is not known
    where ``time`` is ``None``."""

    steps: tuple[GuardStep, ...]
    time: GuardTime | None = None
    untimed: str | None = None

    @property
    def hit_rate(self) -> float:
        """The share of samples that were reused."""
        hits = [hit for step in self.steps for hit in step.hits]
        return sum(hits) / len(hits) if hits else 0.0

    @property
    def skipped(self) -> int:
        """Steps that ran nothing of the region: those in which all samples were reused."""
        return sum(all(step.hits) for step in self.steps)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know: guards that never or always fire, and reuse that saved nothing."""
        if not self.steps:
            return ()
        found = []
        longest = max(step.step for step in self.steps) + 1
        if self.hit_rate == 0:
            found.append("never fires: the threshold is below every change that was seen, so the guard only costs")
        elif all(all(step.hits) for step in self.steps if step.step >= longest // 2):
            found.append("always fires in the later half: the threshold is above every change that was seen")
        if self.hit_rate and not self.skipped and self.untimed == ONE_GRAPH:
            found.append("samples of a batch never agree, so nothing was skipped: the guard only costs")
        if self.time is not None and self.time.spent > self.time.saved:
            found.append(
                f"costs more than it saves: {1e3 * self.time.spent:.3g} ms spent on deciding, "
                f"{1e3 * self.time.saved:.3g} ms saved"
            )
        if not all(all(step.finite) for step in self.steps):
            found.append(
                "a step gave NaN or infinity: the next one computes, unless the host decides alone (schedule) for a GPU"
            )
        if longest <= 8:
            found.append(f"{longest} steps: with so few, whole-step reuse rarely pays")
        return tuple(found)


class GuardLog:
    """Collects what guards decided step by step, without waiting for a device."""

    NAMES = ("cache.score", "cache.hit", "cache.run")
    FINITE = "cache.finite"

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self._steps: deque[tuple[str | None, str | None, int, tuple[torch.Tensor, ...]]] = deque(maxlen=MOST_STEPS)

    def record(self, spec: StateSpec, step: int, state: Sequence[torch.Tensor]) -> None:
        """Remembers the decisions in the state that the ``step``-th call of a branch returned."""
        current = current_session()
        by_name = {entry.name: tensor for entry, tensor in zip(spec.entries, state, strict=True)}
        request = current.request if current is not None else None
        # a tensor of a CUDA graph is overwritten by the next replay
        names = [*self.NAMES, *([self.FINITE] if self.FINITE in by_name else [])]
        self._steps.append((request, current_branch(), step, tuple(by_name[name].clone() for name in names)))

    def steps(self) -> list[GuardStep]:
        """What was decided so far, oldest first; waits for the device."""
        found = []
        for request, branch, step, tensors in list(self._steps):
            scores, hits, run, *seen = (tensor.tolist() for tensor in tensors)
            finite = tuple(bool(value) for values in seen for value in values)
            numbers = tuple(scores), tuple(map(bool, hits)), tuple(int(r) for r in run)
            found.append(GuardStep(request, branch, step, *numbers, finite))
        return found
