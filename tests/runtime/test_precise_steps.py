"""precise_first and precise_last: some steps of a generation run without quantisation, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditc
from ditc.kernels.errors import DitcError
from ditc.runtime.artifact import Artifact, Manifest, StateEntry, StateSpec
from ditc.runtime.generate import Guidance, generate
from ditc.runtime.program import Program
from ditc.runtime.samplers import flow_sigmas
from ditc.runtime.session import branch, end_generation, session

MANIFEST = Manifest("", "", {}, "dynamo")
TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
QUANTIZED = {"quantize": "int8", "lower": "eager"}
PRECISE = {"lower": "eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    end_generation()
    yield
    torch._dynamo.reset()
    end_generation()


def compiled(model: nn.Module, options: dict[str, Any], **more: Any) -> Any:
    return torch.compile(model, backend="ditc", options={**options, **more})


class Trial:
    """One model and what its plans give at each of five steps on the same input."""

    def __init__(self, make_dit: Any, dit_inputs: Any, lower: str = "eager", size: int = 8) -> None:
        self.model, self.size = make_dit(depth=1), size
        self.inputs = [dit_inputs(size=size, time=time) for time in TIMES]
        with torch.no_grad():
            self.precise = [compiled(self.model, PRECISE, lower=lower)(*x) for x in self.inputs]
            self.quantized = [compiled(self.model, QUANTIZED, lower=lower)(*x) for x in self.inputs]
        for a, b in zip(self.precise, self.quantized, strict=True):
            assert not torch.equal(a, b), "quantisation must show for these tests to mean something"

    def kind(self, step: int, got: Tensor) -> str:
        if torch.equal(got, self.precise[step]):
            return "precise"
        assert torch.equal(got, self.quantized[step]), "neither the one nor the other"
        return "quantized"


def names(text: str) -> list[str]:
    return [{"p": "precise", "q": "quantized"}[letter] for letter in text]


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_named_steps_are_precise_and_nothing_recompiles(make_dit: Any, dit_inputs: Any, lower: str) -> None:
    trial = Trial(make_dit, dit_inputs, lower)
    run = compiled(trial.model, QUANTIZED, lower=lower, precise_first=2, precise_last=1)
    with torch.no_grad():
        for _ in range(2):
            with session(steps=5):
                found = [trial.kind(0, run(*trial.inputs[0]))]
                with torch._dynamo.config.patch(error_on_recompile=True):
                    found += [trial.kind(i, run(*trial.inputs[i])) for i in range(1, 5)]
            assert found == names("ppqqp")
    (program,) = [p for p in ditc.stats(run).programs if p.plan.precise_first]
    assert (program.calls, program.precise_calls) == (10, 6)
    assert "6 precise" in str(ditc.stats(run))


def test_interleaved_sessions_count_for_themselves(make_dit: Any, dit_inputs: Any) -> None:
    trial = Trial(make_dit, dit_inputs)
    run = compiled(trial.model, QUANTIZED, precise_first=2, precise_last=1)
    found: dict[str, list[str]] = {"a": [], "b": []}
    with torch.no_grad(), session("a", steps=5) as a, session("b", steps=4) as b:
        order = [a, b, b, a, a, b, a, b, a]
        for request in order:
            with session(request):
                label = str(request.request)
                step = len(found[label])
                found[label].append(trial.kind(step, run(*trial.inputs[step])))
    assert found == {"a": names("ppqqp"), "b": names("ppqp")}


def test_branches_of_guidance_count_separately(make_dit: Any, dit_inputs: Any) -> None:
    trial = Trial(make_dit, dit_inputs)
    run = compiled(trial.model, QUANTIZED, precise_first=1, precise_last=1)
    found: dict[str, list[str]] = {"cond": [], "uncond": []}
    with torch.no_grad(), session(steps=5):
        for step, inputs in enumerate(trial.inputs):
            for name in found:
                with branch(name):
                    found[name].append(trial.kind(step, run(*inputs)))
    assert found == {"cond": names("pqqqp"), "uncond": names("pqqqp")}


def test_first_steps_need_no_session(make_dit: Any, dit_inputs: Any) -> None:
    trial = Trial(make_dit, dit_inputs)
    run = compiled(trial.model, QUANTIZED, precise_first=2)
    with torch.no_grad():
        for _ in range(2):
            assert [trial.kind(i, run(*x)) for i, x in enumerate(trial.inputs)] == names("ppqqq")


def test_last_steps_need_to_know_the_number(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(depth=1), dit_inputs()
    run = compiled(model, QUANTIZED, precise_last=1)
    with torch.no_grad():
        with pytest.raises(DitcError, match=r"ditc\.session\(steps=.*ditc\.generate"):
            run(*inputs)
        with session(), pytest.raises(DitcError, match="which steps are the last"):
            run(*inputs)
        with session(steps=1):
            assert torch.equal(run(*inputs), compiled(model, PRECISE)(*inputs))


def test_generate_says_how_many_steps_there_are(make_dit: Any) -> None:
    model = make_dit(depth=1)
    runs = {key: compiled(model, options) for key, options in (("p", PRECISE), ("q", QUANTIZED))}
    mixed = compiled(model, QUANTIZED, precise_first=2, precise_last=1)
    done: list[int] = []

    def draw(denoise: Callable[[int, Tensor, Tensor, Tensor], Tensor], guidance: Guidance | None) -> Tensor:
        done.clear()
        return generate(
            lambda x, t, c: denoise(len(done), x, t, c),
            torch.zeros(2),
            seeds=[1, 2],
            shape=(4, 8, 8),
            sigmas=flow_sigmas(5),
            guidance=guidance,
            progress=lambda step, steps: done.append(step),
        )

    def bias(velocity: Tensor, c: Tensor) -> Tensor:
        return velocity + c.view(-1, 1, 1, 1)

    for guidance in (None, Guidance(2.0, torch.ones(2), batched=False), Guidance(2.0, torch.ones(2))):
        expected = draw(lambda step, x, t, c: bias(runs["ppqqp"[step]](x, t), c), guidance)
        assert torch.equal(draw(lambda step, x, t, c: bias(mixed(x, t), c), guidance), expected)


def marking(fail_at: float | None = None, **steps: int) -> Program:
    """Tells who ran, 1 (precise) or 0, and carries how many steps were done before."""

    def variant(mark: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        def segment(x: Tensor, timestep: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
            if fail_at is not None and float(timestep[0]) == fail_at:
                raise RuntimeError("the step fails")
            return torch.stack([torch.tensor(mark), count[0]]), count + 1

        return segment

    state = StateSpec((StateEntry("count", (1,), torch.float32),))
    precise = Artifact((variant(1.0),), state, MANIFEST, data_inputs=(0,), timestep=1)
    return Artifact((variant(0.0),), state, MANIFEST, data_inputs=(0,), timestep=1, precise=precise, **steps).load()


def step(program: Program, time: float) -> tuple[float, float]:
    (out,) = program(torch.zeros(2), torch.full((2,), time))
    return float(out[0]), float(out[1])


def test_a_step_that_fails_counts_for_nothing() -> None:
    program = marking(fail_at=650, precise_first=2, precise_last=1)
    with session(steps=5):
        assert step(program, 900) == (1, 0)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="the step fails"):
                step(program, 650)
        assert [step(program, t) for t in (700, 500, 300, 100)] == [(1, 1), (0, 2), (0, 3), (1, 4)]


def test_state_goes_from_one_variant_to_the_other() -> None:
    program = marking(precise_first=1, precise_last=0)
    assert [step(program, t) for t in (900, 600, 300)] == [(1, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(("first", "last", "expected"), [(3, 3, "ppppp"), (9, 0, "ppppp"), (0, 1, "qqqqp")])
def test_any_number_of_steps(first: int, last: int, expected: str) -> None:
    program = marking(precise_first=first, precise_last=last)
    with session(steps=5):
        assert "".join("qp"[int(step(program, t)[0])] for t in TIMES) == expected


def test_calls_beyond_the_announced_number_are_precise() -> None:
    program = marking(precise_last=1)
    with session(steps=2):
        assert [step(program, t)[0] for t in TIMES] == [0, 1, 1, 1, 1]


def test_variants_with_other_state_are_refused() -> None:
    def artifact(name: str, **more: Any) -> Artifact:
        state = StateSpec((StateEntry(name, (1,), torch.float32),))
        return Artifact((lambda *x: x,), state, MANIFEST, **more)

    with pytest.raises(ValueError, match="other state"):
        artifact("a", precise=artifact("b"), precise_first=1)
    with pytest.raises(ValueError, match="need a precise program"):
        artifact("a", precise_first=1)
    with pytest.raises(ValueError, match="needs precise steps"):
        artifact("a", precise=artifact("a"))


def test_sessions_know_their_steps() -> None:
    with session(steps=3) as opened:
        assert opened.steps == 3
    with session(opened) as again:
        assert again.steps == 3
    with pytest.raises(ValueError, match="opened with steps=3"), session(opened, steps=4):
        pass
    with pytest.raises(ValueError, match="at least one step"), session(steps=0):
        pass
    with session() as open_ended, session(open_ended, steps=7):
        assert open_ended.steps == 7


@pytest.mark.slow
def test_a_second_resolution_has_precise_steps_too(make_dit: Any, dit_inputs: Any) -> None:
    model = make_dit(depth=1)
    run = compiled(model, QUANTIZED, lower="inductor", precise_first=1, precise_last=1)
    exact = compiled(model, PRECISE, lower="inductor")
    with torch.no_grad():
        for size in (8, 6, 10):
            expected = [exact(*dit_inputs(size=size, time=time)) for time in TIMES]
            with session(steps=5):
                got = [run(*dit_inputs(size=size, time=time)) for time in TIMES]
            same = [torch.equal(a, b) for a, b in zip(expected, got, strict=True)]
            assert same == [True, False, False, False, True], size
