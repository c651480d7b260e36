"""Suite: one denoising step of a DiT, ditc's INT8 against what else there is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ditc.bench.harness import Clock, Result, best, measure, ratios

from . import candidates as who
from .breakdown import ceiling, step_breakdown
from .environment import describe
from .model import Size, build
from .report import Row, markdown, preamble, rows, show, to_json, write

SUITE = "step-latency"
CPU_SIZES = (Size(384, 12, 256), Size(384, 12, 1024), Size(1152, 4, 256), Size(1152, 4, 1024))
CUDA_SIZES = (Size(1152, 28, 1024), Size(3072, 8, 4608))


def run(
    device: torch.device,
    sizes: Sequence[Size],
    *,
    rounds: int,
    clock: Clock,
    only: Sequence[str] = (),
    save: bool = True,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures every size, prints its tables, and writes JSON and Markdown into ``benchmarks/results``.

    Args:
        device: CPU or CUDA.
        sizes: models to measure.
        rounds: timed calls per candidate.
        clock: see :func:`ditc.bench.harness.timer`.
        only: names (or parts of names) of candidates; all when empty.
        save: write the files.
        progress: is told what happens.
    """
    document: dict[str, Any] = {**describe(device), "clock": clock, "rounds": rounds}
    document["ceiling_gops"] = ceiling(device, clock)
    text = preamble(SUITE, document) + f"\nClock: {clock}; {rounds} rounds, candidates interleaved.\n"
    text += "\nCeiling (10^9 operations a second): " + ", ".join(
        f"{k} {v}" for k, v in document["ceiling_gops"].items()
    )
    progress(text)
    document["sizes"] = []
    for size in sizes:
        # every candidate compiles the same forward anew, which Dynamo would take for a model that keeps recompiling
        with torch._dynamo.config.patch(recompile_limit=64):
            entry, header, body = measure_size(device, size, document["ceiling_gops"], rounds, clock, only, progress)
        document["sizes"].append(entry)
        show(str(size), header, body)
        section = f"\n\n## {size}\n\n{markdown(header, body)}\n\n" + "\n".join(_findings(entry))
        progress("\n".join(_findings(entry)))
        text += section
        if save:  # after every size: a long run that is stopped keeps what it has
            progress(f"written: {', '.join(str(p) for p in write(SUITE, document, text))}")
    return document


def measure_size(
    device: torch.device,
    size: Size,
    ceilings: dict[str, float],
    rounds: int,
    clock: Clock,
    only: Sequence[str],
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], Row, list[Row]]:
    """One size: results, ratios, fractions of the ceiling and the breakdown, and its table."""
    torch._dynamo.reset()
    gc.collect()
    model, latent, timesteps = build(size, device)
    references = [who.run_step(model, latent, timesteps, step) for step in range(len(timesteps))]
    field = [c for c in who.candidates(model, latent, timesteps) if not only or any(part in c.name for part in only)]
    results = measure(field, references, rounds=rounds, clock=clock, progress=progress)
    peer, ours = best(results, who.PEERS), best(results, who.DITCS)
    entry: dict[str, Any] = {"hidden": size.hidden, "depth": size.depth, "tokens": size.tokens, "heads": size.heads}
    entry |= {"results": to_json(results), "best_peer": peer, "best_ditc": ours}
    if ours is not None:
        entry |= _against_ceiling(size, results, ours, peer, ceilings)
        progress(f"{ours}: breakdown")
        plan = next(r.plan for r in results if r.name == ours)
        dtype = torch.bfloat16 if ours == who.DITC_BF16 else torch.float32
        entry["breakdown"] = step_breakdown(model.to(dtype), latent.to(dtype), timesteps, plan, min(rounds, 10))
    baselines = [name for name in (who.INDUCTOR, who.ONEDNN, peer) if name is not None]
    return entry, *rows(results, baselines)


def _against_ceiling(
    size: Size, results: Sequence[Result], ours: str, peer: str | None, ceilings: dict[str, float]
) -> dict[str, Any]:
    seconds = next(r.seconds for r in results if r.name == ours)
    assert seconds is not None
    top = max(rate for name, rate in ceilings.items() if name.startswith("int8"))
    rate = size.linear_ops / seconds.median / 1e9
    found: dict[str, Any] = {"linear_gop": size.linear_ops / 1e9, "step_gops": rate, "step_of_ceiling": rate / top}
    found["least_ms"] = size.linear_ops / top / 1e6
    if peer is not None:
        found["ditc_over_best_peer"] = vars(ratios(results, peer)[ours])
    return found


def _findings(entry: dict[str, Any]) -> list[str]:
    """What the numbers of a size say, in sentences."""
    if entry["best_ditc"] is None:
        return ["No ditc candidate has a number."]
    lines = []
    if "ditc_over_best_peer" in entry:
        r = entry["ditc_over_best_peer"]
        span = f"{r['median']:.2f} ({r['low']:.2f} – {r['high']:.2f})"
        lines.append(f"{entry['best_ditc']} runs at {span} x the best peer, {entry['best_peer']}.")
    lines.append(
        f"The step runs at {entry['step_of_ceiling']:.0%} of the integer ceiling: its linears alone would take "
        f"{entry['least_ms']:.1f} ms at the ceiling."
    )
    parts, step = entry["breakdown"]["parts_ms"], entry["breakdown"]["step_ms"]
    for name, ms in parts.items():
        if name.startswith("integer GEMM"):
            lines.append(f"Its {name} takes {ms:.1f} ms: {entry['least_ms'] / ms:.0%} of the ceiling.")
    lines += ["", f"Where a step of {step:.1f} ms goes (profiled, {entry['best_ditc']}):", ""]
    header: Row = ("part", "ms", "share")
    table = markdown(header, [(name, f"{ms:.2f}", f"{ms / step:.0%}") for name, ms in parts.items()])
    return [*lines, table]
