"""The structure of a model as tables for people: linears of a block once, with how often, not a line each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .facts import AttentionSite, Linear, Role, Stack, Structure

T = TypeVar("T")


def render(structure: Structure) -> RenderableType:
    """Everything that was found, readable from 80 columns on; what was not found comes last, with the reason."""
    parts: list[RenderableType] = [_summary(structure), Text()]
    if structure.stacks:
        parts.append(_stacks(structure.stacks))
    if structure.attentions:
        parts.append(_attentions(structure.attentions))
    if structure.linears:
        parts.append(_linears(structure))
    if structure.notes:
        parts.append(Text("\nnotes: not found, in doubt, or unusual", style="bold"))
        parts += [Text(f"  {note}") for note in structure.notes]
    return Group(*parts)


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        right = justify == "right"
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _summary(structure: Structure) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("tokens", str(structure.token_axis or "none found"))
    others = [str(axis) for axis in structure.tokens if axis != structure.token_axis]
    if others:
        grid.add_row("other tokens", "\n".join(others))
    timestep = structure.timestep
    grid.add_row("timestep", f"{timestep.name}: {timestep.evidence}" if timestep else "none found")
    if structure.conditioning_inputs:
        grid.add_row("conditioning", ", ".join(structure.conditioning_inputs))
    if structure.embedders:
        embedders = [
            f"{e.source or '?'} through {e.name}" + (f" (patches {'×'.join(map(str, e.patch))})" if e.patch else "")
            for e in structure.embedders
        ]
        grid.add_row("embedders", "\n".join(embedders))
    return grid


def _stacks(stacks: Sequence[Stack]) -> RenderableType:
    table = _table("stacks", ("stack", "left"), ("blocks", "right"), ("streams", "left"), ("known by", "left"))
    for stack in stacks:
        streams = "\n".join(f"{stream.name} · {stream.width}" for stream in stack.streams) or "none found"
        if stack.long_skips:
            skips = ", ".join(f"{skip.source}→{skip.target}" for skip in stack.long_skips[:6])
            more = ", …" if len(stack.long_skips) > 6 else ""
            streams += f"\nlong skips {skips}{more}"
        table.add_row(stack.name, str(stack.depth), streams, stack.witness)
    return table


# --- grouping ----------------------------------------------------------------------------------------------------


def _grouped(items: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    """Items with equal keys together, in order of first appearance."""
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def pattern(names: Sequence[str]) -> str:
    """One name for several: numbers in which they differ become a range, other parts alternatives in braces.

    >>> pattern(["blocks.0.attn.q", "blocks.1.attn.q"])
    'blocks.0-1.attn.q'
    """
    split = [name.split(".") for name in dict.fromkeys(names)]
    if len({len(parts) for parts in split}) != 1:
        return f"{names[0]}, …"
    return ".".join(_alternatives(list(dict.fromkeys(column))) for column in zip(*split, strict=True))


def _alternatives(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    if all(part.isdigit() for part in parts):
        numbers = sorted(int(part) for part in parts)
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        return f"{numbers[0]}-{numbers[-1]}" if whole else "{" + ",".join(map(str, numbers)) + "}"
    return "{" + ",".join(parts[:4]) + (",…" if len(parts) > 4 else "") + "}"


# --- attentions --------------------------------------------------------------------------------------------------


def _attentions(sites: Sequence[AttentionSite]) -> RenderableType:
    table = _table(
        "attention",
        ("where", "left"),
        ("", "right"),
        ("kind", "left"),
        ("heads × dim", "right"),
        ("queries × keys", "right"),
        ("in front", "left"),
    )
    for group in _grouped(sites, _attention_key):
        site = group[0]
        heads = f"{site.heads}" if site.kv_heads == site.heads else f"{site.heads}/{site.kv_heads}"
        kind = site.kind if site.axis == "full" else f"{site.kind} over {site.axis}"
        table.add_row(
            pattern([s.name for s in group]),
            f"{len(group)}×",
            kind,
            f"{heads} × {site.head_dim}",
            f"{site.q_len} × {site.kv_len}",
            _in_front(site),
        )
    return table


def _attention_key(site: AttentionSite) -> object:
    return (
        site.stack,
        re.sub(r"\d+", "#", site.name),
        site.kind,
        site.axis,
        (site.heads, site.kv_heads, site.head_dim, site.q_len, site.kv_len),
        _in_front(site),
    )


def _in_front(site: AttentionSite) -> str:
    said: list[str] = []
    norms = [norm for norm in (site.q_norm, site.k_norm) if norm]
    if norms:
        said.append(f"{norms[0]} norm" + ("" if len(norms) == 2 else " of one"))
    if site.rope:
        said.append("RoPE")
    if site.mask:
        said.append("causal" if site.mask == "causal" else f"{site.mask} mask")
    if site.written != "sdpa":
        said.append("written out" if site.written == "explicit" else "linear, no softmax")
    return ", ".join(said) or "–"


# --- linears -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    role: Role
    names: str
    count: int
    sizes: tuple[int, int, int]
    macs: int


def _linears(structure: Structure) -> RenderableType:
    """One table per stack, with columns in line."""
    total = sum(linear.macs for linear in structure.linears) or 1
    title = f"linears: {len(structure.linears)}, {_count(total)} multiply-adds a call"
    parts: list[RenderableType] = [Text(title, style="bold")]
    groups = [(place, _rows([w for w in structure.linears if w.stack == place])) for place in _places(structure)]
    sizes = max(len(_sizes(row)) for _, rows in groups for row in rows)
    for place, rows in groups:
        heading = f"{place} × {structure.stack(place).depth}" if place else "outside the stacks"
        table = Table(
            title=heading,
            title_justify="left",
            title_style="italic",
            box=None,
            pad_edge=False,
            expand=True,
            show_header=False,
        )
        table.add_column(width=_ROLE, no_wrap=True)
        table.add_column(width=4, justify="right", no_wrap=True)
        table.add_column(width=sizes, justify="right", no_wrap=True)
        table.add_column(width=7, justify="right", no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        for row in rows:
            names = row.names.removeprefix(f"{place}.") if place else row.names
            share = f"{100 * row.macs / total:.1f} %"
            table.add_row(f"  {row.role}", f"{row.count}×", _sizes(row), share, names)
        parts += [Text(), table]
    parts.append(
        Text("\n  sizes are rows × features in → features out; then the share of all multiply-adds", style="dim")
    )
    return Group(*parts)


_ROLE = 2 + max(len(role) for role in Role)


def _places(structure: Structure) -> list[str | None]:
    """What is outside the stacks, then the stacks, as far as they hold linears."""
    held = {linear.stack for linear in structure.linears}
    return [place for place in (None, *(stack.name for stack in structure.stacks)) if place in held]


def _sizes(row: _Row) -> str:
    M, N, K = row.sizes
    return f"{M} × {K} → {N}"


def _rows(linears: Sequence[Linear]) -> list[_Row]:
    def key(linear: Linear) -> object:
        return linear.role, (linear.M, linear.N, linear.K), linear.block is None, len(linear.name.split("."))

    rows: list[_Row] = []
    for group in _grouped(linears, key):
        first = group[0]
        names = pattern([linear.name for linear in group])
        rows.append(_Row(first.role, names, len(group), (first.M, first.N, first.K), sum(g.macs for g in group)))
    return rows


def _count(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.0f} {unit}".strip() if unit in ("", "k") else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} T"
