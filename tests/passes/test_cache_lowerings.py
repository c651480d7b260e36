"""Three ways to lower a cache guard: one truth, and what each of them promises beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import ditc
from ditc.passes.backend import _copy
from ditc.passes.cache.rows import Mixed, Rows, Walk
from ditc.passes.capture import capture_export
from ditc.passes.errors import PassError, PlanError
from ditc.passes.pipeline import rewrite
from ditc.passes.plan import Plan
from ditc.runtime.branched import Arm, Branched, Part
from ditc.runtime.guards import ONE_GRAPH, GuardStep
from ditc.runtime.hosted import Remembered
from ditc.runtime.program import programs_of

Options = Mapping[str, Any]
STEPS = 6
POLICIES: Mapping[str, Options] = {
    "first-block": {"policy": "first-block", "back": 1, "order": 1},
    "teacache": {"policy": "teacache"},
    "easycache": {"policy": "easycache"},
    "magcache": {"policy": "magcache", "ratios": [1.0, 0.95, 1.02, 0.97, 0.99, 1.0], "order": 1},
    "fixed": {"policy": "fixed", "interval": 3},
    "fixed, growing": {"policy": "fixed", "scope": "model", "growth": 1.5, "order": 1},
    "bwcache": {"policy": "bwcache", "threshold": 0.2, "max_run": 1, "last": 0, "storage": "int8"},
}
HOST = ("magcache", "fixed", "fixed, growing")


def compiled(model: nn.Module, cache: Options, **plan: Any) -> Callable[..., Tensor]:
    options = {"cache": dict(cache), "lower": "eager", "fuse": False, **plan}
    found: Callable[..., Tensor] = torch.compile(
        model, backend="ditc", options=options, fullgraph=True, dynamic=plan.pop("dynamic", False)
    )
    return found


def latents(batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, batch, 4, 4, 4, generator=generator)
    speed = torch.linspace(0.3, 3.0, batch).reshape(-1, 1, 1, 1)
    return [start + speed * i / STEPS * end for i in range(STEPS)]


def step(model: Callable[..., Tensor], x: Tensor, i: int) -> Tensor:
    return model(x, torch.full((len(x),), 900.0 - 100 * i))


def draw(model: Callable[..., Tensor], inputs: list[Tensor], **session: Any) -> list[Tensor]:
    with torch.no_grad(), ditc.session(steps=len(inputs), **session):
        return [step(model, x, i) for i, x in enumerate(inputs)]


def decided(model: nn.Module, number: int) -> list[GuardStep]:
    """The last steps of the program that was made as the ``number``-th."""
    program = programs_of(model)[number]
    guard = program.guard_by({id(p): p for p in model.parameters()})
    assert guard is not None
    return list(guard.steps[-STEPS:])


@pytest.fixture
def model(make_dit: Callable[..., nn.Module]) -> nn.Module:
    torch._dynamo.reset()
    return make_dit(depth=3)


@pytest.mark.parametrize("name", POLICIES)
def test_lowerings_agree_step_by_step(model: nn.Module, name: str) -> None:
    lowerings = ["cond", "split", *(["schedule"] if name in HOST else [])]
    functions = [compiled(model, POLICIES[name] | {"lowering": lowering}) for lowering in lowerings]
    for function in functions:
        draw(function, latents(2))  # compiles, in this order

    @settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
    @given(
        threshold=st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 1e9]),
        warmup=st.integers(0, 4),
        max_run=st.integers(0, 3),
        last=st.integers(0, 2),
        seed=st.integers(0, 3),
    )
    def agree(threshold: float, warmup: int, max_run: int, last: int, seed: int) -> None:
        cache = {"threshold": threshold, "warmup": max(warmup, 2), "max_run": max_run, "last": last}
        found = [draw(function, latents(2, seed), cache=cache) for function in functions]
        steps = [decided(model, number) for number in range(len(functions))]
        for mine, his in zip(found[1:], steps[1:], strict=True):
            assert [s.hits for s in his] == [s.hits for s in steps[0]]
            assert [s.run for s in his] == [s.run for s in steps[0]]
            for a, b, one, other in zip(mine, found[0], his, steps[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-5, equal_nan=True)

    agree()


@pytest.mark.parametrize(
    ("name", "lowering"), [("first-block", "split"), ("easycache", "split"), *((n, "schedule") for n in HOST)]
)
def test_a_guard_that_never_reuses_changes_no_bit(model: nn.Module, name: str, lowering: str) -> None:
    inputs = latents(3)
    guarded = compiled(model, POLICIES[name] | {"lowering": lowering, "warmup": STEPS})
    with torch.inference_mode():
        exact = draw(model, inputs)
        assert all(map(torch.equal, draw(guarded, inputs), exact))


def branched(model: nn.Module) -> Branched:
    (segment,) = programs_of(model)[-1].artifact.segments
    assert isinstance(segment, Branched)
    return segment


@contextmanager
def runs(part: Part, run: Callable[..., Any]) -> Iterator[None]:
    before = part.run
    object.__setattr__(part, "run", run)
    try:
        yield
    finally:
        object.__setattr__(part, "run", before)


def test_only_what_is_missing_is_computed(model: nn.Module) -> None:
    guarded, inputs = compiled(model, {"policy": "first-block", "threshold": 0.45}), latents(3)
    exact = draw(guarded, inputs)
    program, seen = branched(model), list[int]()
    assert [arm.capacity for arm in program.arms] == [0, 1, 2, 3]

    def counting(arm: Arm) -> Callable[..., Any]:
        run = arm.part.run
        return lambda *values: (seen.append(arm.capacity), run(*values))[1]

    for arm in program.arms:
        object.__setattr__(arm.part, "run", counting(arm))
    again = draw(guarded, inputs)
    steps = decided(model, 0)
    assert all(map(torch.equal, again, exact))
    assert seen == [3 - sum(s.hits) for s in steps] and {1, 2} & set(seen)
    # each sample is what it is alone
    alone = compiled(model, {"policy": "first-block", "threshold": 0.45})
    for i in range(3):
        for one, all_ in zip(draw(alone, [x[i : i + 1] for x in inputs]), exact, strict=True):
            torch.testing.assert_close(all_[i : i + 1], one, rtol=1e-5, atol=1e-5)


class Blend(nn.Module):
    """A transformer whose samples see each other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        for block in inner.blocks:  # type: ignore[union-attr]
            block.down.register_forward_hook(lambda _m, _i, y: y + 0.1 * y.mean(0, keepdim=True))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        found: Tensor = self.inner(hidden_states, timestep)
        return found


