"""What programs decided step by step, kept as tensors until somebody asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .artifact import StateSpec
from .session import current_branch, current_session

MOST_STEPS = 4096
"""Steps of a program that are remembered; older ones are forgotten."""


@dataclass(frozen=True)
class Record:
    """One call: whose it was, its step in its branch of the generation, and the state that tells what was decided."""

    request: str | None
    branch: str | None
    step: int
    tensors: tuple[torch.Tensor, ...]


class StepLog:
    """Collects state step by step, without waiting for a device.

    Args:
        names: of the entries that are kept, in order.
        optional: of those that not every program has; they come last.
    """

    def __init__(self, names: Sequence[str], optional: Sequence[str] = ()) -> None:
        self._names, self._optional = tuple(names), tuple(optional)
        self._records: deque[Record] = deque(maxlen=MOST_STEPS)

    def record(self, spec: StateSpec, step: int, state: Sequence[torch.Tensor]) -> None:
        """Remembers the decisions in the state that the ``step``-th call of a branch returned."""
        current = current_session()
        by_name = {entry.name: tensor for entry, tensor in zip(spec.entries, state, strict=True)}
        names = [*self._names, *(name for name in self._optional if name in by_name)]
        request = current.request if current is not None else None
        # a tensor of a CUDA graph is overwritten by the next replay
        self._records.append(Record(request, current_branch(), step, tuple(by_name[name].clone() for name in names)))

    def records(self) -> list[Record]:
        """What was remembered so far, oldest first."""
        return list(self._records)
