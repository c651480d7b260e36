"""Suite: dense attention over a grid of sizes, as the attention section of the device's cost table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ditc.bench.harness import Clock
from ditc.passes.quantize.tables import TABLES, AttentionPoint, AttentionSection, load_table

from .attention import CUDA_HEAD_COUNT, WIDTH, Measured, Task, entrants, measure_task, rounds_of, summary
from .environment import describe, hardware_slug
from .report import markdown, preamble, show, to_json, write

SUITE = "attention-cost"
TEXT_TOKENS = 77
"""Keys of a cross attention to a prompt."""


def grid(device: torch.device, *, quick: bool) -> list[Task]:
    """Self attention from few tokens to many, and cross attention to few keys."""
    if device.type == "cuda":
        pairs = [(L, D) for D in (64, 128) for L in ((1024, 4096) if quick else (256, 1024, 4096, 16384, 32768))]
        return [Task(L, L, CUDA_HEAD_COUNT, D) for L, D in pairs]
    lengths, heads = ((64, 256), (64,)) if quick else ((32, 64, 128, 256, 1024, 4096), (64, 72, 128))
    sizes = [(L, L, D) for D in heads for L in lengths]
    sizes += [(L, TEXT_TOKENS, D) for D in heads for L in ((256,) if quick else (256, 1024))]
    return [Task(Lq, Lk, round(WIDTH / D), D) for Lq, Lk, D in sizes]


def points(all_measured: Sequence[Measured]) -> tuple[AttentionPoint, ...]:
    """Medians; of several ways to do the same, such as torch's with and without oneDNN, the fastest."""
    found: dict[tuple[Any, ...], AttentionPoint] = {}
    for one in all_measured:
        for entrant, result in zip(one.entrants, one.results, strict=True):
            if result.seconds is None:
                continue
            dtype = str(entrant.dtype).removeprefix("torch.")
            key = (one.task, entrant.recipe, dtype)
            seconds = float(f"{result.seconds.median:.4g}")
            if key not in found or seconds < found[key].seconds:
                found[key] = AttentionPoint(
                    recipe=entrant.recipe,
                    dtype=dtype,  # type: ignore[arg-type]
                    B=1,
                    H=one.task.H,
                    Lq=one.task.queries,
                    Lk=one.task.keys,
                    D=one.task.D,
                    seconds=seconds,
                )
    return tuple(found.values())


def run(
    device: torch.device,
    *,
    rounds: int,
    clock: Clock,
    quick: bool = False,
    install: bool = False,
    save: bool = True,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures the grid and returns the document, with the section under ``attention``.

    Args:
        device: where to measure.
        rounds: timed calls per candidate; on CPU a third of them for the largest.
        clock: see :func:`ditc.bench.harness.timer`.
        quick: a corner of the grid.
        install: put the section into the table that the suite ``linear-cost`` installed for this hardware.
        save: write JSON and Markdown.
        progress: is told what happens.

    Raises:
        CostError: ``install`` without such a table.
    """
    document: dict[str, Any] = {**describe(device), "clock": clock, "rounds": rounds}
    path = TABLES / f"{hardware_slug(document['hardware'])}.json"
    table = load_table(path) if install else None
    done = []
    for task in grid(device, quick=quick):
        own_rounds = rounds if device.type == "cuda" else rounds_of(task, rounds)
        done.append(measure_task(task, entrants(device, "dense"), device, rounds=own_rounds, clock=clock))
        progress(" | ".join(summary(done[-1:])[1][0]))
    section = AttentionSection(exponentials=table.attention.exponentials if table else None, points=points(done))
    document["tasks"] = [{"task": str(one.task), "results": to_json(one.results)} for one in done]
    document["attention"] = section.model_dump(mode="json")
    show(SUITE, *summary(done))
    if save:
        text = f"{preamble(SUITE, document)}\nBatch 1; medians of {rounds} rounds.\n\n{markdown(*summary(done))}"
        progress(f"written: {', '.join(str(p) for p in write(SUITE, document, text))}")
    if table is not None:
        path.write_text(table.model_copy(update={"attention": section}).model_dump_json(indent=1) + "\n")
        progress(f"installed: {path}")
    return document
