"""Programs cut where a cache guard decides: the branch is taken here, on the host, between compiled parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .artifact import Segment
from .stopwatch import Laps, Work


@dataclass(frozen=True)
class Part:
    """One compiled part of a branched program.

    Values have numbers: first those that the program is called with, then what each part gave, in order.

    Attributes:
        run: takes the values at ``reads``, returns a sequence.
        reads: numbers of values.
        gives: of each value that it gives, its position in what ``run`` returns; or ``-1 - n`` for the value number
            ``n``, which it passes on as it is.
        drops: numbers of values that nothing reads any more.
        work: whose work it is.
    """

    run: Segment
    reads: tuple[int, ...]
    gives: tuple[int, ...]
    drops: tuple[int, ...] = ()
    work: Work = "model"

    def __call__(self, values: list[Any]) -> None:
        """Runs on what it reads of ``values``, and adds to them."""
        returned = self.run(*[values[i] for i in self.reads])
        values += [returned[k] if k >= 0 else values[-1 - k] for k in self.gives]
        for i in self.drops:
            values[i] = None


@dataclass(frozen=True)
class Arm:
    """One way to go on: it computes up to ``capacity`` samples, and reuses the others."""

    capacity: int
    part: Part


@dataclass(frozen=True)
class Branched:
    """A segment that is made of parts, one of which is chosen at every call.

    The host reads the value ``decision``, how many samples are to be computed, which waits for the device where the
    device decided; the first of ``arms`` with that capacity runs. Parts are compiled each on its own and hold nothing
    between calls, so any of them may be a CUDA graph.

    Attributes:
        before: run in order, in front of the decision.
        decision: number of the value that says how many samples must be computed.
        arms: by capacity, smallest first; the last computes all samples. All give the same number of values.
        after: run in order, behind.
        returns: numbers of the values that are returned.
        copied: how many of these, from the last one, are handed out as copies unless they were given: state that would
            be overwritten where parts are CUDA graphs.

    Raises:
        ValueError: the arms are none, out of order, or give different numbers of values.
    """

    before: tuple[Part, ...]
    decision: int
    arms: tuple[Arm, ...]
    after: tuple[Part, ...]
    returns: tuple[int, ...]
    copied: int = 0

    def __post_init__(self) -> None:
        sizes = [arm.capacity for arm in self.arms]
        if not sizes or sizes != sorted(set(sizes)):
            raise ValueError(f"arms are ordered by their capacities, got {sizes}")
        if len({len(arm.part.gives) for arm in self.arms}) > 1:
            raise ValueError("all arms give the same number of values")

    def __call__(self, *given: Any) -> list[Any]:
        """The program without an account of its time."""
        return self.run(given, Laps())

    def run(self, given: Sequence[Any], laps: Laps) -> list[Any]:
        """The program; what each part took goes to ``laps``."""
        values = list(given)
        laps.begin()
        for part in self.before:
            part(values)
            laps.lap(part.work)
        needed = int(values[self.decision])
        arm = next((arm for arm in self.arms if arm.capacity >= needed), self.arms[-1])
        laps.lap("guard")
        arm.part(values)
        laps.arm(arm.capacity)
        for part in self.after:
            part(values)
            laps.lap(part.work)
        returned = [values[i] for i in self.returns]
        if self.copied:
            own = set(map(id, given))
            returned[-self.copied :] = [v if id(v) in own else v.clone() for v in returned[-self.copied :]]
        return returned


def nothing(*_: Any) -> Sequence[Any]:
    """What a part runs that only passes on what it reads."""
    return ()