def test_samples_that_see_each_other_are_computed_together(model: nn.Module) -> None:
    mixing, inputs = Blend(model).eval(), latents(2)
    guarded = compiled(mixing, {"policy": "first-block", "threshold": 0.45})
    draw(guarded, inputs)
    program = programs_of(mixing)[-1]
    assert [arm.capacity for arm in branched(mixing).arms] == [0, 2]
    assert any("mean" in text and "along the samples" in text for text in program.artifact.manifest.reports[-1].details)


def test_walk_knows_rows_from_the_rest() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        heads = (x @ w).unflatten(-1, (2, 3)).transpose(1, 2)
        joined = x.reshape(-1, 6)
        return heads, joined, joined.view(2, 5, 6), x.sum(0), x.flip(0), torch.cat([x, x], 1), x.view(5, 2, 6)

    graph = torch.fx.experimental.proxy_tensor.make_fx(f, pre_dispatch=True)(torch.zeros(2, 5, 6), torch.zeros(6, 6))
    x, w = graph.graph.find_nodes(op="placeholder")
    walk = Walk(2, {x: Rows(0), w: None})
    walk.run(graph.graph.nodes)
    heads, joined, apart, total, flipped, longer, turned = (walk.layouts[n] for n in graph.graph.output_node().args[0])
    assert (heads, joined, apart, longer) == (Rows(0), Rows(0, 5), Rows(0), Rows(0))
    assert all(isinstance(found, Mixed) for found in (total, flipped, turned))


