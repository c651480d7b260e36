"""Plots that commands write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ditc.runtime.guards import GuardStats


def plot_decisions(guards: Mapping[str, GuardStats], path: Path) -> None:
    """Draw, for each guard, what the last generation's samples were decided by, step by step, and how.

    Args:
        guards: what they decided, by a title; none may be without steps.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(guards)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, guard) in zip(figure.subplots(len(guards), squeeze=False)[:, 0], guards.items(), strict=True):
        start = max(i for i, step in enumerate(guard.steps) if step.step == 0)
        last = guard.steps[start:]
        scores = torch.tensor([step.scores for step in last])
        hits = torch.tensor([step.hits for step in last])
        steps = torch.arange(len(last))
        shown = scores.clone()
        shown[~shown.isfinite()] = float("nan")
        axes.plot(steps, shown, color="0.8", linewidth=0.8)
        for mask, colour, marker, name in ((~hits, "tab:red", "o", "computed"), (hits, "tab:green", "x", "reused")):
            where = mask.nonzero()
            axes.plot(where[:, 0], shown[mask], marker, color=colour, markersize=3.5, linestyle="none", label=name)
        axes.set(title=title, xlabel="step", ylabel="indicator")
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
