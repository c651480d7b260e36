"""Trains the demo's transformer; see MODEL_CARD.md for what came of it.

    python -m ditc.examples.digits.train --out out/digits

A run that stops, by Ctrl-C, a kill or a power cut, goes on from its last checkpoint when the same command is given
again. `--steps` alone may change between the two.
"""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import nn

from ditc.distill.progress import training_bar
from ditc.distill.records import append_record, drop_records_after
from ditc.distill.stop import Stop
from ditc.examples.digits.classifier import Classifier, load_classifier
from ditc.examples.digits.data import CLASSES, FRAMES, load_digits
from ditc.examples.digits.evaluate import GUIDANCE, denoiser_of, draw_clips, measure_clips
from ditc.examples.digits.pictures import contact_sheet
from ditc.examples.digits.training import Precision, Recipe, StepResult, Trainer

_LOG_EVERY = 20
_QUALITY_STEPS = 20
_QUALITY_CLIPS = 40


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, logs, samples and weights")] = Path("out/digits"),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps in all")] = Recipe.steps,
    batch: Annotated[int, typer.Option(min=1, help="Clips a step")] = Recipe.batch,
    precision: Annotated[str, typer.Option(help="bf16 (autocast) or fp32")] = Recipe.precision,
    seed: Annotated[int, typer.Option(min=0)] = Recipe.seed,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints")] = 200,
    quality_every: Annotated[
        int, typer.Option(min=0, help="Steps between measurements, and at the end; 0 for none")
    ] = 500,
) -> None:
    """Train the demo's transformer on moving digits, and write its moving average as a diffusers folder."""
    if precision not in ("bf16", "fp32"):
        raise typer.BadParameter(f"{precision!r} is neither bf16 nor fp32", param_hint="--precision")
    kind: Precision = "bf16" if precision == "bf16" else "fp32"
    recipe = Recipe(steps=steps, batch=batch, precision=kind, seed=seed)
    trainer = Trainer(load_digits("teacher"), recipe, pick_device(device))
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    # asked for at the start, so that a missing classifier is not noticed after an hour
    judge = load_classifier() if quality_every else None
    (out / "samples").mkdir(parents=True, exist_ok=True)
    drop_records_after(out / "steps.jsonl", trainer.step)
    drop_records_after(out / "quality.jsonl", trainer.step)
    console = Console()
    console.print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters on {trainer.device}, {recipe}")
    with Stop().listening() as stop, training_bar(console) as bar:
        _run(trainer, out, judge, save_every, quality_every, stop, bar)
    trainer.save(checkpoint)
    if trainer.step < recipe.steps:
        console.print(f"stopped at step {trainer.step}; the same command goes on from there")
        raise typer.Exit(130)
    export(trainer.ema, out / "weights")
    console.print(f"wrote {out / 'weights'}")


def _run(
    trainer: Trainer,
    out: Path,
    judge: Classifier | None,
    save_every: int,
    quality_every: int,
    stop: Stop,
    bar: Progress,
) -> None:
    task = bar.add_task("training", total=trainer.recipe.steps, completed=trainer.step, loss="")
    results: list[StepResult] = []
    began = time.monotonic()
    while trainer.step < trainer.recipe.steps and not stop.asked:
        pace = trainer.recipe.pace_at(trainer.step)
        results.append(trainer.train_step())
        if trainer.step % _LOG_EVERY == 0:
            loss = sum(result.loss for result in results) / len(results)
            norm = sum(result.grad_norm for result in results) / len(results)
            seconds = (time.monotonic() - began) / len(results)
            record = {"step": trainer.step, "loss": loss, "grad_norm": norm, "pace": pace, "seconds_per_step": seconds}
            append_record(out / "steps.jsonl", record)
            bar.update(task, loss=f"loss {loss:.4f}")
            results, began = [], time.monotonic()
        bar.update(task, completed=trainer.step)
        if trainer.step % save_every == 0:
            trainer.save(out / "checkpoint.pt")
        ends = trainer.step == trainer.recipe.steps
        if judge is not None and (ends or trainer.step % quality_every == 0):
            bar.console.print(_measure(trainer, judge, out))
            results, began = [], time.monotonic()


def _measure(trainer: Trainer, judge: Classifier, out: Path) -> dict[str, Any]:
    labels = torch.arange(_QUALITY_CLIPS) % CLASSES
    video = draw_clips(
        denoiser_of(trainer.ema), labels, range(_QUALITY_CLIPS), steps=_QUALITY_STEPS, device=trainer.device
    )
    record = {
        "step": trainer.step,
        "sampler_steps": _QUALITY_STEPS,
        "guidance": GUIDANCE,
        **asdict(measure_clips(judge, video, labels)),
    }
    append_record(out / "quality.jsonl", record)
    groups = {"first": video[:CLASSES], "second": video[CLASSES : 2 * CLASSES]}
    sheet = contact_sheet(groups, [str(digit) for digit in range(CLASSES)], frames=range(FRAMES), scale=2)
    sheet.save(out / "samples" / f"{trainer.step:06d}.png")
    return record


def export(model: nn.Module, folder: Path) -> None:
    """Write `model` to `folder` as diffusers does, in fp16: it is half the size and costs no visible quality."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.deepcopy(model).half().save_pretrained(partial)  # type: ignore[operator]
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()


def pick_device(name: str) -> str:
    """ "auto" is CUDA where there is one. Raises typer.BadParameter for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r} is none of auto, cpu, cuda", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here; use cpu", param_hint="--device")
    return name


if __name__ == "__main__":
    typer.run(train)
