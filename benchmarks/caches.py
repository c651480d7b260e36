"""Suite: what skipping brings on the trained demo model, policy by policy, beside the caches of others.

Each entrant is drawn with at several settings; speed against PSNR gives a curve, and entrants are compared where their
curves have the same PSNR.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ditc
from ditc.bench.harness import Clock, Spread, order, timer
from ditc.examples.digits.classifier import load_classifier
from ditc.examples.digits.data import CLASSES, CLIP_SHAPE
from ditc.examples.digits.evaluate import GUIDANCE, Quality, denoiser_of, measure_clips, real_clips
from ditc.examples.digits.model import NULL_CLASS, class_tokens, load_transformer
from ditc.runtime.generate import Denoiser, Guidance, generate
from ditc.runtime.guards import GuardStats
from ditc.runtime.quality import psnr, ssim
from ditc.runtime.samplers import flow_sigmas

from .cache_entrants import Entrant, Run, baselines, ours, peers
from .environment import describe
from .report import markdown, preamble, write

SUITE = "caches"
REFERENCE = "ditc, no cache"
GROUPS = ("ditc", "diffusers", "cache-dit")
"""Who shares a process."""

STEPS = 50
"""Of a generation; results of other numbers of steps have files of their own."""

LEVELS = (40.0, 35.0, 30.0, 25.0)
"""PSNR in dB at which entrants are compared."""
_VALUE_RANGE = 2.0
_CALIBRATION_SEED = 10_000


@dataclass
class Curve:
    """One setting of an entrant: time and quality; ``base`` are the seconds of the reference in the same process."""

    entrant: str
    setting: str
    peer: bool
    seconds: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    clips: list[Tensor] = field(default_factory=list)
    hit_rate: float | None = None
    refused: str | None = None

    @property
    def name(self) -> str:
        return f"{self.entrant}, {self.setting}" if self.setting else self.entrant


def draw(denoiser: Denoiser, label: int, seed: int, steps: int) -> Tensor:
    """One clip (1, 1, 8, 24, 24), its branches of guidance called one after the other as pipelines of video do."""
    labels = torch.tensor([label])
    nothing = class_tokens(torch.full_like(labels, NULL_CLASS))
    video = generate(
        denoiser, class_tokens(labels), seeds=[seed], shape=CLIP_SHAPE, sigmas=flow_sigmas(steps),
        guidance=Guidance(GUIDANCE, nothing, batched=False),
    )  # fmt: skip
    return video.clamp(-1, 1)


def run(
    *, clips: int, steps: int, clock: Clock, more: Mapping[str, Any], only: Sequence[str] = (), save: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Measures every entrant at every setting and prints the tables.

    Args:
        clips: drawn with each setting, digit by digit; the first is not timed.
        steps: of a generation.
        clock: see :func:`ditc.bench.harness.timer`.
        more: further options of ditc's plans, to see caching on top of them.
        only: parts of entrants' names; all when empty.
        save: write the files.
    """
    curves: list[Curve] = []
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "digits.calibration.safetensors"
        _calibrate(load_transformer(), steps).save(calibration)
        job = (calibration, clips, steps, clock, dict(more), tuple(only), torch.get_num_threads())
        for group in GROUPS:
            # cache-dit and hooks change what torch.compile has noted of the model's code, also for those after them
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                curves += process.submit(measure_group, group, *job).result()
    exact = [draw(denoiser_of(load_transformer()), i % CLASSES, i, steps) for i in range(clips)]
    document: dict[str, Any] = {**describe(torch.device("cpu")), "clock": clock, "clips": clips, "steps": steps}
    document["plan"] = {**more}
    text = _report(document, curves, exact)
    print(text)
    if save:
        name = "-".join((SUITE, *map(str, more.values()), *([f"{steps}-steps"] if steps != STEPS else [])))
        print(f"written: {', '.join(str(path) for path in write(name, document, text))}")
    return document


