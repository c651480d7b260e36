"""The report as people see it: golden files, and widths from 80 to 120 columns."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from ditc.passes.capture import Capture
from ditc.passes.structure import analyse
from ditc.passes.structure.table import pattern, render

Captured = Callable[..., list[Capture]]


def _text(capture: Capture, width: int) -> str:
    file = StringIO()
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(render(analyse(capture.graph)))
    return file.getvalue()


@pytest.mark.parametrize("name", ["dit", "flux", "hunyuan_video", "wan", "latte", "einops_dit", "uvit", "mixer"])
def test_golden(name: str, captured: Captured, golden: Callable[[str, str], None]) -> None:
    golden(f"structure/{name}.txt", _text(captured(name)[0], 100))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_fits_and_leaves_nothing_out(width: int, captured: Captured) -> None:
    capture = captured("hunyuan_video")[0]
    text = _text(capture, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    structure = analyse(capture.graph)
    for role in {linear.role for linear in structure.linears}:
        assert role in text
    squeezed = "".join(text.split())
    for stack in structure.stacks:
        assert f"{stack.name}×{stack.depth}" in squeezed


def test_patterns_of_names() -> None:
    assert pattern(["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]) == "blocks.0-2.attn"
    assert pattern(["blocks.0.attn", "blocks.2.attn"]) == "blocks.{0,2}.attn"
    assert pattern(["a.norm.linear", "a.norm_context.linear"]) == "a.{norm,norm_context}.linear"
    assert pattern(["proj_out"]) == "proj_out"
    assert pattern(["a.b", "a.b.c"]) == "a.b, …"
