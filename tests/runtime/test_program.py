"""Programs: state is carried within a trajectory and a branch, and survives nothing it should not."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ditc.kernels.errors import WeightError
from ditc.runtime.artifact import Artifact, Gauge, Manifest, Piece, StateEntry, StateSpec
from ditc.runtime.program import Program
from ditc.runtime.session import branch, end_generation, session

MANIFEST = Manifest("", "", {}, "dynamo")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    end_generation()
    yield
    end_generation()


def counting(fail_at: float | None = None) -> Program:
    """Returns x + n at the n-th step of a trajectory, counted in its state; raises at a timestep after counting."""

    def segment(x: Tensor, timestep: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        count = count + 1
        if fail_at is not None and float(timestep[0]) == fail_at:
            raise RuntimeError("the step fails")
        return x + count, count

    state = StateSpec((StateEntry("count", (1,), torch.float32),))
    return Artifact((segment,), state, MANIFEST, data_inputs=(0,), timestep=1).load()


def step(program: Program, time: float, shape: tuple[int, ...] = (2,)) -> float:
    (out,) = program(torch.zeros(shape), torch.full((shape[0],), time))
    return float(out.reshape(-1)[0])


def test_steps_of_a_generation_share_state_and_the_next_starts_anew() -> None:
    program = counting()
    assert [step(program, t) for t in (900, 600, 300, 900, 600)] == [1, 2, 3, 1, 2]


def test_guidance_branches_by_timestep_and_by_name() -> None:
    program = counting()
    assert [step(program, t) for t in (900, 900, 600, 600)] == [1, 1, 2, 2]
    with session():
        for expected, t in ((1, 900), (2, 600)):
            for name in ("cond", "uncond"):
                with branch(name):
                    assert step(program, t) == expected


def test_interleaved_requests_with_sessions() -> None:
    program = counting()
    with session() as a:
        assert step(program, 900) == 1
    with session() as b:
        assert step(program, 900) == 1
    for expected, t in ((2, 600), (3, 300)):
        for request in (b, a):
            with session(request):
                assert step(program, t) == expected


def test_a_step_that_raises_leaves_the_state_of_before() -> None:
    program = counting(fail_at=600)
    with session():
        assert step(program, 900) == 1
        with pytest.raises(RuntimeError, match="the step fails"):
            step(program, 600)
        assert step(program, 300) == 2


def test_another_resolution_computes() -> None:
    program = counting()
    with session():
        assert step(program, 900) == 1
        assert step(program, 600, (3,)) == 1
        assert step(program, 300) == 2


def test_threads_do_not_share_state() -> None:
    program = counting()
    results: dict[int, list[float]] = {}

    def work(number: int) -> None:
        results[number] = [step(program, t) for t in (900, 600, 300)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [[1, 2, 3]] * 4


def test_inference_mode_and_normal_mode_mix() -> None:
    program = counting()
    with session():
        with torch.inference_mode():
            assert step(program, 900) == 1
        assert step(program, 600) == 2


def test_segments_run_in_order_and_inputs_are_picked() -> None:
    artifact = Artifact(
        (lambda x, packed: (x * packed,), lambda y: (y + 1,)),
        StateSpec(),
        MANIFEST,
        prepare=(Piece(lambda w: (w * 10,), (0,), (0,), "times ten"),),
        prepare_inputs=(1,),
        kept_inputs=(0,),
        data_inputs=(0,),
    )
    (out,) = artifact.load()(torch.tensor([2.0]), torch.tensor([3.0]))
    assert float(out) == 2 * 30 + 1


def test_a_weight_that_is_not_finite_is_named() -> None:
    artifact = Artifact(
        (lambda x, scale: (x * scale,),),
        StateSpec(),
        MANIFEST,
        prepare=(Piece(lambda w: (w.amax(),), (0,), (0,), "amax", ((0, "blocks.3.up.weight"),)),),
        prepare_inputs=(1,),
        kept_inputs=(0,),
        data_inputs=(0,),
    )
    program = artifact.load()
    weight = torch.tensor([1.0, float("nan")])
    with pytest.raises(WeightError, match=r"blocks\.3\.up\.weight holds NaN or infinity"):
        program(torch.ones(1), weight)
    weight.fill_(2.0)
    assert float(program(torch.ones(1), weight)[0]) == 2.0


def test_state_spec() -> None:
    spec = StateSpec((StateEntry("valid", (2,), torch.bool), StateEntry("residual", (2, 8), torch.bfloat16)))
    assert spec.bytes == 2 + 32
    initial = spec.initial(torch.device("cpu"))
    assert not initial[0].any()
    spec.check(initial)
    with pytest.raises(ValueError, match="layout"):
        spec.check(initial[:1])
    with pytest.raises(ValueError, match="different names"):
        StateSpec((spec.entries[0], spec.entries[0]))


def measuring(precise_first: int = 0) -> Program:
    """Returns x and measures the mean and the maximum of it, beside one entry of state."""
    value = torch.empty(2)

    def segment(weight: Tensor, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value.copy_(torch.stack([x.mean(), x.amax()]))  # as a CUDA graph overwrites what it returned
        return x * weight, value, count + 1

    def exact(weight: Tensor, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return x * weight, count + 1

    state = StateSpec((StateEntry("count", (1,), torch.float32),))
    more = Artifact((exact,), state, MANIFEST, data_inputs=(1,)) if precise_first else None
    return Artifact(
        (segment,), state, MANIFEST, owner=0, data_inputs=(1,), gauges=(Gauge("x", ("mean", "max")),),
        precise=more, precise_first=precise_first,
    ).load()  # fmt: skip


def measured(program: Program, *owners: Tensor) -> dict[str, dict[str, float]]:
    return program.gauges_by({id(owner): owner for owner in owners})


@pytest.mark.parametrize("inference", [False, True])
def test_gauges_are_means_over_calls_of_one_owner(inference: bool) -> None:
    program, one, two = measuring(), torch.ones(1), torch.ones(1)
    assert measured(program, one) == {}
    with torch.inference_mode(inference), session():
        (out,) = program(one, torch.tensor([1.0, 3.0]))
        program(one, torch.tensor([5.0, 7.0]))
        program(two, torch.tensor([0.0, 1.0]))
    program(two, torch.tensor([1.0, 2.0]))
    assert out.tolist() == [1.0, 3.0]
    assert measured(program, one) == {"x": {"mean": 4.0, "max": 5.0}}
    assert measured(program, two) == {"x": {"mean": 1.0, "max": 1.5}}
    assert measured(program, one, two) == {"x": {"mean": 2.5, "max": 3.25}}


def test_precise_steps_measure_nothing() -> None:
    program, owner = measuring(precise_first=1), torch.ones(1)
    with session() as current:
        for value in (9.0, 2.0):
            (out,) = program(owner, torch.full((2,), value))
            assert out.tolist() == [value] * 2
        assert current.bytes() == 4, "the state goes on, the gauges are none of it"
    assert measured(program, owner) == {"x": {"mean": 2.0, "max": 2.0}}