def measure_group(
    group: str, calibration: Path, clips: int, steps: int, clock: Clock, more: Mapping[str, Any], only: Sequence[str],
    threads: int,
) -> list[Curve]:  # fmt: skip
    """Measures the entrants of one of :data:`GROUPS`, in a process of its own, beside :data:`REFERENCE`."""
    torch.set_num_threads(threads)
    model = load_transformer()
    entrants = baselines(more)
    if group == "ditc":
        entrants += ours(str(calibration), more, steps)
    else:
        learned = ditc.Calibration.load(calibration).cache
        entrants = [e for e in entrants if e.name == REFERENCE]
        entrants += [e for e in peers(learned.ratios if learned is not None else ()) if e.name.startswith(group)]
    chosen = [e for e in entrants if e.name == REFERENCE or not only or any(part in e.name for part in only)]
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        curves = _measure(chosen, model, clips, steps, clock) if len(chosen) > 1 else []
    base = [curve.seconds for curve in curves if curve.name == REFERENCE]
    for curve in curves:
        curve.base = base[0]
    # every group has the reference, which is shown once
    return [curve for curve in curves if group == "ditc" or curve.name != REFERENCE]


def _calibrate(model: nn.Module, steps: int) -> ditc.Calibration:
    """What policies learn of a model, from two generations far from the seeds that are measured."""

    def run_two(transformer: nn.Module) -> None:
        for label in range(2):
            draw(denoiser_of(transformer), label, _CALIBRATION_SEED + label, steps)

    return ditc.calibrate(model, run_two, formats=["int8"])


def _measure(entrants: Sequence[Entrant], model: nn.Module, clips: int, steps: int, clock: Clock) -> list[Curve]:
    seconds_of = timer(clock)
    curves: list[Curve] = []
    runs: list[Run | None] = []
    for entrant in entrants:
        for label, setting in entrant.settings.items():
            curve = Curve(entrant.name, label, entrant.peer)
            curves.append(curve)
            print(f"{curve.name}: preparing", flush=True)
            runs.append(_prepare(entrant, setting, model, steps, curve))
    active = [i for i, run in enumerate(runs) if run is not None]
    for clip in range(clips):
        for position in order(len(active), clip):
            curve, run = curves[active[position]], runs[active[position]]
            assert run is not None

            def one(run: Run = run, curve: Curve = curve, clip: int = clip) -> None:
                with run.around():
                    curve.clips.append(draw(run.denoiser, clip % CLASSES, clip, steps))

            took = seconds_of(one)
            # the first clip of a setting is its warm-up
            curve.seconds += [took] if clip else []
            curve.hit_rate = _hit_rate(run, calls=2 * steps)
    return curves


def _prepare(entrant: Entrant, setting: Mapping[str, Any], model: nn.Module, steps: int, curve: Curve) -> Run | None:
    try:
        run = entrant.prepare(copy.deepcopy(model), setting, steps)
        around: AbstractContextManager[Any] = run.around()
        with around:
            # enough steps to have been through everything that will be compiled
            draw(run.denoiser, 0, 0, 12)
    except Exception as error:
        # a peer that cannot run is a finding, and the others still count
        if not entrant.peer:
            raise
        curve.refused = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return None
    return run


def _hit_rate(run: Run, calls: int) -> float | None:
    """Of the last clip, drawn in so many calls; older ones may have been forgotten."""
    programs = ditc.stats(run.module).programs if run.module is not None else ()
    guard = programs[-1].guard if programs else None
    return GuardStats(guard.steps[-calls:]).hit_rate if guard is not None else None


@dataclass(frozen=True)
class Point:
    """A setting, measured: ``speed`` is how many times faster than :data:`REFERENCE`, clip by clip."""

    name: str
    entrant: str
    peer: bool
    seconds: Spread
    speed: Spread
    psnr: float
    ssim: float
    hit_rate: float | None
    quality: Quality


def _points(curves: Sequence[Curve], exact: Sequence[Tensor]) -> list[Point]:
    judge = load_classifier()
    truth = torch.cat(list(exact))
    labels = torch.arange(len(truth)) % CLASSES
    real = real_clips(len(truth))[0]
    found = []
    for curve in curves:
        if curve.refused is not None:
            continue
        video = torch.cat(curve.clips)
        speed = Spread.of([b / s for b, s in zip(curve.base, curve.seconds, strict=True)])
        found.append(
            Point(
                curve.name, curve.entrant, curve.peer, Spread.of(curve.seconds), speed,
                float(psnr(video, truth, value_range=_VALUE_RANGE).mean()),
                float(ssim(video, truth, value_range=_VALUE_RANGE).mean()),
                curve.hit_rate, measure_clips(judge, video, labels, real),
            )
        )  # fmt: skip
    return found


