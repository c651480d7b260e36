"""What the parts of a guarded program take: clocks of the host, or events of a GPU that nobody waits for."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Work = Literal["model", "guard"]
"""Whose a part of a program is, for the account of what a guard costs."""

_PENDING = 256
"""Steps whose events may be under way before the oldest are read."""


class Laps:
    """The times of one step: nothing is measured by this one."""

    def begin(self) -> None:
        """The step begins."""

    def lap(self, work: Work) -> None:
        """Work of the model or of the guard ended."""

    def arm(self, capacity: int) -> None:
        """The arm that computes up to ``capacity`` samples ended."""


@dataclass
class _Times(Laps):
    """Marks on the clock of a device, and what ended at each."""

    device: torch.device
    marks: list[Any] = field(default_factory=list)
    ended: list[int | Work] = field(default_factory=list)
    """Of each lap whose work it was, or the capacity of the arm that ran."""

    def begin(self) -> None:
        self._mark()

    def lap(self, work: Work) -> None:
        self._mark()
        self.ended.append(work)

    def arm(self, capacity: int) -> None:
        self._mark()
        self.ended.append(capacity)

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def done(self) -> bool:
        """Whether the device has got that far."""
        return not self.marks or isinstance(self.marks[-1], float) or bool(self.marks[-1].query())

    def seconds(self) -> list[float]:
        """Of each lap; waits for the device."""
        if self.marks and not isinstance(self.marks[-1], float):
            self.marks[-1].synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


@dataclass(frozen=True)
class GuardTime:
    """Whether a guard pays, in seconds.

    Attributes:
        spent: on decisions, over all steps: what the policy looks at, computes and remembers, and waiting for it.
        saved: by steps that computed fewer samples, against those that computed all.
        compute: the region, or where the host decides alone the program, where all samples are computed: a median.
        reuse: what runs instead where none is: a median.
    """

    spent: float
    saved: float
    compute: float
    reuse: float


def together(times: Sequence[GuardTime]) -> GuardTime | None:
    """The times of several modules as one; ``None`` where there are none."""
    if not times:
        return None
    count = len(times)
    return GuardTime(
        sum(time.spent for time in times),
        sum(time.saved for time in times),
        sum(time.compute for time in times) / count,
        sum(time.reuse for time in times) / count,
    )


@dataclass
class _Samples:
    """Durations of one thing; the median stands for each, so that a pause of the machine counts for nothing."""

    count: int = 0
    last: deque[float] = field(default_factory=lambda: deque(maxlen=512))

    def add(self, seconds: float) -> None:
        self.count += 1
        self.last.append(seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.last) if self.last else 0.0


class Stopwatch:
    """Takes the times of the steps of one module. Of each arm the first step is left out: it warms up."""

    def __init__(self) -> None:
        self._pending: deque[_Times] = deque()
        self._seen: set[int] = set()
        self._guard = _Samples()
        self._arms: dict[int, _Samples] = {}
        self._lock = threading.Lock()

    def start(self, device: torch.device) -> Laps:
        """A step; to be handed to :meth:`stop` when it succeeded. Nothing is measured inside a CUDA graph."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return Laps()
        return _Times(device)

    def stop(self, laps: Laps) -> None:
        """Takes the times of a step, without waiting for a GPU unless very many are under way."""
        if not isinstance(laps, _Times):
            return
        with self._lock:
            self._pending.append(laps)
            while self._pending and (self._pending[0].done() or len(self._pending) > _PENDING):
                self._add(self._pending.popleft())

    def read(self) -> GuardTime | None:
        """What was measured so far, or ``None`` before all samples were computed twice; waits for the device."""
        with self._lock:
            while self._pending:
                self._add(self._pending.popleft())
            full = max(self._seen, default=0)
            if not full or full not in self._arms:
                return None
            compute = self._arms[full].median
            saved = sum(arm.count * (compute - arm.median) for arm in self._arms.values())
            reuse = self._arms.get(0, _Samples()).median
            return GuardTime(self._guard.count * self._guard.median, saved, compute, reuse)

    def _add(self, times: _Times) -> None:
        arm = next(work for work in times.ended if isinstance(work, int))
        if arm not in self._seen:
            self._seen.add(arm)
            return
        laps = list(zip(times.ended, times.seconds(), strict=True))
        self._guard.add(sum(seconds for work, seconds in laps if work == "guard"))
        self._arms.setdefault(arm, _Samples()).add(sum(seconds for work, seconds in laps if work == arm))
