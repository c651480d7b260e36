"""How reports become text, and how commands show that they are at work."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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


def progress_bar() -> Progress:
    """The bar of every command, on standard error: figures alone go to standard output."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))