def speed_at(points: Sequence[Point], level: float) -> float | None:
    """The speed of one entrant where its curve crosses a PSNR of ``level`` dB, by interpolation of the logarithm
    between neighbouring settings; of its boldest one where all are better, ``None`` where all are worse."""
    row = sorted(points, key=lambda point: point.psnr)
    better = [point for point in row if point.psnr >= level]
    if not better:
        return None
    above = better[0]
    below = [point for point in row if point.psnr < level]
    if not below:
        return max(point.speed.median for point in better)
    under = below[-1]
    share = (level - under.psnr) / (above.psnr - under.psnr)
    between = (1 - share) * math.log(under.speed.median) + share * math.log(above.speed.median)
    # a curve that is not monotonic: what is better and faster still counts
    return max(math.exp(between), *(point.speed.median for point in better))


def _report(document: dict[str, Any], curves: Sequence[Curve], exact: Sequence[Tensor]) -> str:
    points = _points(curves, exact)
    document["points"] = [asdict(point) for point in points]
    document["refused"] = {curve.name: curve.refused for curve in curves if curve.refused is not None}
    header = ("", "s a clip (quartiles)", "x no cache", "reused %", "PSNR dB", "SSIM", "accuracy %", "Fréchet")
    body = [_cells(point) for point in points]
    entrants = list(dict.fromkeys(point.entrant for point in points))
    by_entrant = {name: [point for point in points if point.entrant == name] for name in entrants}
    levels = {
        name: [speed_at(by_entrant[name], level) for level in LEVELS] for name in entrants if "no cache" not in name
    }
    document["speed_at"] = {name: dict(zip(map(str, LEVELS), row, strict=True)) for name, row in levels.items()}
    at = [(name, *("–" if v is None else f"{v:.2f}" for v in row)) for name, row in levels.items()]
    lines = [
        preamble(SUITE, document),
        f"Demo model, {document['steps']} steps, guidance {GUIDANCE:g} in two calls a step, {document['clips']} clips "
        f"at equal seeds, one at a time. Clock: {document['clock']}; ditc, diffusers and cache-dit have a process "
        "each, in which entrants take turns clip by clip beside the same reference; the first clip is not timed. "
        f"PSNR and SSIM are against eager fp32 without a cache. Plan besides it: {document['plan']}.",
        "",
        markdown(header, body),
        "",
        f"## Times faster than “{REFERENCE}” at equal PSNR",
        "",
        markdown(("", *(f"{level:g} dB" for level in LEVELS)), at),
        "",
        *_against_peers(document, levels, {name: by_entrant[name][0].peer for name in levels}),
        *(f"- {name}: no number, {reason}" for name, reason in document["refused"].items()),
    ]
    return "\n".join(lines)


def _against_peers(
    document: dict[str, Any], levels: Mapping[str, Sequence[float | None]], is_peer: Mapping[str, bool]
) -> list[str]:
    lines = []
    document["best"] = {}
    for i, level in enumerate(LEVELS):
        best: dict[bool, tuple[float, str]] = {}
        for name, row in levels.items():
            value = row[i]
            if value is not None and (is_peer[name] not in best or value > best[is_peer[name]][0]):
                best[is_peer[name]] = (value, name)
        if False in best and True in best:
            (mine, my_name), (theirs, their_name) = best[False], best[True]
            document["best"][str(level)] = {"ditc": my_name, "peer": their_name, "ratio": mine / theirs}
            lines.append(
                f"- {level:g} dB: {my_name} is {mine / theirs:.2f} times as fast as the best other, {their_name}"
            )
    return [*lines, ""]


def _cells(point: Point) -> tuple[str, ...]:
    seconds, quality = point.seconds, point.quality
    return (
        point.name,
        f"{seconds.median:.3f} ({seconds.low:.3f} – {seconds.high:.3f})",
        f"{point.speed.median:.2f}",
        "" if point.hit_rate is None else f"{100 * point.hit_rate:.0f}",
        "–" if math.isinf(point.psnr) else f"{point.psnr:.1f}",
        f"{point.ssim:.4f}",
        f"{100 * quality.accuracy:.0f}",
        f"{quality.frechet:.2f}",
    )
