"""What cache guards decided, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from .steplog import StepLog
from .stopwatch import GuardTime, Stopwatch

ONE_GRAPH = "the guard is part of one graph (lowering 'cond'), whose parts have no times of their own"
UNMEASURED = "too few steps ran to tell: at least two that compute all samples"


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


class GuardLog(StepLog):
    """Collects what guards decided step by step, and takes the times of the steps."""

    def __init__(self) -> None:
        super().__init__(("cache.score", "cache.hit", "cache.run"), ("cache.finite",))
        self.watch = Stopwatch()

    def steps(self) -> list[GuardStep]:
        """What was decided so far, oldest first; waits for the device."""
        found = []
        for record in self.records():
            scores, hits, run, *seen = (tensor.tolist() for tensor in record.tensors)
            finite = tuple(bool(value) for values in seen for value in values)
            numbers = tuple(scores), tuple(map(bool, hits)), tuple(int(r) for r in run)
            found.append(GuardStep(record.request, record.branch, record.step, *numbers, finite))
        return found
