"""Clips of single digits as pictures: what `ditc generate` draws from the demo's teacher and its students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

import ditc
from ditc.examples.digits.data import CLASSES
from ditc.examples.digits.evaluate import GUIDANCE, STEPS, denoiser_of, draw_clips
from ditc.examples.digits.model import load_transformer
from ditc.examples.digits.pictures import enlarge
from ditc.passes.plan import Plan
from ditc.runtime.samplers import Sampler, SamplerError

_SCALE = 8


def draw_pictures(
    folder: Path,
    digits: Sequence[int],
    seeds: Sequence[int],
    plan: Plan,
    sampler: Sampler | None,
    steps: int | None,
    guidance: float | None,
    progress: Callable[[int, int], None],
) -> list[list[Image.Image]]:
    """The enlarged frames of one clip for each digit and seed.

    Args:
        folder: of the teacher or a student.
        digits: 0 to 9, as many as `seeds`.
        plan: how the transformer is compiled.
        sampler: a student's manifest; without one it is the teacher that draws.
        steps, guidance: the teacher's, 50 and 2 where they are None; a student's manifest knows them.
        progress: is told (steps done, steps).

    Raises:
        ValueError: no digit.
        SamplerError: they contradict the manifest.
    """
    for digit in digits:
        if not 0 <= digit < CLASSES:
            raise ValueError(f"a digit is 0 to {CLASSES - 1}; got {digit}")
    if sampler is not None:
        sampler.check_request(steps=steps)
        if guidance not in (None, 1.0):
            raise SamplerError(f"{sampler.label} has its guidance distilled into it: leave guidance={guidance} away")
    compiled = ditc.compile(load_transformer(folder), plan)
    video = draw_clips(
        denoiser_of(compiled), torch.tensor(list(digits)), list(seeds), steps=steps or STEPS,
        guidance=GUIDANCE if guidance is None else guidance, sampler=sampler,
        progress=progress,
    )  # fmt: skip
    return [[Image.fromarray(frame.numpy()) for frame in clip] for clip in enlarge(video, _SCALE)]
