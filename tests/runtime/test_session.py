"""Sessions: state of one trajectory and branch, never of another."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.runtime.session import (
    MOST_BRANCHES,
    Session,
    Slot,
    Trajectory,
    branch,
    current_branch,
    current_session,
    end_generation,
    find_slot,
    session,
)

SHAPE = ((2, 4),)


class Program:
    """Stands for a compiled program: sessions only need its identity."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    end_generation()
    yield
    end_generation()


def steps(timesteps: list[float], program: object, branches: int = 1) -> list[Slot]:
    found = []
    for timestep in timesteps:
        for _ in range(branches):
            slot = find_slot(program, SHAPE, timestep)
            slot.commit(())
            found.append(slot)
    return found


@pytest.mark.parametrize("timesteps", [[1000, 750, 500, 250], [0.0, 0.25, 0.5, 0.75]])
def test_one_generation_is_one_slot_whichever_way_time_runs(timesteps: list[float]) -> None:
    slots = steps(timesteps, Program())
    assert len({id(slot) for slot in slots}) == 1
    assert slots[0].calls == 4


@given(
    st.lists(st.integers(1, 999), min_size=1, max_size=6, unique=True), st.integers(1, MOST_BRANCHES), st.integers(2, 3)
)
def test_generations_and_branches_never_share(times: list[int], branches: int, generations: int) -> None:
    program = Program()
    timesteps = [1000.0, *map(float, sorted(times, reverse=True))]
    seen: list[set[int]] = []
    alive = []
    for _ in range(generations):
        slots = steps(timesteps, program, branches)
        alive.append(slots)  # identities are only comparable while all of them live
        for index in range(branches):
            assert len({id(slot) for slot in slots[index::branches]}) == 1
        seen.append({id(slot) for slot in slots})
        assert len(seen[-1]) == branches
    for a in range(generations):
        for b in range(a):
            assert not seen[a] & seen[b]


def test_repeated_single_steps_are_never_a_continuation_for_long() -> None:
    program = Program()
    slots = steps([500.0] * (3 * MOST_BRANCHES), program)
    assert all(slot.calls == 1 for slot in slots)


def test_nan_and_missing_timesteps_begin_anew() -> None:
    for timestep in (float("nan"), None):
        program = Program()
        a = find_slot(program, SHAPE, timestep)
        assert find_slot(program, SHAPE, timestep) is not a


def test_trajectory_restarts_on_reversal() -> None:
    trajectory = Trajectory()
    generations = [trajectory.observe(t)[0] for t in (1000.0, 600.0, 200.0, 1000.0, 600.0)]
    assert generations == [1, 1, 1, 2, 2]


def test_sessions_separate_and_resume() -> None:
    program = Program()
    with session("a") as a:
        first = find_slot(program, SHAPE, 1000.0)
    with session("b") as b:
        assert find_slot(program, SHAPE, 1000.0) is not first
    with session(a) as again:
        assert again is a
        assert find_slot(program, SHAPE, 900.0) is first
        a.reset()
        assert find_slot(program, SHAPE, 900.0) is not first
    assert a is not b
    assert current_session() is None


def test_branches_and_shapes_separate() -> None:
    program = Program()
    with session():
        with branch("cond"):
            cond = find_slot(program, SHAPE, 1.0)
            assert current_branch() == "cond"
        with branch("uncond"):
            assert find_slot(program, SHAPE, 1.0) is not cond
        with branch("cond"):
            assert find_slot(program, SHAPE, 0.5) is cond
            assert find_slot(program, ((2, 9),), 0.5) is not cond
            assert find_slot(Program(), SHAPE, 0.5) is not cond
    assert current_branch() is None


def test_named_branches_without_a_session_follow_their_own_timesteps() -> None:
    program = Program()
    found: dict[str, list[Slot]] = {"cond": [], "uncond": []}
    for timestep in (1000.0, 500.0, 1000.0):
        for name, slots in found.items():
            with branch(name):
                slots.append(find_slot(program, SHAPE, timestep))
    for slots in found.values():
        assert slots[0] is slots[1]
        assert slots[2] is not slots[0]
    assert found["cond"][0] is not found["uncond"][0]


def test_threads_do_not_share() -> None:
    program = Program()
    mine = find_slot(program, SHAPE, 1000.0)
    theirs: list[Slot] = []
    thread = threading.Thread(target=lambda: theirs.append(find_slot(program, SHAPE, 900.0)))
    thread.start()
    thread.join()
    assert theirs[0] is not mine


def test_an_exception_leaves_the_session() -> None:
    with pytest.raises(RuntimeError, match="step"), session(), branch("cond"):
        raise RuntimeError("step")
    assert current_session() is None
    assert current_branch() is None


def test_a_program_that_is_gone_frees_its_state() -> None:
    state = Session()
    program = Program()
    state.slot(program, None, SHAPE)
    assert len(state._slots) == 1
    del program
    assert len(state._slots) == 0
