"""``ditc bench``: one denoising step of a model, eagerly, through inductor, and through ditc with a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ditc.passes.plan import Plan
from ditc.runtime.guards import GuardStats
from ditc.runtime.session import Session, session

from ..api import Stats, stats
from ..api import compile as compile_module
from ..explanation import explain
from ..text import as_text
from .harness import Call, Candidate, Clock, Result, Spread, measure, ratios

EAGER, INDUCTOR, DITC = "eager", "inductor", "ditc"
_SPREAD_OF_TIME = 0.03
"""How far a latent moves from step to step, as a part of itself: a guard would see no change in one that stays."""


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        plan: ditc's.
        results: of eager, inductor and ditc, in this order.
        speed: how many times faster than eager, round by round, of those that have a number.
        ran: what ditc ran.
        guard: what a cache guard decided in one generation, where the plan asks for one.
        steps: of a generation.
    """

    plan: Plan
    results: tuple[Result, ...]
    speed: Mapping[str, Spread]
    ran: Stats
    guard: GuardStats | None
    steps: int
    device: str

    def to_data(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        guard = None
        if self.guard is not None:
            steps = [asdict(step) for step in self.guard.steps]
            guard = {"hit_rate": self.guard.hit_rate, "warnings": self.guard.warnings, "steps": steps}
        return {
            "plan": self.plan.to_options(), "device": self.device, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "steps": self.steps, "results": [asdict(result) for result in self.results],
            "times_eager": {name: asdict(spread) for name, spread in self.speed.items()}, "guard": guard,
        }  # fmt: skip

    def __rich__(self) -> Table:
        table = Table(
            title="One denoising step", title_justify="left", caption_justify="left",
            caption=f"medians and quartiles of calls that take turns; {torch.get_num_threads()} threads on "
            f"{self.device}; error: relative, against eager; ditc: {self.plan}",
        )  # fmt: skip
        for column in ("", "ms", "× eager", "error", "prepared in s"):
            table.add_column(column, justify="right" if column else "left")
        for result in self.results:
            if result.seconds is None:
                table.add_row(result.name, f"no number: {result.refused}", "", "", "")
                continue
            error = "–" if result.name == EAGER or result.error is None else f"{result.error:.1e}"
            prepared = f"{result.prepare_s:.1f}" if result.prepare_s is not None else "–"
            table.add_row(
                result.name, _spread(result.seconds, 1e3), _spread(self.speed[result.name], 1.0), error, prepared
            )
        return table

    def __str__(self) -> str:
        return as_text(self)


def _spread(spread: Spread, factor: float) -> str:
    low, median, high = (f"{value * factor:.2f}" for value in (spread.low, spread.median, spread.high))
    return f"{median} ({low} – {high})"


def compare(
    model: nn.Module,
    inputs: Mapping[str, Any],
    plan: Plan,
    *,
    rounds: int = 15,
    steps: int = 20,
    bound: float = 0.2,
    clock: Clock = "wall",
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Times one step of ``model`` as it is, through inductor, and through ditc.

    The steps are those of a generation: the timestep falls to 0 and the latent moves a little. All calls of ditc are in
    one session for each generation, so that a cache skips as it would.

    Args:
        model: in evaluation mode; it is copied for each candidate.
        inputs: of its ``forward``, by name.
        plan: ditc's.
        rounds: timed calls of each candidate.
        steps: of a generation.
        bound: largest relative error with which ditc gets a number.
        clock: see :func:`ditc.bench.harness.timer`.
        progress: is told what happens.
    """
    walk = _trajectory(model, inputs, steps)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        references = [_first(model(**walk(step))).float() for step in range(steps)]
        fast: list[nn.Module] = []

        def with_ditc() -> Call:
            fast.append(compile_module(copy.deepcopy(model), plan))
            return _in_generations(fast[0], walk, steps)

        candidates = [
            Candidate(EAGER, lambda: _call(copy.deepcopy(model), walk), 1e-4),
            Candidate(INDUCTOR, lambda: _call(torch.compile(copy.deepcopy(model)), walk), 1e-2),
            Candidate(DITC, with_ditc, bound),
        ]
        warmup = 2 if plan.cache is None else max(2, plan.cache.warmup_steps + 2)
        results = measure(candidates, references, rounds=rounds, clock=clock, warmup=warmup, progress=progress)
        guard = _decisions(fast[0], walk, steps) if plan.cache is not None and fast else None
    timed = any(result.name == EAGER and result.seconds is not None for result in results)
    speed = ratios(results, EAGER) if timed else {}
    ran = stats(fast[0]) if fast else Stats(())
    device = next(model.parameters()).device.type
    return Comparison(plan, tuple(results), speed, ran, guard, steps, device)


def _trajectory(model: nn.Module, inputs: Mapping[str, Any], steps: int) -> Callable[[int], dict[str, Any]]:
    """The inputs at each step: what the structure analysis calls the timestep falls, the latent moves."""
    structure = explain(model, (), inputs, {}).structure
    time = structure.timestep.name if structure.timestep is not None else None
    latent = structure.token_axis.name if structure.token_axis is not None else None

    def walk(step: int) -> dict[str, Any]:
        k = step % steps
        found = dict(inputs)
        if time in found and isinstance(found[time], Tensor):
            found[time] = (found[time] * (1 - k / steps)).to(found[time].dtype)
        if latent in found and isinstance(found[latent], Tensor):
            found[latent] = found[latent] * (1 - _SPREAD_OF_TIME * k)
        return found

    return walk


def _first(output: Any) -> Tensor:
    found = output
    while not isinstance(found, Tensor):
        found = found[0]
    return found


def _call(model: Callable[..., Any], walk: Callable[[int], dict[str, Any]]) -> Call:
    return lambda step: _first(model(**walk(step)))


def _in_generations(model: nn.Module, walk: Callable[[int], dict[str, Any]], steps: int) -> Call:
    """Calls that belong to one session for each ``steps`` of them."""
    current = [Session(steps=steps)]

    def call(step: int) -> Tensor:
        if step % steps == 0:
            current[0] = Session(steps=steps)
        with session(current[0]):
            return _first(model(**walk(step)))

    return call


def _decisions(model: nn.Module, walk: Callable[[int], dict[str, Any]], steps: int) -> GuardStats | None:
    """What the guard decides in one generation of its own."""
    name = "ditc bench"
    with session(name, steps=steps):
        for step in range(steps):
            model(**walk(step))
    for program in stats(model).programs:
        if program.guard is not None:
            return GuardStats(tuple(step for step in program.guard.steps if step.request == name))
    return None


def guard_lines(guard: GuardStats) -> Sequence[str]:
    """What to say of a guard."""
    return [f"reused {100 * guard.hit_rate:.0f} % of {len(guard.steps)} steps", *guard.warnings]
