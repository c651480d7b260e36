"""The demo: the same clips drawn by each stage of the stack, timed, measured and drawn side by side."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ditc.examples.digits.chunk_map import save_chunk_map
from ditc.examples.digits.classifier import load_classifier
from ditc.examples.digits.data import CLASSES, FRAMES
from ditc.examples.digits.evaluate import (
    GUIDANCE,
    STEPS,
    Quality,
    denoiser_of,
    draw_clips,
    measure_clips,
    real_clips,
)
from ditc.examples.digits.model import WEIGHTS, load_transformer
from ditc.examples.digits.pictures import animate, contact_sheet, save_animation
from ditc.examples.digits.report import WIDTH, as_table
from ditc.examples.digits.stages import Candidate, candidates
from ditc.plots import plot_decisions
from ditc.runtime.guards import GuardStats
from ditc.runtime.quality import psnr, ssim
from ditc.runtime.weights import Memory
from ditc.text import progress_bar

_VALUE_RANGE = 2.0
_WARM_UP_STEPS = 8
_WARM_UP_SEED = 1_000_000


@dataclass(frozen=True)
class Row:
    """What was measured of one candidate. Times are in seconds; PSNR is in dB; both it and SSIM are against the first
    candidate, where this one walks the same path.

    `calls` are those of the transformer in a generation, with both branches of guidance counted; `weight_bytes` what
    holds its weights while it draws, `state_bytes` what caches keep between the steps of a batch of ten.
    """

    name: str
    set_up: float
    seconds_per_clip: float
    speed_up: float
    psnr: float | None
    ssim: float | None
    quality: Quality
    calls: int
    weight_bytes: int
    state_bytes: int

    @property
    def frames_per_second(self) -> float:
        """How many frames are drawn in a second."""
        return FRAMES / self.seconds_per_clip


@dataclass(frozen=True)
class DemoResult:
    """The table's rows, the same figures of real clips, each candidate's clips (N, 1, 8, 24, 24), and what the cache
    guards decided, of those that have some."""

    rows: tuple[Row, ...]
    held_out: Quality
    videos: dict[str, Tensor]
    guards: dict[str, GuardStats]
    total_seconds: float


@dataclass
class _Entrant:
    """A candidate that is ready to draw, and what it has drawn."""

    candidate: Candidate
    runner: Callable[..., Any]
    model: nn.Module
    set_up: float
    steps: int
    guidance: float
    seconds: list[float]
    clips: list[Tensor]
    weight_bytes: int = 0

    def draw(self, labels: Tensor, seeds: range, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Clips (N, 1, 8, 24, 24) on the CPU."""
        return draw_clips(
            denoiser_of(self.runner), labels, seeds, steps=self.steps, guidance=self.guidance,
            device=next(self.model.parameters()).device, progress=progress, sampler=self.candidate.sampler,
        )  # fmt: skip

    @property
    def calls(self) -> int:
        return self.steps * (1 if self.guidance == 1 else 2)


