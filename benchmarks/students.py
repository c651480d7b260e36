"""Suite: the demo's students beside their teacher in as few steps, over several seeds.

Everything is drawn in fp32 with eager PyTorch, so that the networks are compared and nothing else. Measured rows are
kept in a file by what determines them, so that a long suite may be stopped, and a new student added.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ditc
from ditc.bench.harness import Clock, timer
from ditc.distill.records import append_record, read_records
from ditc.examples.digits.classifier import Classifier, judge_clips, load_classifier
from ditc.examples.digits.data import CLASSES, CLIP_SHAPE
from ditc.examples.digits.distilling import call, diversity
from ditc.examples.digits.evaluate import GUIDANCE, denoiser_of, draw_clips, measure_clips, real_clips
from ditc.examples.digits.model import WEIGHTS, WEIGHTS_FILE, class_tokens, load_transformer
from ditc.examples.digits.stages import students as shipped
from ditc.runtime.students import MANIFEST, load_student

from .environment import ROOT, describe
from .report import markdown, preamble, write

SUITE = "students"
KEPT = ROOT / "out" / "students.jsonl"
TEACHER_STEPS = (50, 8, 4, 2, 1)
_SEEDS_APART = 1000
Draw = Callable[[Tensor, Sequence[int]], Tensor]
"""(labels (B,), B seeds) -> clips (B, 1, 8, 24, 24) in [-1, 1]."""


@dataclass(frozen=True)
class Entrant:
    """The teacher in some number of steps, or the student in a folder; `calls` of a network for one clip."""

    name: str
    folder: Path
    calls: int
    steps: int | None = None

    @property
    def digest(self) -> str:
        """Which weights these are, and, of a student, which manifest."""
        data = (self.folder / WEIGHTS_FILE).read_bytes()
        manifest = self.folder / MANIFEST
        return hashlib.sha256(data + (manifest.read_bytes() if manifest.is_file() else b"")).hexdigest()[:16]

    def prepare(self) -> Draw:
        """Load the network."""
        if self.steps is not None:
            teacher, steps = denoiser_of(load_transformer(self.folder)), self.steps
            return lambda labels, seeds: draw_clips(teacher, labels, seeds, steps=steps)
        student = load_student(self.folder, run=call)
        return lambda labels, seeds: ditc.generate(student, class_tokens(labels), seeds=seeds, shape=CLIP_SHAPE).clamp(
            -1, 1
        )


def entrants() -> list[Entrant]:
    """The teacher, from most steps to fewest, and the students that come with the demo."""
    teacher = [Entrant(f"teacher, {_many(n)}", WEIGHTS, 2 * n, n) for n in TEACHER_STEPS]
    folders = [(folder, load_student(folder).sampler.steps) for folder in shipped()]
    return teacher + [Entrant(f"{folder.name}, {_many(steps)}", folder, steps) for folder, steps in folders]


def _many(steps: int) -> str:
    return f"{steps} step" + ("s" if steps > 1 else "")


def run(
    *, clips: int, seeds: int, clock: Clock, only: Sequence[str] = (), kept: Path = KEPT, save: bool = True
) -> dict[str, Any]:
    """Measures every entrant with every seed and prints the table.

    Args:
        clips: drawn with each seed, as many of each digit, in batches of ten; the first batch is not timed.
        seeds: how many.
        clock: see :func:`ditc.bench.harness.timer`.
        only: parts of entrants' names; all when empty.
        kept: where measured rows are kept.
        save: write the files.
    """
    judge = load_classifier()
    rows: dict[str, list[dict[str, Any]]] = {}
    for entrant in entrants():
        if not only or any(part in entrant.name for part in only):
            rows[entrant.name] = [_row(entrant, judge, clips, seed, clock, kept) for seed in range(seeds)]
    rows["held-out data"] = [_real(judge, clips, seed) for seed in range(seeds)]
    document: dict[str, Any] = {**describe(torch.device("cpu")), "clock": clock, "clips": clips, "seeds": seeds}
    document["rows"] = rows
    text = _report(document)
    print(text)
    if save:
        print(f"written: {', '.join(str(path) for path in write(SUITE, document, text))}")
    return document


def _row(entrant: Entrant, judge: Classifier, clips: int, seed: int, clock: Clock, kept: Path) -> dict[str, Any]:
    key = {"entrant": entrant.name, "weights": entrant.digest, "clips": clips, "seed": seed, "clock": clock}
    key["threads"] = torch.get_num_threads()
    for record in read_records(kept) if kept.exists() else []:
        if all(record.get(name) == value for name, value in key.items()):
            return record
    print(f"{entrant.name}: seed {seed}", flush=True)
    seconds_of, took = timer(clock), list[float]()
    labels, draw = torch.arange(clips) % CLASSES, entrant.prepare()
    videos: list[Tensor] = []
    for first in range(0, clips, CLASSES):
        own = range(_SEEDS_APART * seed + first, _SEEDS_APART * seed + min(first + CLASSES, clips))

        def one(own: range = own, first: int = first) -> None:
            videos.append(draw(labels[first : first + CLASSES], own))

        took.append(seconds_of(one) / len(own))
    video = torch.cat(videos)
    quality = measure_clips(judge, video, labels, real_clips(clips)[0])
    record = key | {
        "calls": entrant.calls,
        "accuracy": quality.accuracy,
        "frechet": quality.frechet,
        "diversity": diversity(judge_clips(judge, video)[1], labels),
        "background_motion": quality.background_motion,
        "seconds": statistics.median(took[1:] or took),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    append_record(kept, record)
    return record


def _real(judge: Classifier, clips: int, seed: int) -> dict[str, Any]:
    """Other held-out clips against the same reference: the floor."""
    video, labels = real_clips(clips, seed=seed + 1)
    quality = measure_clips(judge, video, labels, real_clips(clips)[0])
    return {
        "seed": seed,
        "accuracy": quality.accuracy,
        "frechet": quality.frechet,
        "diversity": diversity(judge_clips(judge, video)[1], labels),
        "background_motion": quality.background_motion,
    }


def _report(document: dict[str, Any]) -> str:
    header = ("", "calls a clip", "accuracy %", "Fréchet", "diversity", "motion", "s a clip", "x teacher, 50 steps")
    rows = document["rows"]
    base = rows.get("teacher, 50 steps")
    slow = None if base is None else _mean(base, "seconds")
    body = [(name, *_cells(found, slow)) for name, found in rows.items()]
    return "\n".join(
        [
            preamble(SUITE, document),
            f"{document['clips']} clips with each of {document['seeds']} seeds, eager fp32, in batches of {CLASSES}: "
            f"means over seeds, with the lowest and the highest. Teacher: flow Euler, guidance {GUIDANCE:g}; students: "
            "as their manifests say. Fréchet: to held-out clips, in the features of an independent classifier, at this "
            "number of clips, so the last row is its floor. Diversity: mean distance of two clips of one digit in "
            "these features. Motion: of the background, standard deviation over time. "
            f"Clock: {document['clock']}, the median over batches.",
            "",
            markdown(header, body),
            "",
        ]
    )


def _cells(found: Sequence[dict[str, Any]], slow: float | None) -> tuple[str, ...]:
    timed = "seconds" in found[0]
    seconds = _mean(found, "seconds") if timed else 0.0
    return (
        str(found[0]["calls"]) if timed else "",
        _spread([100 * row["accuracy"] for row in found], 1),
        _spread([row["frechet"] for row in found], 2),
        _spread([row["diversity"] for row in found], 2),
        f"{_mean(found, 'background_motion'):.4f}",
        f"{seconds:.3f}" if timed else "",
        f"{slow / seconds:.1f}" if timed and slow is not None else "",
    )


def _mean(found: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in found)


def _spread(values: Sequence[float], digits: int) -> str:
    low, mean, high = (f"{value:.{digits}f}" for value in (min(values), statistics.fmean(values), max(values)))
    return f"{mean} ({low} – {high})"
