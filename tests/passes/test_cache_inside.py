"""BWCache and AdaCache: decided by what the blocks made at computed steps, as plain Python would decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditc
from ditc.passes.backend import _copy
from ditc.passes.cache.frames import Frames
from ditc.passes.cache.inside import AdaCache, AllBlocks, BWCache, MiddleBlock
from ditc.passes.cache.mark import MarkBorders
from ditc.passes.cache.options import CODEBOOK, CacheOptions
from ditc.passes.cache.policy import Seen
from ditc.passes.errors import PlanError
from ditc.passes.pipeline import rewrite
from ditc.passes.plan import Plan
from ditc.runtime.artifact import Controls

STEPS = 12


def latents(batch: int = 1) -> list[Tensor]:
    start, end = torch.randn(2, batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    speed = torch.linspace(0.3, 1.5, batch).reshape(-1, 1, 1, 1)
    return [start + speed * i / STEPS * end for i in range(STEPS)]


def compiled(model: nn.Module, cache: Mapping[str, Any]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    options = {"cache": dict(cache), "lower": "eager", "fuse": False}
    found: Callable[..., Tensor] = torch.compile(model, backend="ditc", options=options, dynamic=False)
    return found


def masks(guarded: Any, inputs: list[Tensor], **cache: float) -> list[Any]:
    """Which samples each step reuses."""
    with torch.no_grad(), ditc.session("mine", steps=STEPS, cache=cache):
        for i, x in enumerate(inputs):
            guarded(x, torch.full((len(x),), 900.0 - 70 * i))
    guards = [program.guard for program in ditc.stats(guarded).programs]
    return [step.hits for step in [g for g in guards if g][-1].steps][-len(inputs) :]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """What enters the first block and leaves each of them, call by call."""
    calls: list[list[Tensor]] = []
    blocks: Any = model.blocks
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: calls.append([args[0]]))]
    handles += [block.register_forward_hook(lambda _, __, out: calls[-1].append(out)) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def every_step(model: nn.Module, inputs: list[Tensor]) -> list[list[Tensor]]:
    with watched(model) as calls, torch.no_grad():
        for i, x in enumerate(inputs):
            model(x, torch.full((len(x),), 900.0 - 70 * i))
    return calls


def change(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


def by_hand_bwcache(calls: list[list[Tensor]], threshold: float, longest: int, tail: float) -> list[tuple[bool]]:
    found: list[tuple[bool]] = []
    last, run, first, score = -1, 0, 0, float("nan")
    for i in range(len(calls)):
        over = bool(first) and i >= len(calls) - tail * first
        if i and score < threshold and run < longest and not over:
            found.append((True,))
            run, first = run + 1, first or i
            continue
        if last >= 0:
            score = sum(change(a, b) for a, b in zip(calls[i][1:], calls[last][1:], strict=True)) / (len(calls[i]) - 1)
        last, run = i, 0
        found.append((False,))
    return found


def test_bwcache_is_that_of_the_paper(make_dit: Callable[..., nn.Module]) -> None:
    model, inputs = make_dit(depth=3), latents()
    guarded, calls = compiled(model, {"policy": "bwcache", "threshold": 0.12}), every_step(model, inputs)
    for max_run, tail in ((2, 0.0), (0, 0.5), (3, 0.5)):
        found = masks(guarded, inputs, max_run=max_run, tail=tail)
        assert found == by_hand_bwcache(calls, 0.12, max_run or 1, tail)
        assert 0 < sum(hit for (hit,) in found) < STEPS - 2
        if tail:
            assert found[-1] == (False,), "the last k/2 steps are computed"


def test_bwcache_reuses_outputs_as_they_are(make_dit: Callable[..., nn.Module]) -> None:
    model, inputs = make_dit(depth=3), latents()
    guarded = compiled(model, {"policy": "bwcache", "threshold": 1e9, "max_run": 3, "last": 0})
    with torch.no_grad(), ditc.session():
        outputs = [guarded(x, torch.full((1,), 900.0 - 70 * i)) for i, x in enumerate(inputs)]
    calls = every_step(model, inputs)
    for i in (2, 3, 4):  # computed at 0 and 1; the head knows no time
        exact = model.head(torch.nn.functional.layer_norm(calls[1][-1], (24,)))
        torch.testing.assert_close(outputs[i].abs().mean(), exact.abs().mean())


def test_samples_of_a_batch_decide_alone(make_dit: Callable[..., nn.Module]) -> None:
    model, inputs = make_dit(depth=3), latents(2)
    guarded = compiled(model, {"policy": "bwcache", "threshold": 0.12, "max_run": 2, "last": 0})
    together = masks(guarded, inputs)
    alone = [masks(guarded, [x[i : i + 1] for x in inputs]) for i in range(2)]
    assert together == [tuple(found[i][0] for found in alone) for i in range(STEPS)]
    assert alone[0] != alone[1]


def test_adacache_waits_as_its_codebook_says(make_dit: Callable[..., nn.Module]) -> None:
    model, inputs = make_dit(depth=3), latents()
    codebook = [(0.1, 4), (0.16, 3), (0.3, 2), (9.0, 1)]
    guarded = compiled(model, {"policy": "adacache", "codebook": [list(pair) for pair in codebook]})
    found = masks(guarded, inputs)
    reports = ditc.stats(guarded).programs[-1].passes
    assert "no motion: no frames are known" in [detail for report in reports for detail in report.details]
    residuals = [call[2] - call[1] for call in every_step(model, inputs)]  # of the middle block of three
    expected, i, last = [True] * STEPS, 1, 0
    expected[0] = False
    while i < STEPS:
        expected[i] = False
        rate = change(residuals[i], residuals[last]) / (i - last)
        last, i = i, i + next(interval for bound, interval in codebook if rate < bound)
        i = min(i, STEPS - 2) if last < STEPS - 2 else last + 1  # the last two are computed
    assert found == [(hit,) for hit in expected] and any(expected), (found, expected)


# --- the halves by themselves ----------------------------------------------------------------------------------------


def decided(rate: float, run: int, **more: float) -> tuple[bool, float]:
    """AdaCache's decision at rate ``rate``, ``run`` steps after the last computed one, and its score."""
    options = CacheOptions.model_validate({"policy": "adacache"})
    named = {name: torch.tensor(value) for name, value in options.controls().items()}
    named["steps"] = torch.tensor(more.pop("steps", 0.0))
    vectors = {"rate": rate, "run": float(run), "difference": -1.0, "gap": 1.0, "motion": 1.0} | more
    state = {name: torch.tensor([value]) for name, value in vectors.items() if name != "step"}
    seen = Seen(True, torch.tensor([int(more.get("step", 10))]))
    hit, score, _ = AdaCache().decide(seen, state, named, torch.tensor(options.table))
    return bool(hit), float(score)