def run_demo(
    *,
    steps: int = STEPS,
    clips_per_digit: int = 4,
    seed: int = 0,
    guidance: float = GUIDANCE,
    entrants: Iterable[Candidate] | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Generate clips of all ten digits with every candidate, and measure them.

    The candidates take turns, a batch of ten clips each, so that a machine that slows down does so for all of them; the
    time per clip is the median over batches. Loading, compiling and one short generation that warms up are timed apart,
    as `set_up`.

    Args:
        steps: of flow Euler, where the teacher draws; students know their own.
        clips_per_digit: batches of ten.
        seed: clip i has the seed seed + i, with every candidate.
        guidance: scale of classifier-free guidance of the teacher.
        entrants: the candidates; the first one is what the others are compared with. A failing one ends the demo.
        progress: where to show a bar.
    """
    began = time.perf_counter()
    chosen = tuple(candidates() if entrants is None else entrants)
    bar = Progress(disable=True) if progress is None else progress
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {folder: load_transformer(folder or WEIGHTS).to(device) for folder in {one.student for one in chosen}}
    task = bar.add_task("setting up", total=None)
    ready: list[_Entrant] = []
    seen: dict[int, Memory] = {}
    for candidate in chosen:
        bar.update(task, description=f"setting up {candidate.name}")
        ready.append(_set_up(candidate, models[candidate.student], steps, guidance))
        ready[-1].weight_bytes = _weight_bytes(ready[-1], seen)
    bar.update(task, total=clips_per_digit * sum(one.steps for one in ready))
    for batch in range(clips_per_digit):
        seeds = range(seed + batch * CLASSES, seed + (batch + 1) * CLASSES)
        # a different one goes first each time: none always runs on a machine that has just rested
        first = batch % len(ready)
        for one in ready[first:] + ready[:first]:
            bar.update(task, description=f"generating with {one.candidate.name}")
            start = time.perf_counter()
            video = one.draw(torch.arange(CLASSES), seeds, lambda _done, _total: bar.advance(task))
            one.seconds.append((time.perf_counter() - start) / CLASSES)
            one.clips.append(video)
    bar.update(task, description="measuring")
    rows, held_out = _measure(ready)
    bar.update(task, description="done")
    videos = {one.candidate.name: torch.cat(one.clips) for one in ready}
    return DemoResult(rows, held_out, videos, _guards(ready), time.perf_counter() - began)


def _set_up(candidate: Candidate, model: nn.Module, steps: int, guidance: float) -> _Entrant:
    """Prepare a candidate on a copy of its own, and draw once with it, far from the seeds that are measured."""
    start = time.perf_counter()
    sampler = candidate.sampler
    own = copy.deepcopy(model)
    entrant = _Entrant(candidate, candidate.prepare(own), own, 0.0, steps, guidance, [], [])
    if sampler is not None:
        entrant.steps, entrant.guidance = sampler.steps, 1.0
    else:
        # guards have compiled both of their branches behind a few steps
        entrant.steps = min(steps, _WARM_UP_STEPS)
    entrant.draw(torch.arange(CLASSES), range(_WARM_UP_SEED, _WARM_UP_SEED + CLASSES))
    if candidate.check is not None:
        candidate.check(entrant.runner)
    entrant.steps = steps if sampler is None else sampler.steps
    entrant.set_up = time.perf_counter() - start
    return entrant


def _measure(ready: list[_Entrant]) -> tuple[tuple[Row, ...], Quality]:
    """The rows of the table, the first candidate being the reference, and the figures of as many real clips."""
    judge = load_classifier()
    reference, expected = ready[0], torch.cat(ready[0].clips)
    asked = torch.arange(len(expected)) % CLASSES
    real = real_clips(len(asked))[0]
    base = statistics.median(reference.seconds)
    rows = []
    for one in ready:
        video, per_clip = torch.cat(one.clips), statistics.median(one.seconds)
        comparable = one is not reference and one.candidate.student is None
        rows.append(
            Row(
                name=one.candidate.name, set_up=one.set_up, seconds_per_clip=per_clip, speed_up=base / per_clip,
                psnr=_mean(psnr(video, expected, value_range=_VALUE_RANGE)) if comparable else None,
                ssim=_mean(ssim(video, expected, value_range=_VALUE_RANGE)) if comparable else None,
                quality=measure_clips(judge, video, asked, real),
                calls=one.calls, weight_bytes=one.weight_bytes, state_bytes=_state_bytes(one),
            )
        )  # fmt: skip
    return tuple(rows), measure_clips(judge, *real_clips(len(asked), seed=1), real)


def _weight_bytes(entrant: _Entrant, seen: dict[int, Memory]) -> int:
    """Bytes of weights that are read in a step. Candidates of one graph share its program, whose figures are of all of
    them: `seen` holds what they were before this one came, and is brought up to date."""
    total = sum(parameter.nbytes for parameter in entrant.model.parameters())
    if not isinstance(entrant.runner, nn.Module):
        return total
    import ditc

    saved = 0
    for program in ditc.stats(entrant.runner).programs:
        before, now = seen.get(program.number, Memory()), program.memory
        # programs of one module, such as those of two batch sizes, share what they packed
        saved = max(saved, (now.originals - before.originals) - (now.packed - before.packed))
        seen[program.number] = now
    return total - saved


def _state_bytes(entrant: _Entrant) -> int:
    """Bytes that are kept between the steps of a batch."""
    if not isinstance(entrant.runner, nn.Module):
        return 0
    import ditc

    return max((program.state_bytes_per_branch for program in ditc.stats(entrant.runner).programs), default=0)


def _guards(ready: list[_Entrant]) -> dict[str, GuardStats]:
    import ditc

    found = {}
    for one in ready:
        if isinstance(one.runner, nn.Module):
            for program in ditc.stats(one.runner).programs:
                if program.guard is not None:
                    found[one.candidate.name] = program.guard
    return found


def _mean(values: Tensor) -> float:
    return float(values.mean())


def save_pictures(result: DemoResult, out: Path) -> tuple[Path, ...]:
    """Write `contact_sheet.png` and `clips.gif`, of the first clip of each digit, to `out`; and `decisions.png`, what
    cache guards decided, where there were some."""
    out.mkdir(parents=True, exist_ok=True)
    first = {name: video[:CLASSES] for name, video in result.videos.items()}
    digits = [str(digit) for digit in range(CLASSES)]
    sheet, animation = out / "contact_sheet.png", out / "clips.gif"
    contact_sheet(first, digits, frames=range(0, FRAMES, 2)).save(sheet)
    save_animation(animate(first, digits), animation)
    if not result.guards:
        return sheet, animation
    decisions = out / "decisions.png"
    plot_decisions(result.guards, decisions)
    return sheet, animation, decisions


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet and the animation")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of flow Euler")] = STEPS,
    clips_per_digit: Annotated[int, typer.Option(min=1, max=100, help="Clips of each digit, by each candidate")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first clip")] = 0,
    guidance: Annotated[float, typer.Option(min=0, max=20, help="Guidance scale; 1 for none")] = GUIDANCE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON")] = False,
) -> None:
    """Draw moving digits with one technique more at a time; compare speed and quality; make pictures of them."""
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; a folder is needed", param_hint="--out")
    # the figures alone go to standard output
    console = Console(stderr=True)
    try:
        with progress_bar() as progress:
            result = run_demo(
                steps=steps, clips_per_digit=clips_per_digit, seed=seed, guidance=guidance, progress=progress
            )
            files = save_pictures(result, out)
            progress.add_task("drawing the map of chunks", total=None)
            files = (*files, out / "chunks.png")
            save_chunk_map(files[-1])
    except KeyboardInterrupt:
        console.print("interrupted; no pictures were written")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(_as_dict(result, steps, guidance, seed, files), indent=2))
        return
    table = as_table(result, steps=steps, guidance=guidance)
    # a file or a pipe has no width that a table should fit into
    figures = Console()
    (figures if figures.is_terminal else Console(width=WIDTH)).print(table)
    console.print(f"{result.total_seconds:.0f} s in all; see {', '.join(map(str, files))}")


def _as_dict(result: DemoResult, steps: int, guidance: float, seed: int, files: tuple[Path, ...]) -> dict[str, Any]:
    return {
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "total_seconds": result.total_seconds,
        "candidates": [{**asdict(row), "frames_per_second": row.frames_per_second} for row in result.rows],
        "held_out": asdict(result.held_out),
        "files": [str(file) for file in files],
    }


if __name__ == "__main__":
    typer.run(demo)
