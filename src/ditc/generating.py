"""``ditc generate``: pictures and clips from a folder, through compiled transformers."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditc.passes.errors import DitcError
from ditc.passes.plan import Plan
from ditc.runtime.samplers import Sampler
from ditc.runtime.students import MANIFEST, read_manifest

from .pipeline.optimize import optimize

Progress = Callable[[int, int], None]


class GenerateError(DitcError):
    """What is asked for cannot be drawn from this folder; the message says what can."""


@dataclass(frozen=True)
class Request:
    """What to draw, with one seed for each picture or clip.

    ``prompts`` and ``labels`` are what a model is conditioned on, of which it knows one kind; ``steps`` and
    ``guidance`` are the model's own where they are ``None``.
    """

    seeds: Sequence[int]
    prompts: Sequence[str] = ()
    labels: Sequence[int] = ()
    steps: int | None = None
    guidance: float | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if bool(self.prompts) == bool(self.labels):
            raise GenerateError("say what to draw: either --prompt, or --label for models of classes")
        wanted = self.prompts or self.labels
        if len(wanted) not in (1, len(self.seeds)):
            raise GenerateError(
                f"{len(wanted)} prompts or labels and {len(self.seeds)} seeds: give one for each seed, or one"
            )

    def conditions(self) -> list[Any]:
        """The prompt or label of each seed."""
        wanted: list[Any] = [*(self.prompts or self.labels)]
        return wanted if len(wanted) == len(self.seeds) else wanted * len(self.seeds)


@dataclass(frozen=True)
class Drawn:
    """The files that were written, one for each seed, and the seconds that drawing took, compilation included."""

    files: tuple[Path, ...]
    seconds: float


def generate_files(
    source: Path, request: Request, plan: Plan, out: Path, sampler: Sampler | None, progress: Progress
) -> Drawn:
    """Draws from a folder and writes a PNG for each picture, a GIF for each clip.

    Args:
        source: a pipeline of diffusers (``model_index.json``), or a transformer of the demo (``config.json``).
        request: what.
        plan: how its transformer is compiled.
        out: folder for the files; it is made.
        sampler: manifest; by default that in the folder, if there is one.
        progress: is told (steps done, steps).

    Raises:
        GenerateError: there is nothing to draw with, or it takes other arguments.
        SamplerError: a request that contradicts the manifest.
    """
    if sampler is None and (source / MANIFEST).is_file():
        sampler = read_manifest(source)
    if (source / "model_index.json").is_file():
        draw = _from_pipeline
    elif (source / "config.json").is_file():
        draw = _from_demo
    else:
        raise GenerateError(
            f"{source} holds neither model_index.json, of a pipeline of diffusers, nor config.json, of a transformer "
            "of the demo"
        )
    began = time.perf_counter()
    pictures = draw(source, request, plan, sampler, progress)
    seconds = time.perf_counter() - began
    out.mkdir(parents=True, exist_ok=True)
    return Drawn(
        tuple(_save(frames, out / f"{seed}") for frames, seed in zip(pictures, request.seeds, strict=True)), seconds
    )


def _from_pipeline(
    source: Path, request: Request, plan: Plan, sampler: Sampler | None, progress: Progress
) -> list[list[Any]]:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise GenerateError("pipelines are those of diffusers: pip install 'ditc[diffusers]'") from error
    pipe = DiffusionPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    fast = optimize(pipe, plan, sampler=sampler)
    takes = inspect.signature(type(pipe).__call__).parameters
    condition = {"prompt": request.prompts, "class_labels": request.labels}
    given: dict[str, Any] = dict(request.options or {})
    for name, values in condition.items():
        if values and name not in takes:
            other = "--label" if "class_labels" in takes else "--prompt"
            raise GenerateError(f"{type(pipe).__name__} takes no {name}: use {other}")
        if values:
            given[name] = request.conditions()
    for name, value in (("num_inference_steps", request.steps), ("guidance_scale", request.guidance)):
        if value is not None:
            given[name] = value
    for name in given:
        if name not in takes:
            raise GenerateError(f"{type(pipe).__name__} takes no {name}; it takes {', '.join(list(takes)[1:])}")
    if "callback_on_step_end" in takes:
        given["callback_on_step_end"] = _reporting(progress, request.steps or takes["num_inference_steps"].default)
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    result = fast(**given, generator=generators, output_type="pil")
    found = getattr(result, "images", None)
    if found is not None:
        return [[picture] for picture in found]
    return [list(frames) for frames in result.frames]


def _reporting(progress: Progress, steps: int) -> Callable[..., dict[str, Any]]:
    def report(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        progress(step + 1, getattr(pipe, "num_timesteps", steps))
        return given

    return report


def _from_demo(
    source: Path, request: Request, plan: Plan, sampler: Sampler | None, progress: Progress
) -> list[list[Any]]:
    from .examples.digits.generating import draw_pictures

    if not request.labels:
        raise GenerateError("the demo's transformers draw digits: use --label 0 to 9")
    if request.options:
        raise GenerateError(f"the demo's transformers take no further options; got {', '.join(request.options)}")
    return draw_pictures(
        source, request.conditions(), request.seeds, plan, sampler, request.steps, request.guidance, progress
    )


def _save(frames: Sequence[Any], stem: Path) -> Path:
    """Writes the frames of one picture or clip, and returns the file."""
    if len(frames) == 1:
        path = stem.with_name(f"{stem.name}.png")
        frames[0].save(path)
        return path
    path = stem.with_name(f"{stem.name}.gif")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 / 24, loop=0)
    return path
