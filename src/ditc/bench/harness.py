"""Measures candidates against each other: interleaved, checked, with spread.

A machine drifts (clock, neighbours, caches), so the candidates of a comparison take turns: each round runs every
candidate once, and ratios are taken within a round before they are summarised. A candidate whose output is wrong gets
no number.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

Clock = Literal["wall", "cpu", "cuda"]
Call = Callable[[int], torch.Tensor]
"""Does the work of one step and returns its output; steps are counted from 0 for each candidate."""


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    ``prepare`` builds it (compiles, quantises) and returns the call that is timed; it runs once, untimed. ``bound`` is
    the largest relative error against the reference with which a number is given. ``skip`` is the reason why the
    candidate does not run here.
    """

    name: str
    prepare: Callable[[], Call]
    bound: float
    skip: str | None = None
    plan: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Quartiles of a sample: of seconds, or of ratios."""

    low: float
    median: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation; a sample of one has no spread."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high, len(values))


@dataclass
class Result:
    """What was found out about a candidate: seconds per call and error, or why there is no number."""

    name: str
    plan: dict[str, Any] = field(default_factory=dict)
    error: float | None = None
    bound: float | None = None
    seconds: Spread | None = None
    refused: str | None = None
    prepare_s: float | None = None
    samples: list[float] = field(default_factory=list)


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """``|actual - reference| / |reference|`` in the Frobenius norm and float64; NaN and infinities stay visible.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"the output has shape {tuple(actual.shape)}, the reference {tuple(reference.shape)}")
    truth = reference.double().cpu()
    return float((actual.double().cpu() - truth).norm() / truth.norm())


def timer(clock: Clock) -> Callable[[Callable[[], object]], float]:
    """A function that runs its argument once and returns the seconds that took.

    ``wall`` is what a user waits. ``cpu`` is the processor time of the calling thread, which neighbours on a busy
    machine hardly change; it means something with one thread only. ``cuda`` is the time between two events on the
    current stream.

    Raises:
        ValueError: ``cpu`` is asked for while torch uses several threads.
    """
    if clock == "cuda":
        return _cuda_seconds
    if clock == "cpu" and torch.get_num_threads() != 1:
        raise ValueError(f"clock 'cpu' needs one thread, torch uses {torch.get_num_threads()}: pass --threads 1")
    read = time.thread_time if clock == "cpu" else time.perf_counter

    def seconds(call: Callable[[], object]) -> float:
        start = read()
        call()
        return read() - start

    return seconds


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def order(n: int, round_: int) -> list[int]:
    """The order in which ``n`` candidates run in a round: rotated by one each round, every second round backwards.

    Each candidate so takes every position, and follows every neighbour from both sides.
    """
    rotated = [(i + round_ // 2) % n for i in range(n)]
    return rotated[::-1] if round_ % 2 else rotated


def measure(
    candidates: Sequence[Candidate],
    references: Sequence[torch.Tensor],
    *,
    rounds: int,
    clock: Clock = "wall",
    warmup: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Prepares, checks and times the candidates; one result each, in their order.

    The error is that of the very call that is timed, the largest of its warm-up steps and of one step after the last
    round. An error of preparation is a refusal with its message, not the end of the run.

    Args:
        candidates: who competes.
        references: what each must return, in float32: for step ``i`` the one at ``i`` modulo their number.
        rounds: how often each candidate is timed.
        clock: see :func:`timer`.
        warmup: untimed calls before the first round, at least one.
        progress: is told what happens.
    """
    seconds_of = timer(clock)
    results = [Result(c.name, c.plan, bound=c.bound, refused=c.skip) for c in candidates]
    calls: dict[int, Call] = {}
    for index, (candidate, result) in enumerate(zip(candidates, results, strict=True)):
        if candidate.skip is not None:
            progress(f"{candidate.name}: skipped, {candidate.skip}")
            continue
        progress(f"{candidate.name}: preparing")
        call = _prepare(candidate, result, max(1, warmup), references)
        if call is not None:
            calls[index] = call
        if result.refused is not None:
            progress(f"{candidate.name}: no number, {result.refused}")
    active = list(calls)
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds if active else 0):
            for position in order(len(active), round_):
                index = active[position]
                results[index].samples.append(seconds_of(partial(calls[index], max(1, warmup) + round_)))
    finally:
        gc.enable()
    for index, call in calls.items():
        last = max(1, warmup) + rounds
        _check(results[index], call(last), references[last % len(references)])
        if results[index].refused is None and results[index].samples:
            results[index].seconds = Spread.of(results[index].samples)
    return results


def _prepare(candidate: Candidate, result: Result, warmup: int, references: Sequence[torch.Tensor]) -> Call | None:
    start = time.perf_counter()
    try:
        call = candidate.prepare()
        outputs = [call(step) for step in range(warmup)]
    except Exception as error:  # noqa: BLE001 - a peer that cannot run is a finding, and the others still count
        result.refused = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return None
    result.prepare_s = time.perf_counter() - start
    for step, output in enumerate(outputs):
        _check(result, output, references[step % len(references)])
    return None if result.refused is not None else call


def _check(result: Result, output: torch.Tensor, reference: torch.Tensor) -> None:
    assert result.bound is not None
    error = relative_error(output, reference)
    # not max(): that would lose a NaN
    result.error = error if result.error is None or not error <= result.error else result.error
    if not result.error <= result.bound:
        result.refused = f"wrong: relative error {result.error:.2e}, allowed {result.bound:.0e}"


def ratios(results: Sequence[Result], baseline: str) -> dict[str, Spread]:
    """How many times faster than ``baseline`` each candidate is, round by round; above 1 is faster.

    Raises:
        KeyError: the baseline has no number.
    """
    measured = {r.name: r.samples for r in results if r.seconds is not None}
    if baseline not in measured:
        raise KeyError(f"no number for {baseline!r}")
    base = measured[baseline]
    return {name: Spread.of([b / s for b, s in zip(base, own, strict=True)]) for name, own in measured.items()}


def best(results: Sequence[Result], names: Sequence[str]) -> str | None:
    """The fastest by median among those of ``names`` that have a number; ``None`` when none has."""
    measured = {r.name: r.seconds.median for r in results if r.seconds is not None and r.name in names}
    return min(measured, key=lambda name: measured[name]) if measured else None
