"""Which chunks were computed, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .artifact import StateSpec
from .steplog import StepLog


@dataclass(frozen=True, eq=False)
class ChunkStep:
    """One call of a program that computes chunks.

    Attributes:
        request, branch: of the session; ``None`` outside of sessions and branches.
        step: of this branch of the generation, from 0.
        active: bool ``[S, frames, height, width]`` in chunks (without frames for images), for each sample or one for
            all: those that had to be computed, because their change was over the threshold or the step was dense.
        computed: likewise, those that were: active ones, and as many more as the smallest program that holds them.
        scores: float32 ``[S, chunks]``, what was decided by.
    """

    request: str | None
    branch: str | None
    step: int
    active: torch.Tensor
    computed: torch.Tensor
    scores: torch.Tensor

    @property
    def active_part(self) -> tuple[float, ...]:
        """The part of each sample's chunks that had to be computed."""
        return tuple(self.active.flatten(1).float().mean(1).tolist())

    @property
    def computed_part(self) -> float:
        """The part of all chunks that was computed: 1 for a dense step."""
        return float(self.computed.float().mean())

    @property
    def dense(self) -> bool:
        """Whether all tokens were computed."""
        return bool(self.computed.all())


@dataclass(frozen=True)
class ChunkStats:
    """The steps of one program, oldest first."""

    steps: tuple[ChunkStep, ...]

    @property
    def computed_part(self) -> float:
        """The mean part of all chunks that a step computed."""
        return sum(step.computed_part for step in self.steps) / len(self.steps) if self.steps else 1.0

    @property
    def sparse(self) -> int:
        """Steps that did not compute all tokens."""
        return sum(not step.dense for step in self.steps)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know: thresholds that never, or always, leave a chunk out."""
        if not self.steps:
            return ()
        if not self.sparse:
            return (
                "every step is dense: the changes that were seen are above the threshold, or all steps are warm-up "
                "and resets",
            )
        late = [step for step in self.steps if not step.dense]
        if not any(bool(step.active.any()) for step in late):
            return ("no chunk is ever active in a sparse step: the threshold is above every change that was seen",)
        return ()


class ChunkLog(StepLog):
    """Collects which chunks were computed step by step."""

    NAMES = ("chunks.active", "chunks.computed", "chunks.score")

    def __init__(self) -> None:
        super().__init__(self.NAMES)

    @classmethod
    def understands(cls, spec: StateSpec) -> bool:
        """Whether a program with this state computes chunks."""
        return any(entry.name == cls.NAMES[0] for entry in spec.entries)

    def steps(self) -> list[ChunkStep]:
        """What was decided so far, oldest first; waits for the device."""
        return [
            ChunkStep(record.request, record.branch, record.step, *(tensor.cpu() for tensor in record.tensors))
            for record in self.records()
        ]
