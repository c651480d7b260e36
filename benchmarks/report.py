"""Results as JSON (everything, every sample), Markdown (the table) and on the terminal."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ditc.bench.harness import Result, Spread, ratios

from .environment import ROOT, hardware_slug

SCHEMA = 1
"""Raised when a key of the JSON changes its meaning."""

Row = tuple[str, ...]


def to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as JSON holds them; seconds as quartiles and as every sample."""
    return [dataclasses.asdict(result) for result in results]


def rows(results: Sequence[Result], baselines: Sequence[str]) -> tuple[Row, list[Row]]:
    """Header and rows of the table of a comparison.

    One column per baseline that has a number says how many times faster a candidate is: the median of the ratios
    within rounds, with its quartiles.
    """
    usable = [b for b in baselines if any(r.name == b and r.seconds is not None for r in results)]
    by_baseline = {b: ratios(results, b) for b in usable}
    header = ("candidate", "ms (quartiles)", *(f"x {b}" for b in usable), "relative error")
    body: list[Row] = []
    for r in results:
        if r.seconds is None:
            body.append((r.name, f"no number: {r.refused}", *("" for _ in usable), _error(r)))
            continue
        factors = (_spread(by_baseline[b][r.name], 1.0, 2) for b in usable)
        body.append((r.name, _spread(r.seconds, 1e3, 2), *factors, _error(r)))
    return header, body


def _error(result: Result) -> str:
    return "" if result.error is None else f"{result.error:.1e}"


def _spread(spread: Spread, factor: float, digits: int) -> str:
    low, median, high = (f"{value * factor:.{digits}f}" for value in (spread.low, spread.median, spread.high))
    return f"{median} ({low} – {high})"


def markdown(header: Row, body: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def show(title: str, header: Row, body: Sequence[Row], console: Console | None = None) -> None:
    """Prints a table."""
    table = Table(title=title)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for line in body:
        table.add_row(*line)
    (console or Console()).print(table)


def write(suite: str, document: dict[str, Any], text: str, folder: Path | None = None) -> tuple[Path, Path]:
    """Writes ``<suite>-<hardware>-<date>.json`` and ``.md`` and returns both paths.

    ``document`` holds ``hardware``, ``versions`` and ``commit`` beside the results.
    """
    folder = folder or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    stem = f"{suite}-{hardware_slug(document['hardware'])}-{date}"
    full = {"schema": SCHEMA, "suite": suite, "date": date, **document}
    paths = folder / f"{stem}.json", folder / f"{stem}.md"
    paths[0].write_text(json.dumps(_finite(full), indent=1, allow_nan=False) + "\n")
    paths[1].write_text(text.rstrip() + "\n")
    return paths


def _finite(value: Any) -> Any:
    """JSON has no infinities, such as the bound of who has no reference: they become null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def preamble(suite: str, document: dict[str, Any]) -> str:
    """The head of a Markdown report: what ran where."""
    hardware, versions = document["hardware"], document["versions"]
    machine = f"{hardware['cores']} cores of {hardware['cpu']} ({', '.join(hardware['cpu_flags'])})"
    if "gpu" in hardware:
        machine = f"{hardware['gpu']} ({hardware['gpu_capability']}, CUDA {hardware['cuda']}), {machine}"
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")
    return f"# {suite}\n\n{machine}; {hardware['threads']} threads; {named}; commit {document['commit']}.\n"
