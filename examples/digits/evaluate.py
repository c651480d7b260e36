"""Measures the demo's transformer: is it the asked digit, does it look like held-out data, is the background still?

python -m ditc.examples.digits.evaluate examples/digits/weights --clips 200
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from ditc.distill.seeds import seeded
from ditc.examples.digits.classifier import Classifier, judge_clips, load_classifier
from ditc.examples.digits.data import CLASSES, CLIP_SHAPE, Split, load_digits, make_clips
from ditc.examples.digits.model import NULL_CLASS, WEIGHTS, class_tokens, load_transformer
from ditc.runtime.generate import Denoiser, Guidance, generate
from ditc.runtime.quality import accuracy, background_motion, frechet_distance
from ditc.runtime.samplers import Sampler, flow_sigmas

GUIDANCE = 2.0
STEPS = 50
_DATA_SEED = 20_000
# backgrounds are at most 0, ink is at least 0.8: what is brighter than this is the digit
_SUBJECT_LEVEL = 0.1
_SOFT_EDGE = 2


@dataclass(frozen=True)
class Quality:
    """Figures of a set of clips.

    `accuracy`: share of clips in which the classifier reads the asked digit. `frechet`: distance of the features of all
    frames to those of as many held-out clips. `background_motion`: standard deviation over time, outside of the digit,
    in units of [-1, 1].
    """

    clips: int
    accuracy: float
    frechet: float
    background_motion: float


def denoiser_of(model: nn.Module | Callable[..., tuple[Tensor, ...]]) -> Denoiser:
    """`model`, a `WanTransformer3DModel` or a compiled one, as the callable that `generate` steps through."""

    def denoise(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        velocity: Tensor = model(x, timestep, condition, return_dict=False)[0]
        return velocity

    return denoise


def draw_clips(
    denoiser: Denoiser,
    labels: Tensor,
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], bool | None] | None = None,
    sampler: Sampler | None = None,
) -> Tensor:
    """Generate one clip for each label and seed: (B, 1, 8, 24, 24) fp32, clipped to [-1, 1], on the CPU.

    With the manifest `sampler` of a student it says the steps, and there is no guidance.
    """
    condition = class_tokens(labels).to(device)
    if sampler is not None:
        video = generate(denoiser, condition, seeds=seeds, shape=CLIP_SHAPE, sampler=sampler, progress=progress)
        return video.clamp(-1, 1).cpu()
    nothing = class_tokens(torch.full_like(labels, NULL_CLASS)).to(device)
    video = generate(
        denoiser,
        condition,
        seeds=seeds,
        shape=CLIP_SHAPE,
        sigmas=flow_sigmas(steps),
        guidance=Guidance(guidance, nothing),
        progress=progress,
    )
    return video.clamp(-1, 1).cpu()


def find_subject(video: Tensor) -> Tensor:
    """Where the digit and its soft edge are: (B, 1, F, H, W) bool for clips (B, 1, F, H, W) in [-1, 1]."""
    bright = (video > _SUBJECT_LEVEL).float().flatten(0, 1)
    return F.max_pool2d(bright, 2 * _SOFT_EDGE + 1, 1, _SOFT_EDGE).bool().view_as(video)


def real_clips(count: int, split: Split = "held-out", seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` clips (N, 1, 8, 24, 24) of real digits, all classes equally often, and their labels (N,)."""
    clips = make_clips(load_digits(split), count, seeded(_DATA_SEED, seed), balanced=True)
    return clips.video, clips.labels


def measure_clips(classifier: Classifier, video: Tensor, labels: Tensor, reference: Tensor | None = None) -> Quality:
    """The quality of clips (N, 1, 8, 24, 24) that were to show `labels` (N,); with N < 5 there is no covariance.

    `reference` (M, 1, 8, 24, 24) are the clips to take the Fréchet distance to; by default as many held-out ones.
    """
    if reference is None:
        reference = real_clips(len(video))[0]
    digits, features = judge_clips(classifier, video)
    return Quality(
        clips=len(video),
        accuracy=accuracy(digits, labels),
        frechet=frechet_distance(features, judge_clips(classifier, reference)[1]),
        background_motion=float(background_motion(video, find_subject(video)).nanmean()),
    )


def measure_floor(classifier: Classifier, count: int) -> dict[str, Quality]:
    """What real clips measure against the same reference: other clips of held-out digits, and of the teacher's own."""
    return {
        "held-out data": measure_clips(classifier, *real_clips(count, "held-out", seed=1)),
        "teacher's data": measure_clips(classifier, *real_clips(count, "teacher", seed=2)),
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with the transformer's weights")] = WEIGHTS,
    clips: Annotated[int, typer.Option(min=10, help="How many clips to generate")] = 200,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    guidance: Annotated[float, typer.Option(min=0, max=100)] = GUIDANCE,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 20,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
) -> None:
    """Generate clips with the trained transformer and measure them beside real ones."""
    from rich.progress import track

    classifier = load_classifier()
    denoiser = denoiser_of(load_transformer(folder))
    labels = torch.arange(clips) % CLASSES
    seeds = range(seed, seed + clips)
    parts = [
        draw_clips(denoiser, labels[i : i + batch], seeds[i : i + batch], steps=steps, guidance=guidance)
        for i in track(range(0, clips, batch), description="Generating clips")
    ]
    rows = {"generated": measure_clips(classifier, torch.cat(parts), labels), **measure_floor(classifier, clips)}
    figures = {
        "command": f"python -m ditc.examples.digits.evaluate --clips {clips} --steps {steps} --guidance {guidance:g}",
        "clips": clips,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "rows": {name: asdict(quality) for name, quality in rows.items()},
    }
    text = json.dumps(figures, indent=2)
    typer.echo(text)
    if out is not None:
        out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