class _Caught(fx.Interpreter):
    """Runs a guarded graph up to its branch and keeps what that is given."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.cond:
            self.operands = args[3]
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize(("name", "fewer"), [("flux", True), ("wan", True)])
def test_fewer_samples_give_their_rows(name: str, fewer: bool, captured: Callable[..., list[Any]]) -> None:
    capture = _copy(captured(name)[-1])
    plan = Plan(quantize="int8", cache={"policy": "first-block", "lowering": "split"})
    rewritten = rewrite(capture, plan)
    assert rewritten.guard is not None and rewritten.prologue is not None
    assert bool(rewritten.guard.partial) == fewer, rewritten.reports[-1].details
    if not fewer:
        return
    weights = rewritten.prologue.graph(*(capture.examples[i] for i in rewritten.prologue.inputs))
    state = rewritten.state.initial(torch.device("cpu"))
    caught = _Caught(rewritten.graph)
    with torch.no_grad():
        caught.run(*capture.examples, *weights, *state, torch.tensor(rewritten.controls.values({}, None)))
        ((room, branch),) = rewritten.guard.partial
        hit = rewritten.guard.branches.operands.index(rewritten.guard.decided.hit)
        for mask in ([True, False], [False, True]):
            operands = list(caught.operands)
            operands[hit] = torch.tensor(mask)
            for mine, right in zip(branch(*operands), rewritten.guard.branches.compute(*operands), strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)
    assert room == 1


@pytest.mark.parametrize(("name", "lowering"), [("first-block", "split"), ("fixed", "schedule")])
def test_an_exception_amid_a_step_leaves_the_state_of_before(model: nn.Module, name: str, lowering: str) -> None:
    guarded, inputs = compiled(model, POLICIES[name] | {"lowering": lowering, "max_run": 1}), latents(2)
    cache = {"threshold": 0.45}
    exact = draw(guarded, inputs, cache=cache)
    program = branched(model)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no memory left")

    parts = [*(arm.part for arm in program.arms), *program.after]
    with torch.no_grad(), ditc.session(steps=STEPS, cache=cache):
        for i, x in enumerate(inputs):
            for part in parts:
                # an arm that this step does not take would let it pass
                before = [run.part.run for run in program.arms]
                for other in program.arms if part in [arm.part for arm in program.arms] else ():
                    object.__setattr__(other.part, "run", fail)
                with runs(part, fail), pytest.raises(RuntimeError, match="no memory left"):
                    step(guarded, x, i)
                for arm, run in zip(program.arms, before, strict=True):
                    object.__setattr__(arm.part, "run", run)
            assert torch.equal(step(guarded, x, i), exact[i])


@pytest.mark.parametrize("name", ["first-block", "magcache"])
def test_threads_and_branches_keep_apart(model: nn.Module, name: str) -> None:
    guarded = compiled(model, POLICIES[name])
    cache = {"threshold": 0.3}
    exact = {seed: draw(guarded, latents(2, seed), cache=cache) for seed in range(2)}
    wrong: list[Any] = []

    def work(seed: int) -> None:
        with torch.no_grad(), ditc.session(steps=STEPS, cache=cache):
            for i, x in enumerate(latents(2, seed)):
                for branch in ("cond", "uncond"):
                    with ditc.branch(branch):
                        wrong.extend([] if torch.equal(step(guarded, x, i), exact[seed][i]) else [(seed, i, branch)])

    threads = [threading.Thread(target=partial(work, seed)) for seed in exact]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_times_are_told(model: nn.Module) -> None:
    inputs = latents(2)
    for lowering in ("cond", "split"):
        guarded = compiled(model, POLICIES["first-block"] | {"lowering": lowering})
        for threshold in (0.0, 1e9):
            draw(guarded, inputs, cache={"threshold": threshold})
        guard = ditc.stats(model).programs[-1].guard
        assert guard is not None
        if lowering == "cond":
            assert guard.time is None and guard.untimed == ONE_GRAPH
    assert guard.time is not None and guard.untimed is None
    assert 0 <= guard.time.reuse < guard.time.compute and guard.time.saved > 0 and guard.time.spent > 0
    assert ("costs more" in " ".join(guard.warnings)) == (guard.time.spent > guard.time.saved)


@pytest.mark.parametrize("policy", ["first-block", "teacache", "easycache"])
def test_a_schedule_that_data_decide_is_refused(model: nn.Module, policy: str) -> None:
    with pytest.raises(Exception, match=r"'schedule' is impossible .* depends on 'hidden_states'.* alone; use 'split'"):
        draw(compiled(model, {"policy": policy, "lowering": "schedule"}), latents(1))


def test_automatic_choice(model: nn.Module) -> None:
    for name, lowering in (("first-block", "split"), ("fixed", "schedule")):
        draw(compiled(model, POLICIES[name]), latents(1))
        assert any(lowering in text for text in programs_of(model)[-1].artifact.manifest.reports[-1].details)


def test_what_was_exported_stays_one_graph(model: nn.Module) -> None:
    example = (latents(1)[0], torch.tensor([900.0]))
    rewritten = rewrite(capture_export(model, example), Plan(cache={"policy": "fixed"}))
    assert rewritten.guard is not None and rewritten.guard.lowering == "cond"
    with pytest.raises(PassError, match=r"after torch\.export.*use 'cond'"):
        rewrite(capture_export(model, example), Plan(cache={"policy": "fixed", "lowering": "schedule"}))


def test_refusals() -> None:
    with pytest.raises(PlanError, match="'cond', 'split', 'schedule' or 'auto'"):
        Plan(cache={"policy": "fixed", "lowering": "host"})
    part = Part(lambda x: (x,), (0,), (0,))
    for arms in ((), (Arm(2, part), Arm(1, part)), (Arm(0, part), Arm(1, Part(part.run, (0,), (0, 0))))):
        with pytest.raises(ValueError, match="arms"):
            Branched((), 0, arms, (), (0,))


def test_a_schedule_tells_of_nan(model: nn.Module) -> None:
    inputs = latents(1)
    inputs[3] = inputs[3] * float("nan")
    draw(compiled(model, POLICIES["fixed"]), inputs)
    guard = ditc.stats(model).programs[-1].guard
    assert guard is not None and [s.finite for s in guard.steps] == [(True,)] * 3 + [(False,)] + [(True,)] * 2
    assert any("NaN" in warning for warning in guard.warnings)


def test_state_is_copied_where_parts_overwrite_what_they_returned() -> None:
    place = torch.zeros(2)

    def overwrites(x: Tensor) -> tuple[Tensor]:
        return (place.copy_(x),)

    compute, reuse = Arm(1, Part(overwrites, (1,), (0,))), Arm(0, Part(overwrites, (1,), (-2,)))
    program = Branched((), 0, (reuse, compute), (), (1, 2), copied=1)
    _, kept = program(torch.tensor(1), torch.ones(2))
    place.fill_(5.0)
    assert kept.tolist() == [1.0, 1.0]
    # what is passed on is nobody's to overwrite: it is not copied
    assert program(torch.tensor(0), kept)[1] is kept


def test_what_the_host_knows_it_does_not_compute_again() -> None:
    calls: list[Tensor] = []
    known = Remembered(lambda x: (calls.append(x), (x + 1,))[1])
    assert [known(torch.tensor([float(i % 2)]))[0].item() for i in range(6)] == [1.0, 2.0] * 3 and len(calls) == 2
