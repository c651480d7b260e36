"""``python -m benchmarks SUITE``, from the root of the repository."""

from __future__ import annotations

import re
from typing import Annotated

import torch
import typer

from ditc.bench.harness import Clock

from . import attention as attention_suite
from . import attention_cost as attention_cost_suite
from . import attention_quality as attention_quality_suite
from . import caches as cache_suite
from . import formats as format_suite
from . import guard_lowerings as lowerings
from . import guard_overhead as guard
from . import linear_cost as cost
from . import step_latency as step
from . import students as student_suite
from .environment import pick_device
from .model import Size

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one")]
Rounds = Annotated[int, typer.Option(min=1, help="timed calls per candidate")]
Threads = Annotated[int | None, typer.Option(min=1, help="torch's threads; all cores when not given")]
ClockName = Annotated[
    str | None, typer.Option(help="wall, cuda, or cpu: processor time, for busy machines, one thread")
]
Save = Annotated[bool, typer.Option("--save/--no-save", help="write JSON and Markdown into benchmarks/results")]


def _setup(device: str | None, threads: int | None, clock: str | None) -> tuple[torch.device, Clock]:
    if threads is not None:
        torch.set_num_threads(threads)
    picked = pick_device(device)
    clocks: dict[str, Clock] = {"wall": "wall", "cpu": "cpu", "cuda": "cuda"}
    chosen = clock or ("cuda" if picked.type == "cuda" else "wall")
    if chosen not in clocks:
        raise typer.BadParameter(f"clock is wall, cpu or cuda, not {chosen!r}")
    return picked, clocks[chosen]


def _sizes(device: torch.device, sizes: list[str], tokens: list[int]) -> list[Size]:
    default = step.CUDA_SIZES if device.type == "cuda" else step.CPU_SIZES
    if not sizes and not tokens:
        return list(default)
    found = []
    for text in sizes or sorted({f"{s.hidden}x{s.depth}" for s in default}):
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None:
            raise typer.BadParameter(f"a size is HIDDENxDEPTH such as 1152x4, not {text!r}")
        found += [Size(int(match[1]), int(match[2]), n) for n in tokens or (256, 1024)]
    return found


@app.command()
def step_latency(
    size: Annotated[list[str] | None, typer.Option(help="HIDDENxDEPTH, such as 1152x4; may be repeated")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="tokens of an image; may be repeated")] = None,
    only: Annotated[list[str] | None, typer.Option(help="part of a candidate's name; may be repeated")] = None,
    rounds: Rounds = 15,
    device: Device = None,
    threads: Threads = None,
    clock: ClockName = None,
    save: Save = True,
) -> None:
    """One denoising step of a DiT: eager, inductor, bfloat16, torchao INT8, ditc INT8."""
    picked, kind = _setup(device, threads, clock)
    step.run(picked, _sizes(picked, size or [], tokens or []), rounds=rounds, clock=kind, only=only or [], save=save)


@app.command()
def guard_overhead(
    rounds: Rounds = 30,
    calls: Annotated[int, typer.Option(min=1, help="calls in a timed loop")] = 50,
    device: Device = None,
    threads: Threads = None,
    clock: ClockName = None,
    save: Save = True,
) -> None:
    """What a call of a compiled model costs beside its kernels."""
    picked, kind = _setup(device, threads, clock)
    guard.run(picked, rounds=rounds, clock=kind, calls=calls, save=save)


@app.command()
def guard_lowerings(
    rounds: Rounds = 15,
    calls: Annotated[int, typer.Option(min=1, help="steps in a timed loop")] = 5,
    device: Device = None,
    threads: Threads = None,
    clock: ClockName = None,
    save: Save = True,
) -> None:
    """What a cache guard costs where it computes, and what is left where it reuses, for each lowering."""
    picked, kind = _setup(device, threads, clock)
    lowerings.run(picked, rounds=rounds, clock=kind, calls=calls, save=save)