@pytest.mark.parametrize(
    ("rate", "interval"),
    [(0.0, 12), (0.029, 12), (0.031, 10), (0.06, 8), (0.08, 6), (0.1, 4), (0.12, 3), (0.99, 3), (1.5, 3)],
)
def test_the_codebook_of_adacache(rate: float, interval: int) -> None:
    assert [decided(rate, run)[0] for run in range(13)] == [run + 1 < interval for run in range(13)]
    assert CODEBOOK[0] == (0.03, 12)


def test_motion_of_adacache() -> None:
    # without frames, and at the ends of the generation, motion is 1
    assert decided(0.05, 0)[1] == pytest.approx(0.05)
    assert decided(0.05, 0, difference=0.77, steps=100.0, step=3)[1] == pytest.approx(0.05)
    # at the reference it is 1 too; where it was 1 before, nothing turned
    assert decided(0.05, 0, difference=0.385)[1] == pytest.approx(0.05)
    # twice the reference: 2 ** 8, and ten times its turn over the gap
    assert decided(0.05, 0, difference=0.77, motion=256.0)[1] == pytest.approx(0.05 * 256)
    assert decided(0.05, 0, difference=0.77, motion=254.0, gap=5.0)[1] == pytest.approx(0.05 * (256 + 10 * 2 / 5))
    # what stands still is reused for longest
    assert decided(0.9, 10, difference=0.1, motion=0.0)[0] and not decided(0.9, 10)[0]


