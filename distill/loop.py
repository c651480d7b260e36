"""Runs a training to its end: records, checkpoints, measurements, a progress bar, Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ditc.runtime.generate import generate

from .nets import AVERAGE
from .progress import training_bar
from .records import append_record, drop_records_after
from .stop import Stop
from .subject import Sample
from .training import Training, UpdateResult

CHECKPOINT = "checkpoint.pt"
UPDATES = "updates.jsonl"
QUALITY = "quality.jsonl"
SAMPLES = "samples"


def run_training(training: Training, out: Path, console: Console | None = None) -> bool:
    """Train to the end, from the last checkpoint in `out` if there is one.

    Returns:
        Whether the end was reached; not so after Ctrl-C, and the same call then goes on.
    """
    world, checkpoint = training.world, out / CHECKPOINT
    if checkpoint.exists():
        training.load(checkpoint)
    if world.leads:
        (out / SAMPLES).mkdir(parents=True, exist_ok=True)
        for name in (UPDATES, QUALITY):
            drop_records_after(out / name, training.update, "update")
    shown = console if console is not None and world.leads else Console(quiet=True)
    with Stop().listening() as stop, training_bar(shown) as bar:
        _updates(training, out, stop, bar)
    training.save(checkpoint)
    return training.update == training.run.updates


def _updates(training: Training, out: Path, stop: Stop, bar: Progress) -> None:
    run, world = training.run, training.world
    task = bar.add_task(training.method.name, total=run.updates, completed=training.update, loss="")
    results: list[UpdateResult] = []
    began = time.monotonic()
    while training.update < run.updates and not world.any(stop.asked):
        results.append(training.step())
        if training.update % run.log_every == 0:
            record = _summary(training, results, time.monotonic() - began)
            if world.leads:
                append_record(out / UPDATES, record)
            losses = [f"{name} {values['loss']:.4g}" for name, values in record["players"].items()]
            bar.update(task, loss=", ".join(losses))
            results, began = [], time.monotonic()
        bar.update(task, completed=training.update)
        if training.update % run.save_every == 0:
            training.save(out / CHECKPOINT)
        ends = training.update == run.updates
        if training.subject.measure is not None and (ends or _is_due(training.update, run.measure_every)):
            bar.console.print(measure(training, out))
            results, began = [], time.monotonic()


def _is_due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0


def _summary(training: Training, results: list[UpdateResult], seconds: float) -> dict[str, Any]:
    """Means over the updates since the last record, for each player."""
    players = {}
    for player in dict.fromkeys(result.player for result in results):
        own = [result for result in results if result.player == player]
        values = {"loss": _mean([result.loss for result in own]), "grad_norm": _mean([r.grad_norm for r in own])}
        players[player] = values | {name: _mean([result.log[name] for result in own]) for name in own[0].log}
    pace = training.run.pace_at(training.update - 1)
    return {
        "update": training.update,
        "players": players,
        "pace": pace,
        "seconds_per_update": seconds / max(1, len(results)),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sampling(training: Training, network: str = AVERAGE) -> Sample:
    """A function that draws samples with one of the networks, along the finished student's sampler."""
    subject, nets = training.subject, training.nets
    sampler = training.method.sampler(subject)

    def denoise(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        with nets.autocast(x.device):
            return subject.call(nets.module(network), x, timestep, condition)

    def sample(condition: Tensor, seeds: Sequence[int]) -> Tensor:
        condition = condition.to(training.world.device)
        return generate(denoise, condition, seeds=seeds, shape=subject.shape, sampler=sampler).cpu()

    return sample


@torch.no_grad()
def measure(training: Training, out: Path) -> dict[str, Any]:
    """Measure the average student, record the figures and keep the picture. All ranks have to call it."""
    assert training.subject.measure is not None
    began = time.monotonic()
    measured = training.subject.measure(sampling(training))
    record = {"update": training.update, **measured.figures, "seconds": round(time.monotonic() - began, 1)}
    if training.world.leads:
        append_record(out / QUALITY, record)
        if measured.picture is not None:
            measured.picture.save(out / SAMPLES / f"{training.update:06d}.png")
    return record
