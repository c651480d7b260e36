"""The demo: the same clips through eager fp32, inductor and ditc in INT8, timed, measured and drawn side by side."""

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
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from ditc.examples.digits.classifier import load_classifier
from ditc.examples.digits.data import CLASSES, CLIP_SHAPE, FRAMES
from ditc.examples.digits.evaluate import (
    GUIDANCE,
    STEPS,
    Quality,
    denoiser_of,
    draw_clips,
    measure_clips,
    real_clips,
)
from ditc.examples.digits.model import class_tokens, load_transformer
from ditc.examples.digits.pictures import animate, contact_sheet, save_animation
from ditc.runtime.quality import psnr, ssim

_REFERENCE = "eager fp32"
_VALUE_RANGE = 2.0


@dataclass(frozen=True)
class Candidate:
    """One way to run the transformer.

    `prepare` turns the loaded module into what is called; `check`, after the first call, raises where that is not what
    the name promises.
    """

    name: str
    prepare: Callable[[nn.Module], Callable[..., Any]]
    check: Callable[[Callable[..., Any]], None] | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one candidate. Times are in seconds; PSNR is in dB; both it and SSIM are against eager."""

    name: str
    set_up: float
    seconds_per_clip: float
    speed_up: float
    psnr: float | None
    ssim: float | None
    quality: Quality


@dataclass(frozen=True)
class DemoResult:
    """The table's rows, the same figures of real clips, and each candidate's clips (N, 1, 8, 24, 24)."""

    rows: tuple[Row, ...]
    held_out: Quality
    videos: dict[str, Tensor]
    total_seconds: float


def candidates() -> tuple[Candidate, ...]:
    """Eager, what PyTorch's own compiler makes of it, and what ditc makes of it: linears in INT8, and attention in what
    is fastest on this machine."""
    return (
        Candidate(_REFERENCE, lambda model: model),
        Candidate("inductor fp32", torch.compile),
        Candidate("ditc int8", _compile_with_ditc({"quantize": "int8"}), _require_quantised),
        Candidate(
            "ditc int8 + attention", _compile_with_ditc({"quantize": "int8", "attention": "auto"}), _require_quantised
        ),
    )


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
    time per clip is the median over batches. Loading, compiling and one warm-up call are timed apart, as `set_up`.

    Args:
        steps: of flow Euler.
        clips_per_digit: batches of ten.
        seed: clip i has the seed seed + i, with every candidate.
        guidance: scale of classifier-free guidance.
        entrants: the candidates; the first one is what the others are compared with. A failing one ends the demo.
        progress: where to show a bar.
    """
    began = time.perf_counter()
    chosen = tuple(candidates() if entrants is None else entrants)
    bar = Progress(disable=True) if progress is None else progress
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_transformer().to(device)
    task = bar.add_task("setting up", total=len(chosen) * clips_per_digit * steps)
    runners: dict[str, Callable[..., Any]] = {}
    set_up: dict[str, float] = {}
    for candidate in chosen:
        bar.update(task, description=f"setting up {candidate.name}")
        runners[candidate.name], set_up[candidate.name] = _set_up(candidate, model, guidance)

    videos: dict[str, list[Tensor]] = {name: [] for name in runners}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for batch in range(clips_per_digit):
        # a different one goes first each time: none always runs on a machine that has just rested
        first = batch % len(runners)
        for name in [*runners][first:] + [*runners][:first]:
            bar.update(task, description=f"generating with {name}")
            start = time.perf_counter()
            video = draw_clips(
                denoiser_of(runners[name]),
                torch.arange(CLASSES),
                range(seed + batch * CLASSES, seed + (batch + 1) * CLASSES),
                steps=steps,
                guidance=guidance,
                device=device,
                progress=lambda _done, _total: bar.advance(task),
            )
            times[name].append((time.perf_counter() - start) / CLASSES)
            videos[name].append(video)

    bar.update(task, description="measuring")
    joined = {name: torch.cat(parts) for name, parts in videos.items()}
    rows, held_out = _measure(joined, set_up, {name: statistics.median(measured) for name, measured in times.items()})
    bar.update(task, description="done")
    return DemoResult(rows, held_out, joined, time.perf_counter() - began)


def _measure(
    videos: dict[str, Tensor], set_up: dict[str, float], per_clip: dict[str, float]
) -> tuple[tuple[Row, ...], Quality]:
    """The rows of the table, the first candidate being the reference, and the figures of as many real clips."""
    judge = load_classifier()
    reference, expected = next(iter(videos.items()))
    asked = torch.arange(len(expected)) % CLASSES
    real = real_clips(len(asked))[0]
    rows = tuple(
        Row(
            name=name,
            set_up=set_up[name],
            seconds_per_clip=per_clip[name],
            speed_up=per_clip[reference] / per_clip[name],
            psnr=_mean(psnr(video, expected, value_range=_VALUE_RANGE)) if name != reference else None,
            ssim=_mean(ssim(video, expected, value_range=_VALUE_RANGE)) if name != reference else None,
            quality=measure_clips(judge, video, asked, real),
        )
        for name, video in videos.items()
    )
    return rows, measure_clips(judge, *real_clips(len(asked), seed=1), real)


