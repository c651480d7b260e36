"""Which parts of a clip chunk caching computes: an overlay on its frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ditc
from ditc.examples.digits.data import FRAMES
from ditc.examples.digits.evaluate import denoiser_of, draw_clips
from ditc.examples.digits.model import load_transformer
from ditc.examples.digits.pictures import overlay_chunks

STEPS = 8
CHUNKS: dict[str, Any] = {
    "box": [2, 1, 1], "warmup": 2, "reset": 0, "threshold": 0.22, "capacities": [0.25, 0.5, 0.75],
}  # fmt: skip
"""Of few steps, in which whole steps differ too much to be skipped."""


def save_chunk_map(path: Path, *, digit: int = 3, seed: int = 1) -> float:
    """Draw one clip in few steps with chunk caching and write the chunks that had to be computed, step by step.

    Args:
        path: of the PNG.
        digit: 0 to 9.
        seed: of the clip.

    Returns:
        The part of all chunks that was computed, warm-up included.

    Raises:
        RuntimeError: no step left a chunk out, so that there is nothing to show.
    """
    # for a picture, compiling would take longer than drawing
    compiled = ditc.compile(load_transformer(), {"lower": "eager", "chunks": CHUNKS}, dynamic=False)
    video = draw_clips(denoiser_of(compiled), torch.tensor([digit]), [seed], steps=STEPS, guidance=1.0)
    found = ditc.stats(compiled).programs[-1].chunks
    sparse = [step for step in found.steps if not step.dense] if found is not None else []
    if found is None or not sparse:
        raise RuntimeError("chunk caching computed everything at every step")
    maps = {f"step {step.step + 1} of {STEPS}": step.active[0] for step in sparse}
    overlay_chunks(video[0], maps, frames=range(0, FRAMES, 2)).save(path)
    return found.computed_part
