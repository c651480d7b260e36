"""Which chunks were computed: a record of each step, kept as tensors until somebody asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .artifact import StateSpec
from .guards import MOST_STEPS
from .session import current_branch, current_session


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


class ChunkLog:
    """Collects what was decided step by step, without waiting for a device."""

    NAMES = ("chunks.active", "chunks.computed", "chunks.score")

    def __init__(self) -> None:
        self._steps: deque[tuple[str | None, str | None, int, tuple[torch.Tensor, ...]]] = deque(maxlen=MOST_STEPS)

    @classmethod
    def understands(cls, spec: StateSpec) -> bool:
        """Whether a program with this state computes chunks."""
        return any(entry.name == cls.NAMES[0] for entry in spec.entries)

    def record(self, spec: StateSpec, step: int, state: Sequence[torch.Tensor]) -> None:
        """Remembers the decisions in the state that the ``step``-th call of a branch returned."""
        current = current_session()
        by_name = {entry.name: tensor for entry, tensor in zip(spec.entries, state, strict=True)}
        request = current.request if current is not None else None
        # a tensor of a CUDA graph is overwritten by the next replay
        self._steps.append((request, current_branch(), step, tuple(by_name[name].clone() for name in self.NAMES)))

    def steps(self) -> list[ChunkStep]:
        """What was decided so far, oldest first; waits for the device."""
        return [
            ChunkStep(request, branch, step, *(tensor.cpu() for tensor in tensors))
            for request, branch, step, tensors in list(self._steps)
        ]