def _set_up(candidate: Candidate, model: nn.Module, guidance: float) -> tuple[Callable[..., Any], float]:
    """Prepare a candidate on a copy of its own, and call it once, at a time that the schedule does not contain."""
    start = time.perf_counter()
    runner = candidate.prepare(copy.deepcopy(model))
    labels = torch.arange(CLASSES)
    batch = CLASSES if guidance == 1 else 2 * CLASSES
    device = next(model.parameters()).device
    inputs = (
        torch.zeros(batch, *CLIP_SHAPE, device=device),
        torch.full((batch,), 500.0, device=device),
        class_tokens(labels.repeat(batch // CLASSES)).to(device),
    )
    with torch.no_grad():
        denoiser_of(runner)(*inputs)
    if candidate.check is not None:
        candidate.check(runner)
    return runner, time.perf_counter() - start


def _compile_with_ditc(plan: dict[str, Any]) -> Callable[[nn.Module], Callable[..., Any]]:
    def prepare(model: nn.Module) -> Callable[..., Any]:
        import ditc

        return ditc.compile(model, plan)

    return prepare


def _require_quantised(runner: Callable[..., Any]) -> None:
    """Raise RuntimeError where ditc left the transformer as it was: the demo must not time eager under ditc's name."""
    import ditc

    if not isinstance(runner, nn.Module):
        raise TypeError(f"a compiled module was expected; got {type(runner).__name__}")
    stats = ditc.stats(runner)
    if not stats.programs or any(program.untouched or not program.packs for program in stats.programs):
        raise RuntimeError(f"ditc did not quantise the transformer:\n{stats}")


def _mean(values: Tensor) -> float:
    return float(values.mean())


def as_table(result: DemoResult, *, steps: int, guidance: float) -> Table:
    """The figures as a table for people; its caption says how many clips they stand on."""
    clips = result.held_out.clips
    table = Table(
        title="Ten digits, one transformer",
        caption=(
            f"n = {clips} clips each ({clips * FRAMES} frames); flow Euler, {steps} steps, guidance {guidance:g}, "
            f"threads: {torch.get_num_threads()}. Clip: median time over {clips // CLASSES} batches of {CLASSES}, "
            "without set-up. PSNR, SSIM: against the first row at equal seeds. Fréchet: to held-out data, in the "
            "features of an independent classifier; it shrinks as n grows, so the last row is its floor. Motion: of "
            "the background, standard deviation over time in units of [-1, 1]."
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", max_width=13)
    for column in (
        "set-up\ns",
        "clip\nms",
        "speed\n×",
        "PSNR\ndB",
        "SSIM\n",
        "accuracy\n%",
        "Fréchet\n",
        "motion\n",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.set_up:.1f}",
            f"{1000 * row.seconds_per_clip:.0f}",
            f"{row.speed_up:.2f}",
            "–" if row.psnr is None else f"{row.psnr:.1f}",
            "–" if row.ssim is None else f"{row.ssim:.4f}",
            *_quality_cells(row.quality),
        )
    table.add_section()
    table.add_row("held-out data", "–", "–", "–", "–", "–", *_quality_cells(result.held_out))
    return table


def _quality_cells(quality: Quality) -> tuple[str, str, str]:
    return f"{100 * quality.accuracy:.0f}", f"{quality.frechet:.2f}", f"{quality.background_motion:.4f}"


def save_pictures(result: DemoResult, out: Path) -> tuple[Path, Path]:
    """Write `contact_sheet.png` and `clips.gif`, of the first clip of each digit, to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    first = {name: video[:CLASSES] for name, video in result.videos.items()}
    digits = [str(digit) for digit in range(CLASSES)]
    sheet, animation = out / "contact_sheet.png", out / "clips.gif"
    contact_sheet(first, digits, frames=range(0, FRAMES, 2)).save(sheet)
    save_animation(animate(first, digits), animation)
    return sheet, animation


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet and the animation")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of flow Euler")] = STEPS,
    clips_per_digit: Annotated[int, typer.Option(min=1, max=100, help="Clips of each digit, by each candidate")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first clip")] = 0,
    guidance: Annotated[float, typer.Option(min=0, max=20, help="Guidance scale; 1 for none")] = GUIDANCE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON")] = False,
) -> None:
    """Generate moving digits with eager PyTorch, inductor and ditc in INT8; compare speed and quality; draw them."""
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; a folder is needed", param_hint="--out")
    # the figures alone go to standard output
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            result = run_demo(
                steps=steps, clips_per_digit=clips_per_digit, seed=seed, guidance=guidance, progress=progress
            )
            sheet, animation = save_pictures(result, out)
    except KeyboardInterrupt:
        console.print("interrupted; no pictures were written")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(_as_dict(result, steps, guidance, seed, (sheet, animation)), indent=2))
        return
    Console().print(as_table(result, steps=steps, guidance=guidance))
    console.print(f"{result.total_seconds:.0f} s in all; see {sheet} and {animation}")


def _as_dict(result: DemoResult, steps: int, guidance: float, seed: int, files: tuple[Path, ...]) -> dict[str, Any]:
    return {
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "total_seconds": result.total_seconds,
        "candidates": [asdict(row) for row in result.rows],
        "held_out": asdict(result.held_out),
        "files": [str(file) for file in files],
    }


if __name__ == "__main__":
    typer.run(demo)
