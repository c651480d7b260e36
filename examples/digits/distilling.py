"""The demo's transformer as a subject of distillation: `ditc distill model=digits`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ditc.distill.subject import Draw, Measured, Sample, Subject
from ditc.examples.digits.classifier import judge_clips, load_classifier
from ditc.examples.digits.data import CLASSES, CLIP_SHAPE, FRAMES, load_digits, make_clips
from ditc.examples.digits.evaluate import GUIDANCE, measure_clips
from ditc.examples.digits.model import NULL_CLASS, TIMESTEPS, WEIGHTS, check_video, class_tokens, load_transformer
from ditc.examples.digits.pictures import contact_sheet

_BATCH = 20


def digits_subject(guidance: float = GUIDANCE, clips: int = 100, weights: str | None = None) -> Subject:
    """The trained transformer, with clips that are made on the fly.

    Args:
        guidance: the teacher's scale.
        clips: how many a measurement looks at, as many of each digit.
        weights: folder of the teacher; the one that comes with the demo by default.
    """
    if clips < CLASSES:
        raise ValueError(f"clips must be at least {CLASSES}, one of each digit; got {clips}")
    digits = load_digits("teacher")

    def draw(count: int, generator: torch.Generator) -> Draw:
        made = make_clips(digits, count, generator)
        check_video(made.video)
        nothing = class_tokens(torch.full_like(made.labels, NULL_CLASS))
        return Draw(class_tokens(made.labels), nothing, made.video)

    return Subject(
        name="digits",
        teacher=load_transformer(WEIGHTS if weights is None else Path(weights)),
        call=call,
        shape=CLIP_SHAPE,
        draw=draw,
        guidance=guidance,
        timestep_scale=TIMESTEPS,
        measure=lambda sample: measure(sample, clips),
        source="examples/digits/weights, WanTransformer3DModel on moving digits",
    )


def call(net: nn.Module, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    """The velocity that a `WanTransformer3DModel` predicts."""
    velocity: Tensor = net(x, timestep, condition, return_dict=False)[0]
    return velocity


def measure(sample: Sample, clips: int) -> Measured:
    """Accuracy, Fréchet distance and diversity of `clips` clips, seeds 0 on, and a picture of the first twenty."""
    judge = load_classifier()
    labels = torch.arange(clips) % CLASSES
    parts = [
        sample(class_tokens(labels[i : i + _BATCH]), range(i, min(i + _BATCH, clips))).clamp(-1, 1)
        for i in range(0, clips, _BATCH)
    ]
    video = torch.cat(parts)
    quality = measure_clips(judge, video, labels)
    figures = {
        "accuracy": quality.accuracy,
        "frechet": quality.frechet,
        "background_motion": quality.background_motion,
        "diversity": diversity(judge_clips(judge, video)[1], labels),
    }
    groups = (
        {"first": video[:CLASSES], "second": video[CLASSES : 2 * CLASSES]}
        if clips >= 2 * CLASSES
        else {"first": video[:CLASSES]}
    )
    sheet = contact_sheet(groups, [str(digit) for digit in range(CLASSES)], frames=range(FRAMES), scale=2)
    return Measured(figures, sheet)


def diversity(features: Tensor, labels: Tensor) -> float:
    """How different the clips of one class are: the mean distance of two of them, over classes.

    Args:
        features: (N * F, D), of all frames, clip by clip; a clip's is the mean over its frames.
        labels: (N,), at least two of some class.
    """
    by_clip = features.double().view(len(labels), -1, features.shape[-1]).mean(1)
    distances = [torch.pdist(by_clip[labels == label]) for label in set(labels.tolist())]
    return float(torch.cat(distances).mean())
