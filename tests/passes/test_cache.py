"""Cache guards: what they skip, what they keep, and that a guard that never reuses changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ditc
from ditc.passes.backend import UntouchedWarning
from ditc.passes.cache.forecast import differences, forecast
from ditc.passes.cache.policy import Fixed, Seen
from ditc.passes.cache.rules import RULES
from ditc.passes.errors import PlanError
from ditc.passes.plan import Plan

Options = Mapping[str, Any]
STEPS = 8
EVERY: Mapping[str, Options] = {
    "first-block": {"policy": "first-block"},
    "dbcache": {"policy": "first-block", "front": 1, "back": 1},
    "teacache": {"policy": "teacache"},
    "teacache, polynomial": {"policy": "teacache", "polynomial": [2.0, 0.5, 0.0]},
    "easycache": {"policy": "easycache"},
    "magcache": {"policy": "magcache", "ratios": [1.0] * STEPS},
    "bwcache": {"policy": "bwcache", "max_run": STEPS, "last": 0},
    "teacache, model": {"policy": "teacache", "scope": "model"},
    "magcache, model": {"policy": "magcache", "scope": "model", "ratios": [1.0] * STEPS},
}


def compiled(model: nn.Module, cache: Options, **plan: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    options = {"cache": dict(cache), "lower": "eager", "fuse": False, **plan}
    found: Callable[..., Tensor] = torch.compile(model, backend="ditc", options=options, fullgraph=True)
    return found


def latents(batch: int = 1, seed: int = 0, size: int = 8) -> list[Tensor]:
    """What a model sees along a trajectory: it changes slowly, faster for later samples of a batch."""
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, batch, 4, size, size, generator=generator)
    speed = torch.linspace(0.3, 3.0, batch).reshape(-1, 1, 1, 1)
    return [start + speed * i / STEPS * end for i in range(STEPS)]


def draw(
    model: Callable[..., Tensor], inputs: list[Tensor], request: str | None = None, **session: Any
) -> list[Tensor]:
    with torch.no_grad(), ditc.session(request, steps=len(inputs), **session):
        return [model(x, torch.full((len(x),), 900.0 - 100 * i)) for i, x in enumerate(inputs)]


def reused(outputs: list[Tensor], exact: list[Tensor]) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(outputs, exact, strict=True)]


@pytest.fixture
def model(make_dit: Callable[..., nn.Module]) -> nn.Module:
    return make_dit(depth=4)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_guard_that_never_reuses_changes_no_bit(model: nn.Module, name: str, batch: int) -> None:
    inputs = latents(batch)
    exact = draw(compiled(model, EVERY[name] | {"warmup": STEPS}), inputs)
    assert all(map(torch.equal, exact, draw(model, inputs)))
    if "magcache" not in name:  # whose error is zero where magnitudes do not change
        assert all(map(torch.equal, exact, draw(compiled(model, EVERY[name] | {"threshold": 0.0}), inputs)))


@pytest.mark.parametrize("name", EVERY)
def test_a_guard_that_always_reuses_replays(model: nn.Module, name: str) -> None:
    inputs = [latents()[0]] * STEPS
    guarded = compiled(model, EVERY[name] | {"threshold": 1e9})
    with torch.no_grad(), ditc.session():
        outputs = [guarded(x, torch.tensor([500.0])) for x in inputs]
    for later in outputs[1:]:
        torch.testing.assert_close(later, outputs[0], rtol=1e-4, atol=1e-5)
    computed = compiled(model, EVERY[name] | {"warmup": 3, "threshold": 1e9})
    # the timestep moves on: what is reused does not see it, whatever else runs
    replay, exact = draw(computed, latents()), draw(model, latents())
    assert reused(replay, exact) == [False] * 3 + [True] * (STEPS - 3)


def test_thresholds_order_the_reuse(model: nn.Module) -> None:
    inputs = latents()
    exact = draw(model, inputs)
    guarded = compiled(model, {"policy": "first-block"})
    counts = [sum(reused(draw(guarded, inputs, cache={"threshold": t}), exact)) for t in (0.0, 0.3, 0.5, 1e9)]
    assert counts == sorted(counts) and counts[0] == 0 < counts[1] < counts[2] <= counts[3] == STEPS - 1, counts
    assert ditc.stats(model).programs == ditc.stats(model).programs[:1], "a threshold compiles nothing anew"


def test_fixed_intervals_and_longest_runs(model: nn.Module) -> None:
    inputs = latents()
    exact = draw(model, inputs)
    every_third = compiled(model, {"policy": "fixed", "interval": 3})
    assert reused(draw(every_third, inputs), exact) == [False, True, True, False, True, True, False, True]
    assert reused(draw(every_third, inputs, cache={"max_run": 1}), exact)[:3] == [False, True, False]
    assert reused(draw(every_third, inputs, cache={"warmup": 5}), exact) == [False] * 5 + [True, False, True]
    last = draw(every_third, inputs, cache={"last": 2})
    assert reused(last, exact) == [False, True, True, False, True, True, False, False]
    growing = draw(every_third, inputs, cache={"interval": 1.0, "growth": 2.0})  # at 0, 1, 3, 7
    assert reused(growing, exact) == [False, False, True, False, True, True, True, False]


@settings(max_examples=200, deadline=None)
@given(interval=st.integers(1, 9), growth=st.sampled_from(["1", "1.1", "1.25", "1.3", "1.5", "2", "4"]))
def test_intervals_grow_as_powers(interval: int, growth: str) -> None:
    steps = 300
    places, length = [Fraction(interval)], Fraction(interval)
    while places[-1] < steps:
        length *= Fraction(growth)
        places.append(places[-1] + length)
    # a place that lies behind a step by next to nothing is that step
    wanted = {math.ceil(place - length * Fraction(1, 20_000)) for place in places}
    numbers = {"interval": torch.tensor(float(interval)), "growth": torch.tensor(float(growth))}
    reuses, score, _ = Fixed().decide(Seen(True, torch.arange(steps)), {}, numbers, torch.zeros(0))
    assert {i for i in range(1, steps) if not reuses[i]} == {place for place in wanted if place < steps}
    assert ((score >= 0) & (score < 1)).all()


@pytest.mark.parametrize(("policy", "threshold"), [("first-block", 0.45), ("teacache", 0.3), ("easycache", 0.1)])
def test_a_batch_is_its_samples(model: nn.Module, policy: str, threshold: float) -> None:
    guarded = compiled(model, {"policy": policy, "threshold": threshold})
    inputs = latents(3)
    together = draw(guarded, inputs)
    masks = []
    for i in range(3):
        own = [x[i : i + 1] for x in inputs]
        alone = draw(guarded, own)
        masks.append(tuple(reused(alone, draw(model, own))))
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(all_[i : i + 1], one, rtol=1e-5, atol=1e-5)
    assert len(set(masks)) > 1, "the samples decide differently, or this test shows nothing"


def test_generations_share_nothing(model: nn.Module) -> None:
    guarded = compiled(model, {"policy": "first-block", "threshold": 0.45})
    first, other = draw(guarded, latents()), draw(guarded, latents(seed=1))
    assert all(map(torch.equal, first, draw(guarded, latents())))
    assert all(map(torch.equal, other, draw(guarded, latents(seed=1))))
    assert torch.equal(other[0], model(latents(seed=1)[0], torch.tensor([900.0])))


def test_interleaved_requests_and_branches(model: nn.Module) -> None:
    guarded = compiled(model, {"policy": "first-block", "threshold": 0.45})
    runs = {seed: latents(seed=seed) for seed in range(2)}
    alone = {seed: draw(guarded, inputs) for seed, inputs in runs.items()}
    sessions = {seed: ditc.Session(steps=STEPS) for seed in runs}
    with torch.no_grad():
        for i in range(STEPS):
            for seed, inputs in runs.items():
                with ditc.session(sessions[seed]):
                    for name in ("cond", "uncond"):
                        with ditc.branch(name):
                            out = guarded(inputs[i], torch.tensor([900.0 - 100 * i]))
                        assert torch.equal(out, alone[seed][i])


@pytest.mark.parametrize(
    "cache",
    [
        {"policy": "first-block", "threshold": 1e9},
        {"policy": "fixed", "interval": 50},
        {"policy": "magcache", "ratios": [1.0], "threshold": 1e9},
    ],
)
def test_nan_is_computed_and_forgotten(model: nn.Module, cache: Options) -> None:
    guarded = compiled(model, cache)
    inputs = latents()
    inputs[3] = inputs[3] * float("nan")
    outputs = draw(guarded, inputs)
    assert [bool(o.isnan().any()) for o in outputs[:4]] == [False, False, False, True]
    # what NaN left behind is never reused: the step after it is computed
    assert torch.equal(outputs[4], draw(model, inputs)[4]) and not outputs[-1].isnan().any()


@pytest.mark.parametrize(
    "cache",
    [
        {"policy": "first-block", "threshold": 1e9, "order": 1},
        {"policy": "easycache", "threshold": 1e9},
        {"policy": "fixed", "interval": 50, "storage": "int8"},
    ],
)
def test_nan_that_arises_inside_is_forgotten(model: nn.Module, cache: Options) -> None:
    """What policies look at in front of the region is finite all the time."""
    guarded, inputs = compiled(model, cache), latents()
    with torch.no_grad(), ditc.session(steps=STEPS):
        outputs = []
        for i, x in enumerate(inputs):
            bias: Any = model.get_parameter("blocks.2.down.bias")
            kept = bias[0].item()
            bias[0] = float("nan") if i == 0 else kept
            outputs.append(guarded(x, torch.tensor([900.0 - 100 * i])))
            bias[0] = kept
    assert outputs[0].isnan().any() and not any(o.isnan().any() for o in outputs[1:])
    assert torch.equal(outputs[1], draw(model, inputs)[1])


def test_an_exception_leaves_the_state_of_before(model: nn.Module) -> None:
    guarded = compiled(model, {"policy": "first-block", "threshold": 0.45})
    inputs = latents()
    exact = draw(guarded, inputs)
    with torch.no_grad(), ditc.session(steps=STEPS):
        for i, x in enumerate(inputs):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                guarded(x[:, :3], torch.tensor([900.0]))
            assert torch.equal(guarded(x, torch.tensor([900.0 - 100 * i])), exact[i])


@pytest.mark.parametrize(
    ("size", "more"),
    [(4, {}), (8, {}), (12, {}), (12, {"storage": "int8"}), (12, {"policy": "bwcache", "max_run": 2, "last": 0})],
)
def test_resolutions(model: nn.Module, size: int, more: Options) -> None:
    guarded = compiled(model, {"policy": "first-block", "threshold": 0.45, **more})
    for each in (8, size, 8):
        inputs = latents(size=each)
        outputs = draw(guarded, inputs)
        exact = draw(model, inputs)
        assert torch.allclose(outputs[0], exact[0], atol=1e-5)
        assert any(reused(outputs, exact))


def test_int8_and_guards_stack(model: nn.Module) -> None:
    inputs = latents()
    plain = draw(compiled(model, {"policy": "first-block", "warmup": STEPS}, quantize="int8"), inputs)
    alone = draw(compiled_without(model, quantize="int8"), inputs)
    assert all(map(torch.equal, plain, alone))
    both = draw(compiled(model, {"policy": "first-block", "threshold": 0.45}, quantize="int8"), inputs)
    assert any(reused(both, plain))


def compiled_without(model: nn.Module, **plan: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    found: Callable[..., Tensor] = torch.compile(
        model, backend="ditc", options={"lower": "eager", "fuse": False, **plan}
    )
    return found


def test_inductor_agrees_with_eager(model: nn.Module) -> None:
    inputs = latents()
    cache = {"policy": "first-block", "threshold": 0.45}
    for mine, other in zip(
        draw(compiled(model, cache), inputs), draw(compiled(model, cache, lower="inductor"), inputs), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2), st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.lists(st.integers(1, 3), min_size=4))
def test_forecasts_are_exact_on_lines(order: int, coefficients: list[float], gaps: list[int]) -> None:
    degree = min(order, 1)
    value = lambda t: torch.tensor([[sum(c * t**i for i, c in enumerate(coefficients[: degree + 1]))]]).double()  # noqa: E731
    kept, t = [torch.zeros(1, 1, dtype=torch.float64)] * (order + 1), 0
    for gap in gaps:
        t += gap
        kept = differences(value(t), kept, torch.tensor([float(gap)]))
    for k in range(4):
        torch.testing.assert_close(forecast(kept, torch.tensor([float(k)])), value(t + k), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"policy": "teacahe"}, "teacache"),
        ({"policy": "first-block", "treshold": 1.0}, "treshold"),
        ({"policy": "first-block", "threshold": -1.0}, "greater than or equal to 0"),
        ({"policy": "first-block", "front": 0}, "at least 1"),
        ({"policy": "fixed", "threshold": 1.0}, "interval"),
        ({"policy": "fixed", "interval": 1}, "computes every step"),
        ({"policy": "fixed", "scope": "model", "front": 1}, "no front or back"),
        ({"policy": "first-block", "scope": "model"}, "scope 'blocks' and no other"),
        ({"policy": "easycache", "scope": "blocks"}, "scope 'model' and no other"),
        ({"policy": "fixed", "growth": 0.5}, "greater than or equal to 1"),
        ({"policy": "teacache", "growth": 1.5}, "belong to the policy 'fixed'"),
        ({"policy": "easycache", "back": 1}, "whole model"),
        ({"policy": "magcache"}, "needs ratios"),
        ({"policy": "first-block", "ratios": [1.0]}, "belongs to"),
        ({"policy": "teacache", "polynomial": [float("nan")]}, "no finite number"),
        ({"policy": "first-block", "order": 3}, "less than or equal to 2"),
    ],
)
def test_refusals(cache: Options, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(cache=dict(cache))


def test_plans_with_a_guard_are_stable_text() -> None:
    plan = Plan(cache={"policy": "teacache", "polynomial": [1.0, 2.0]})
    assert Plan.from_toml(plan.to_toml()) == plan
    assert Plan(cache=plan.cache.model_dump() if plan.cache else None).key() == plan.key()


def test_a_session_inside_another_begins_with_its_thresholds(model: nn.Module) -> None:
    guarded, inputs = compiled(model, {"policy": "first-block", "threshold": 0.0}), latents()
    with ditc.session(cache={"threshold": 1e9}):
        loose = draw(guarded, inputs)
        strict = draw(guarded, inputs, cache={"threshold": 0.0})
    exact = draw(guarded, inputs)
    assert reused(loose, exact) == [False] + [True] * (STEPS - 1) and not any(reused(strict, exact))


def test_controls_are_checked(model: nn.Module) -> None:
    guarded = compiled(model, {"policy": "first-block"})
    with pytest.raises(ditc.DitcError, match="no control 'treshold'"):
        draw(guarded, latents(), cache={"treshold": 1.0})
    with pytest.raises(ditc.DitcError, match="from 0 up"):
        draw(guarded, latents(), cache={"threshold": float("nan")})
    with pytest.raises(ditc.DitcError, match="session"), torch.no_grad():
        compiled(model, {"policy": "first-block", "last": 1})(latents()[0], torch.tensor([900.0]))


def test_decisions_are_reported(model: nn.Module) -> None:
    guarded = compiled(model, {"policy": "first-block", "threshold": 0.45})
    inputs = latents(2)
    exact = draw(model, inputs)
    outputs = draw(guarded, inputs, request="mine")
    guard = ditc.stats(model).programs[-1].guard
    assert guard is not None and [step.step for step in guard.steps] == list(range(STEPS))
    assert {step.request for step in guard.steps} == {"mine"}
    for step, mine, right in zip(guard.steps, outputs, exact, strict=True):
        for i in range(2):
            # a sample that is computed alone may differ in the last bits
            assert step.hits[i] == (not torch.allclose(mine[i], right[i], atol=1e-5))
            assert step.hits[i] == (step.step > 0 and step.scores[i] <= 0.45)
            assert (step.run[i] > 0) == step.hits[i]
    assert 0 < guard.hit_rate < 1 and any("steps" in w for w in guard.warnings)
    draw(guarded, inputs, cache={"threshold": 0.0})
    never = ditc.stats(guarded).programs[-1].guard
    assert never is not None and len(never.steps) == 2 * STEPS and never.hit_rate == guard.hit_rate / 2
    assert "reused" in str(ditc.stats(guarded))


def test_too_few_blocks_are_an_error(model: nn.Module) -> None:
    with pytest.raises(Exception, match="leave nothing of 4 blocks"):
        draw(compiled(model, {"policy": "first-block", "front": 2, "back": 2}), latents())


def test_a_graph_without_blocks_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    with torch.no_grad(), pytest.warns(UntouchedWarning, match="chain of repeated blocks"):
        assert torch.equal(compiled(model, {"policy": "first-block"})(x), model(x))


def test_every_policy_is_tested() -> None:
    assert {str(o["policy"]) for o in EVERY.values()} | {"fixed"} | {"adacache"} == set(RULES)
