"""Observation: what TeaCache's polynomial and MagCache's ratios are fitted to, along unguarded generations.

A graph is marked as a guard over all its blocks would be, and its border nodes are looked at while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from ..base import PassContext, PassReport
from .borders import BORDER, MAIN, borders
from .mark import MarkBorders
from .options import CacheOptions
from .policy import Seen
from .record import DEGREE, CacheRecord


@dataclass(frozen=True)
class MarkAllBlocks:
    """Marks the region of a guard over all blocks, and what TeaCache looks at; a graph without blocks stays."""

    name: ClassVar[str] = "mark all blocks"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Marks what there is to mark."""
        for policy in ("teacache", "fixed"):
            report = MarkBorders(CacheOptions.model_validate({"policy": policy}))(graph, ctx)
            if report.rewrites:
                return PassReport(self.name, report.rewrites)
        return PassReport(self.name, 0)


@dataclass(frozen=True)
class CacheSites:
    """Border nodes of a marked graph, by name, and the position of its output.

    Attributes:
        batch: whether dimension 0 of all of them counts samples.
        indicator: what the first block reads; ``None`` where that is no linear on the token path.
        entries, exit, dim: the main stream behind all blocks is a residual to the entries, joined along ``dim``; none
            where it is no residual.
        output: among what the graph returns: its first floating tensor.
    """

    batch: bool
    indicator: str | None
    entries: tuple[str, ...]
    exit: str | None
    dim: int
    output: int

    @property
    def names(self) -> frozenset[str]:
        """The nodes to look at."""
        found = {*self.entries, self.indicator, self.exit}
        return frozenset(name for name in found if name is not None)

    def values(self, seen: Mapping[str, Tensor], returned: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """Indicator, residual and output of one step, nobody else's memory."""
        residual = None
        if self.exit is not None:
            parts = [seen[name] for name in self.entries]
            residual = seen[self.exit] - (parts[0] if len(parts) == 1 else torch.cat(parts, self.dim))
        # the caller may go on to work on the output in place
        output = returned[self.output].detach().clone()
        return (seen[self.indicator] if self.indicator is not None else None), residual, output


def cache_sites(graph: fx.GraphModule) -> CacheSites | None:
    """What to look at in a marked graph; ``None`` where it has no blocks or no floating output."""
    exits, entries = borders(graph, "exit"), borders(graph, "entry")
    returned: Sequence[Any] = graph.graph.output_node().args[0]  # type: ignore[assignment]
    outputs = [i for i, node in enumerate(returned) if isinstance(node, fx.Node) and _is_floating(node)]
    if not exits or not outputs:
        return None
    main = next((i for i, entry in enumerate(entries) if entry.meta.get(MAIN)), None)
    exit = next((exit for exit in exits if main in exit.meta[BORDER].base), None)
    base = exit.meta[BORDER].base if exit is not None else ()
    indicator = next(iter(borders(graph, "indicator")), None)
    return CacheSites(
        all(node.meta[BORDER].batch for node in (*exits, *entries)),
        indicator.name if indicator is not None else None,
        tuple(entries[i].name for i in base),
        exit.name if exit is not None else None,
        exit.meta[BORDER].dim if exit is not None else 0,
        outputs[0],
    )


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass
class CacheTally:
    """What is known of a model's changes so far, as tensors on its device: nothing waits for a GPU before the end."""

    changes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    ratios: dict[int, list[Tensor]] = field(default_factory=dict)

    def record(self, batch: bool, step: int, before: tuple[Tensor | None, ...], now: tuple[Tensor | None, ...]) -> None:
        """Takes note of one step.

        Args:
            batch: whether dimension 0 counts samples.
            step: of the generation, from 1.
            before, now: indicator, residual and output of the step before and of this one.
        """
        seen = Seen(batch, torch.zeros(1))
        (indicator, residual, output), (indicator_before, residual_before, output_before) = now, before
        if indicator is not None and indicator_before is not None:
            assert output is not None and output_before is not None
            # an output may have another number of samples than the tokens, where one of the two is flattened
            pair = seen.change(indicator, indicator_before), seen.change(output, output_before)
            if pair[0].shape != pair[1].shape:
                pair = pair[0].mean().reshape(1), pair[1].mean().reshape(1)
            self.changes.append(pair)
        if residual is not None and residual_before is not None:
            size, size_before = residual.float().norm(dim=-1), residual_before.float().norm(dim=-1)
            # tokens to which nothing is added have no ratio: padding
            there = size_before > 0
            mean = torch.where(there, size / size_before, 0.0).sum() / there.sum()
            self.ratios.setdefault(step, []).append(mean)

    def result(self) -> CacheRecord | None:
        """The fits; ``None`` where nothing was seen to change, or values were not finite."""
        polynomial, deviation, pairs = self._fit()
        ratios: tuple[float, ...] = ()
        if self.ratios:
            means = {step: float(torch.stack(found).mean()) for step, found in self.ratios.items()}
            ratios = (1.0, *(means.get(step, 1.0) for step in range(1, max(means) + 1)))
            ratios = ratios if np.isfinite(ratios).all() else ()
        if not polynomial and not ratios:
            return None
        return CacheRecord(polynomial=polynomial, deviation=deviation, pairs=pairs, ratios=ratios)

    def _fit(self) -> tuple[tuple[float, ...], float, int]:
        """The polynomial, its deviation and the number of pairs; no polynomial where these do not determine one."""
        if not self.changes:
            return (), 0.0, 0
        x, y = (torch.cat([pair[i].cpu() for pair in self.changes]).double().numpy() for i in range(2))
        if len(np.unique(x)) <= DEGREE or not (np.isfinite(x).all() and np.isfinite(y).all()):
            return (), 0.0, len(x)
        found, _, rank, *_ = np.polyfit(x, y, DEGREE, full=True)
        if rank <= DEGREE:
            return (), 0.0, len(x)
        deviation = float(np.sqrt(np.mean((np.polyval(found, x) - y) ** 2)))
        return tuple(map(float, found)), deviation, len(x)
