"""What the demo prints and plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich import box
from rich.table import Table

from ditc.examples.digits.data import CLASSES, FRAMES
from ditc.examples.digits.evaluate import Quality

if TYPE_CHECKING:
    from ditc.examples.digits.demo import DemoResult, Row

DISPLAYED = 24
"""Frames that are shown in a second."""

WIDTH = 110
"""Columns of the table where there is no terminal."""


def as_table(result: DemoResult, *, steps: int, guidance: float) -> Table:
    """The figures as a table for people; its caption says how many clips they stand on."""
    clips = result.held_out.clips
    table = Table(
        title="Ten digits: one technique more in each row",
        caption=(
            f"n = {clips} clips each ({clips * FRAMES} frames); teacher: flow Euler, {steps} steps, guidance "
            f"{guidance:g}; students: as their manifests say; threads: {torch.get_num_threads()}. Clip: median time "
            f"over {clips // CLASSES} batches of {CLASSES}, without set-up; {DISPLAYED} frames a second are displayed. "
            "PSNR, SSIM: against the first row at equal seeds (students walk other paths). Fréchet: to held-out data, "
            "in the features of an independent classifier; it shrinks as n grows, so the last row is its floor. "
            "Motion: of the background, standard deviation over time in units of [-1, 1]. MB: weights as they are "
            "read, and what caches keep between steps."
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", max_width=18)
    columns = ("set-up\ns", "calls\n", "clip\nms", "frames\n/s", "speed\n×", "PSNR\ndB", "SSIM\n", "accuracy\n%")
    for column in (*columns, "Fréchet\n", "motion\n", "weights\nMB", "state\nMB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(*_cells(row))
    table.add_section()
    table.add_row("held-out data", *("–" for _ in columns[:-1]), *_quality_cells(result.held_out), "–", "–")
    return table


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.set_up:.1f}",
        f"{row.calls}",
        f"{1000 * row.seconds_per_clip:.0f}",
        f"{row.frames_per_second:.0f}",
        f"{row.speed_up:.2f}",
        "–" if row.psnr is None else f"{row.psnr:.1f}",
        "–" if row.ssim is None else f"{row.ssim:.4f}",
        *_quality_cells(row.quality),
        f"{row.weight_bytes / 1e6:.1f}",
        f"{row.state_bytes / 1e6:.1f}" if row.state_bytes else "–",
    )


def _quality_cells(quality: Quality) -> tuple[str, str, str]:
    return f"{100 * quality.accuracy:.0f}", f"{quality.frechet:.2f}", f"{quality.background_motion:.4f}"
