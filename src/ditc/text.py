"""How reports become text."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, RenderableType

WIDTH = 110
"""Columns of a report that is not printed on a terminal."""


def as_text(*renderables: RenderableType, width: int = WIDTH) -> str:
    """Plain text of what rich would print, without colours."""
    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False)
    for renderable in renderables:
        console.print(renderable)
    file = console.file
    assert isinstance(file, StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def megabytes(count: int) -> str:
    """Bytes as decimal megabytes."""
    return f"{count / 1e6:.1f} MB"