@app.command()
def linear_cost(
    rounds: Rounds = 7,
    quick: Annotated[bool, typer.Option("--quick", help="a corner of the grid")] = False,
    install_table: Annotated[bool, typer.Option("--install-table", help="make it the compiler's table")] = False,
    device: Device = None,
    threads: Threads = None,
    clock: ClockName = None,
    save: Save = True,
) -> None:
    """One linear in each format over a grid of shapes: the table by which the compiler chooses formats."""
    picked, kind = _setup(device, threads, clock)
    cost.run(picked, rounds=rounds, clock=kind, quick=quick, install=install_table, save=save)


@app.command()
def formats(
    clips_per_digit: Annotated[int, typer.Option(min=1, help="clips of each digit, by each entrant")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="part of an entrant's name; may be repeated")] = None,
    threads: Threads = None,
    save: Save = True,
) -> None:
    """The demo's model in every format: quality, bytes and speed, beside torchao and modelopt."""
    picked, _ = _setup(None, threads, None)
    format_suite.run(picked, clips_per_digit=clips_per_digit, only=only or [], save=save)


@app.command()
def attention_quality(
    clips_per_digit: Annotated[int, typer.Option(min=1, help="clips of each digit, by each variant")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="part of a variant's name; may be repeated")] = None,
    threads: Threads = None,
    save: Save = True,
) -> None:
    """The demo's model with every recipe of low-precision attention: what each costs, what each of its parts brings."""
    if threads is not None:
        torch.set_num_threads(threads)
    attention_quality_suite.run(clips_per_digit=clips_per_digit, only=only or [], save=save)


@app.command()
def caches(
    clips: Annotated[
        int,
        typer.Option(
            min=5, help="clips drawn with each setting, for a Fréchet distance at least 5; the first is not timed"
        ),
    ] = 20,
    steps: Annotated[int, typer.Option(min=4, help="of a generation")] = cache_suite.STEPS,
    only: Annotated[list[str] | None, typer.Option(help="part of an entrant's name; may be repeated")] = None,
    quantize: Annotated[str | None, typer.Option(help="format of ditc's linears below the caches")] = None,
    attention_: Annotated[str | None, typer.Option("--attention", help="and of its attention")] = None,
    threads: Threads = None,
    clock: ClockName = None,
    save: Save = True,
) -> None:
    """Skipping on the demo's model: every policy beside the caches of diffusers and cache-dit."""
    _, kind = _setup("cpu", threads, clock)
    options = {"quantize": quantize, "attention": attention_}
    more = {name: value for name, value in options.items() if value is not None}
    cache_suite.run(clips=clips, steps=steps, clock=kind, more=more, only=only or [], save=save)


@app.command()
def students(
    clips: Annotated[int, typer.Option(min=50, help="clips drawn with each seed")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="how often")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="part of an entrant's name; may be repeated")] = None,
    threads: Threads = None,
    clock: ClockName = None,
    save: Save = True,
) -> None:
    """The demo's students beside their teacher in as few steps: quality, diversity and time."""
    _, kind = _setup("cpu", threads, clock)
    student_suite.run(clips=clips, seeds=seeds, clock=kind, only=only or [], save=save)


@app.command()
def attention(
    tokens: Annotated[list[int] | None, typer.Option(help="queries and keys; may be repeated")] = None,
    features: Annotated[list[int] | None, typer.Option(help="of a head; may be repeated")] = None,
    rounds: Rounds = 15,
    device: Device = None,
    threads: Threads = None,
    clock: ClockName = None,
    save: Save = True,
) -> None:
    """One attention in low precision, beside torch's best: dense, with a padding mask, block-sparse."""
    picked, kind = _setup(device, threads, clock)
    attention_suite.run(picked, rounds=rounds, clock=kind, tokens=tokens or [], heads=features or [], save=save)


@app.command()
def attention_cost(
    rounds: Rounds = 7,
    quick: Annotated[bool, typer.Option("--quick", help="a corner of the grid")] = False,
    install_table: Annotated[bool, typer.Option("--install-table", help="make it the compiler's table")] = False,
    device: Device = None,
    threads: Threads = None,
    clock: ClockName = None,
    save: Save = True,
) -> None:
    """One attention over a grid of sizes: the part of the cost table by which the compiler chooses attention."""
    picked, kind = _setup(device, threads, clock)
    attention_cost_suite.run(picked, rounds=rounds, clock=kind, quick=quick, install=install_table, save=save)


if __name__ == "__main__":
    app()
