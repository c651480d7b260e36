"""Policies: what each of them looks at and remembers, and when it would reuse. Plain traceable torch.

A policy has two halves. ``decide`` runs in front of the region and says, for each sample, whether it would reuse;
``settle`` runs behind it and makes the policy's state for the next step, knowing what was decided in the end. State
starts as zeros; what a policy says before anything was computed is not listened to. Vectors ``[S]`` hold a value for
each sample of a batch, or one for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
Controls = Mapping[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What policies may look at.

    Attributes:
        batch: whether dimension 0 of everything counts samples; else there is one decision for all, S = 1.
        source: stream in front of the front blocks; ``None`` where the policy did not ask for it.
        entry: stream at the entry of the region.
        indicator: what the first block's first linear reads, or the embedding of the timestep.
        output: behind the region, for ``settle``: as reused or computed.
        step: int64 ``[S]``, from 0.
    """

    batch: bool
    step: Tensor
    source: Tensor | None = None
    entry: Tensor | None = None
    indicator: Tensor | None = None
    output: Tensor | None = None

    def mean(self, x: Tensor) -> Tensor:
        """Mean magnitude of each sample, float32 ``[S]``."""
        return (x.abs().flatten(1).mean(-1) if self.batch else x.abs().mean().reshape(1)).float()

    def change(self, now: Tensor, before: Tensor) -> Tensor:
        """``mean|now - before| / mean|before|`` of each sample; NaN where nothing was there before."""
        return self.mean(now - before) / self.mean(before)

    def finite(self, x: Tensor) -> Tensor:
        """Whether a sample holds neither NaN nor infinity: bool ``[S]``."""
        return x.isfinite().flatten(1).all(-1) if self.batch else x.isfinite().all().reshape(1)

    def pick(self, hit: Tensor, kept: Tensor, new: Tensor) -> Tensor:
        """``kept`` for samples that hit, ``new`` for the others."""
        return torch.where(hit.reshape(-1, *[1] * (kept.dim() - 1)), kept, new)


class Rule(Protocol):
    """A policy. ``needs`` names what of :class:`Seen` it looks at, ``vectors`` its state of one number a sample and
    ``tensors`` its state shaped like something of :class:`Seen`. The guard's own state is there as well: ``step``,
    ``run`` and ``computed``."""

    needs: ClassVar[frozenset[str]]
    vectors: ClassVar[tuple[str, ...]]
    tensors: ClassVar[Mapping[str, str]]

    def decide(self, seen: Seen, state: State, controls: Controls, table: Tensor) -> tuple[Tensor, Tensor, State]:
        """Whether each sample would reuse, the number that this was decided by, and ``vectors`` as they are then."""

    def settle(self, seen: Seen, state: State, decided: State, hit: Tensor) -> State:
        """The state after the step; ``decided`` is what :meth:`decide` returned."""


class FirstBlock:
    """First-Block Cache and DBCache: what the front blocks add, against what they added at the last computed step."""

    needs: ClassVar[frozenset[str]] = frozenset({"source", "entry"})
    vectors: ClassVar[tuple[str, ...]] = ()
    tensors: ClassVar[Mapping[str, str]] = {"added": "entry"}

    def decide(self, seen: Seen, state: State, controls: Controls, table: Tensor) -> tuple[Tensor, Tensor, State]:
        score = seen.change(_of(seen.entry) - _of(seen.source), state["added"])
        return score <= controls["threshold"], score, {}

    def settle(self, seen: Seen, state: State, decided: State, hit: Tensor) -> State:
        return {"added": seen.pick(hit, state["added"], _of(seen.entry) - _of(seen.source))}


class TeaCache:
    """TeaCache (2411.19108): changes of the first block's input, or of the timestep's embedding, from step to step,
    through a fitted polynomial (the table, highest power first; none: as they are), add up until they reach the
    threshold."""

    needs: ClassVar[frozenset[str]] = frozenset({"indicator"})
    vectors: ClassVar[tuple[str, ...]] = ("accumulated",)
    tensors: ClassVar[Mapping[str, str]] = {"before": "indicator"}

    def decide(self, seen: Seen, state: State, controls: Controls, table: Tensor) -> tuple[Tensor, Tensor, State]:
        change = seen.change(_of(seen.indicator), state["before"])
        if table.shape[0]:
            scaled = torch.zeros_like(change)
            for i in range(table.shape[0]):
                scaled = scaled * change + table[i]
            change = scaled
        accumulated = state["accumulated"] + change
        return accumulated < controls["threshold"], accumulated, {"accumulated": accumulated}

    def settle(self, seen: Seen, state: State, decided: State, hit: Tensor) -> State:
        return {"before": _of(seen.indicator).clone(), "accumulated": torch.where(hit, decided["accumulated"], 0.0)}