def test_what_the_middle_block_measures() -> None:
    half, frames = MiddleBlock(), Frames(dim=1, start=1, count=3, size=2)
    assert half.places([(1, 7, 4)] * 4) == (1, 2) and half.places([(1, 7, 4), (1, 9, 4), (1, 9, 4)]) == (1, 2)
    assert half.places([(1, 7, 4), (1, 9, 4)]) == ()
    x = torch.tensor([9.0, 1, 1, 2, 2, 4, 4]).reshape(1, 7, 1)
    (now,) = half.looked([torch.zeros(1, 7, 1), x])
    found = half.measure(Seen(True, torch.zeros(1)), [now], [now / 1.5], torch.tensor([2.0]), frames)
    assert float(found["rate"]) == pytest.approx(0.25)
    assert float(found["difference"]) == pytest.approx((1 + 2) / (2 + 4 + 1 + 2))
    assert float(half.measure(Seen(True, torch.zeros(1)), [now], [now], torch.ones(1), None)["difference"]) == -1


def test_what_all_blocks_measure() -> None:
    half = AllBlocks()
    assert half.places([(1, 2, 3)] * 4) == (1, 2, 3)
    now = [torch.full((2, 3, 4), value) for value in (1.0, 3.0)]
    before = [torch.full((2, 3, 4), value) for value in (2.0, 2.0)]
    assert half.measure(Seen(True, torch.zeros(2)), now, before, torch.ones(2), None)["change"].tolist() == [0.5, 0.5]


def test_a_tenth_of_the_steps_is_reused() -> None:
    options = CacheOptions.model_validate({"policy": "bwcache"})
    named = {name: torch.tensor(value) for name, value in options.controls().items()}
    for steps, longest in ((50.0, 5), (30.0, 3), (4.0, 1)):
        named["steps"] = torch.tensor(steps)
        hits = []
        for run in range(7):
            state = {"change": torch.tensor([0.1]), "run": torch.tensor([float(run)]), "first": torch.zeros(1)}
            hits.append(bool(BWCache().decide(Seen(True, torch.tensor([9])), state, named, torch.zeros(0))[0]))
        assert hits == [run < longest for run in range(7)]


def test_frames_of_videos_are_found_and_said(captured: Callable[..., list[Any]]) -> None:
    (capture,) = captured("wan", "export")
    options = CacheOptions.model_validate({"policy": "adacache"})
    found = rewrite(_copy(capture), Plan(fuse=False), (MarkBorders(options),))
    assert "motion over 3 frames" in found.reports[-1].details


def test_steps_must_be_known() -> None:
    for cache in ({"policy": "bwcache"}, {"policy": "adacache"}):
        options = CacheOptions.model_validate(cache).controls()
        with pytest.raises(ValueError, match="which steps are the last"):
            Controls(tuple(options), tuple(options.values())).values({}, None)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"policy": "adacache", "threshold": 0.1}, "codebook"),
        ({"policy": "adacache", "codebook": [[0.2, 3], [0.1, 2]]}, "rates go up"),
        ({"policy": "adacache", "codebook": [[0.2, 0]]}, "at least 1"),
        ({"policy": "adacache", "motion": [0.0, 1.0, 1.0]}, "the first above 0"),
        ({"policy": "bwcache", "codebook": [[0.2, 3]]}, "belongs to"),
        ({"policy": "teacache", "storage": "int7"}, "nvfp4"),
    ],
)
def test_refusals(cache: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(cache=cache)


def test_plans_are_stable_text() -> None:
    plan = Plan(cache={"policy": "adacache", "codebook": [[0.1, 3], [1.0, 1]], "motion": []})
    assert Plan.from_toml(plan.to_toml()) == plan