class MagCache:
    """MagCache (2506.09045): the calibrated ratio of residuals' magnitudes of each step (the table), multiplied since
    the last computed step, tells how far reuse is off. Where somebody said how many steps there are, and the table is
    of another number, each step has the ratio of the nearest part of the generation, as in the paper."""

    needs: ClassVar[frozenset[str]] = frozenset()
    vectors: ClassVar[tuple[str, ...]] = ("ratio", "error")
    tensors: ClassVar[Mapping[str, str]] = {}

    def decide(self, seen: Seen, state: State, controls: Controls, table: Tensor) -> tuple[Tensor, Tensor, State]:
        last = table.shape[0] - 1
        near = (seen.step * last / (controls["steps"] - 1).clamp(min=1)).round().to(torch.int64)
        place = torch.where(controls["steps"] > 1, near, seen.step).clamp(max=last)
        ratio = state["ratio"] * table[place]
        error = state["error"] + (1 - ratio).abs()
        return error <= controls["threshold"], error, {"ratio": ratio, "error": error}

    def settle(self, seen: Seen, state: State, decided: State, hit: Tensor) -> State:
        return {"ratio": torch.where(hit, decided["ratio"], 1.0), "error": torch.where(hit, decided["error"], 0.0)}


class EasyCache:
    """EasyCache (2507.02860): how much the output is expected to have moved, from the input's movement and the rate at
    which the output followed it between the last two computed steps, over the output, adds up to the threshold."""

    needs: ClassVar[frozenset[str]] = frozenset({"entry", "output"})
    vectors: ClassVar[tuple[str, ...]] = ("accumulated", "rate")
    tensors: ClassVar[Mapping[str, str]] = {"input": "entry", "output": "output", "full_input": "entry"}

    def decide(self, seen: Seen, state: State, controls: Controls, table: Tensor) -> tuple[Tensor, Tensor, State]:
        moved = seen.mean(_of(seen.entry) - state["input"])
        accumulated = state["accumulated"] + state["rate"] * moved / seen.mean(state["output"])
        # a rate takes two computed steps
        known = state["computed"] >= 2
        return known & (accumulated < controls["threshold"]), accumulated, {"accumulated": accumulated}

    def settle(self, seen: Seen, state: State, decided: State, hit: Tensor) -> State:
        entry, output = _of(seen.entry), _of(seen.output)
        rate = seen.mean(output - state["output"]) / seen.mean(entry - state["full_input"])
        return {
            "accumulated": torch.where(hit, decided["accumulated"], 0.0),
            "rate": torch.where(hit, state["rate"], rate),
            "input": entry.clone(),
            "output": seen.pick(hit, state["output"], output),
            "full_input": seen.pick(hit, state["full_input"], entry),
        }


class Fixed:
    """Computed are the first steps at or behind 0, i, i + i g, i + i g + i g², ...: every ``interval``-th step, each
    interval ``growth`` times as long as the one before, as early steps change more than late ones (the computation
    masks of cache-dit have it so). The score is the part of an interval that has passed."""

    needs: ClassVar[frozenset[str]] = frozenset()
    vectors: ClassVar[tuple[str, ...]] = ()
    tensors: ClassVar[Mapping[str, str]] = {}

    def decide(self, seen: Seen, state: State, controls: Controls, table: Tensor) -> tuple[Tensor, Tensor, State]:
        now, before = (_intervals(seen.step.float() - back, controls) for back in (0, 1))
        return now.floor() <= before.floor(), now - now.floor(), {}

    def settle(self, seen: Seen, state: State, decided: State, hit: Tensor) -> State:
        return {}


def _intervals(step: Tensor, controls: Controls) -> Tensor:
    """How many of :class:`Fixed`'s intervals have passed at a step: k where a sum of k powers of the growth is."""
    first, more = controls["interval"].clamp(min=1), controls["growth"].clamp(min=1) - 1
    passed = step.clamp(min=0) / first
    grown = torch.log1p(passed * more) / torch.log1p(more.clamp(min=_EVEN))
    # logarithms of other libraries must not move an interval by a step
    return torch.where(more > _EVEN, grown, passed) + _EVEN


_EVEN = 1e-4
"""Growth above 1 that counts as none, and share of an interval that counts as nothing."""


def allowed(step: Tensor, run: Tensor, controls: Controls) -> Tensor:
    """Whether step ``step`` (from 0) may be reused at all, after ``run`` reused ones: bool ``[S]``."""
    late = (controls["steps"] > 0) & (step >= controls["steps"] - controls["last"])
    long = (controls["max_run"] > 0) & (run >= controls["max_run"])
    return (step >= controls["warmup"]) & ~late & ~long


def _of(x: Tensor | None) -> Tensor:
    assert x is not None, "the pass hands a policy what it needs"
    return x
