"""Schedules and the Euler step, against closed forms and step by step against diffusers' scheduler."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditc.runtime.samplers import check_sigmas, draw_noise, euler_step, flow_sigmas, static_shift


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0])
def test_the_trajectory_is_that_of_diffusers(steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    sigmas = flow_sigmas(steps, shift)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=3e-7, atol=0)
    generator = torch.Generator().manual_seed(steps)
    ours = theirs = torch.randn(2, 3, 4, 4, generator=generator)
    for i, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(1000 * sigmas[i], timestep, rtol=3e-7, atol=0)
        # a field that depends on the sample and on time, so that a wrong state or a wrong time shows
        velocity = torch.sin(ours) + timestep / 1000
        ours = euler_step(ours, velocity, sigmas[i], sigmas[i + 1])
        theirs = scheduler.step(torch.sin(theirs) + timestep / 1000, timestep, theirs, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_published_schedule_of_wan_comes_out() -> None:
    # linspace at four steps, shift 5: the list that the distilled Wan and Self-Forcing checkpoints were trained on
    torch.testing.assert_close(flow_sigmas(4, 5.0), torch.tensor([1.0, 0.9375, 0.8333333, 0.625, 0.0]))


@given(st.integers(1, 300), st.floats(0.05, 20))
def test_a_schedule_falls_from_one_to_zero(steps: int, shift: float) -> None:
    sigmas = flow_sigmas(steps, shift)
    assert sigmas.dtype == torch.float32
    assert len(sigmas) == steps + 1
    assert float(sigmas[0]) == 1
    check_sigmas(sigmas)


@given(st.floats(0, 1), st.floats(0.05, 20))
def test_the_inverse_shift_undoes_a_shift(sigma: float, shift: float) -> None:
    there = static_shift(torch.tensor(sigma, dtype=torch.float64), shift)
    assert float(static_shift(there, 1 / shift)) == pytest.approx(sigma, abs=1e-12)


@given(st.integers(1, 60), st.floats(0.2, 10), st.integers(0, 2**32))
def test_a_constant_velocity_is_integrated_exactly(steps: int, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    sigmas = flow_sigmas(steps, shift).double()
    x = noise
    for sigma, following in pairwise(sigmas):
        x = euler_step(x, noise - data, sigma, following)
    torch.testing.assert_close(x, data, rtol=0, atol=1e-12)


def test_euler_is_of_first_order() -> None:
    def error(steps: int) -> float:
        x = torch.ones(1, dtype=torch.float64)
        sigmas = flow_sigmas(steps).double()
        for sigma, following in pairwise(sigmas):
            x = euler_step(x, x, sigma, following)
        return abs(float(x) - float(torch.tensor(-1.0, dtype=torch.float64).exp()))

    assert error(400) / error(800) == pytest.approx(2, rel=0.01)


def test_a_half_precision_velocity_is_widened() -> None:
    x = euler_step(torch.ones(3), torch.ones(3, dtype=torch.bfloat16), 0.5, 0.499)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.full((3,), 0.999))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_trajectory_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="fp32"):
        euler_step(torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype), 1.0, 0.5)


def test_a_velocity_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        euler_step(torch.ones(2, 3), torch.ones(3), 1.0, 0.5)


@pytest.mark.parametrize(
    ("sigmas", "reason"),
    [
        (torch.tensor([1.0]), "shape"),
        (torch.tensor([[1.0, 0.0]]), "shape"),
        (torch.tensor([1, 0]), "floating"),
        (torch.tensor([1.0, 0.5]), "end at 0"),
        (torch.tensor([1.5, 0.0]), r"\[0, 1\]"),
        (torch.tensor([1.0, float("nan"), 0.0]), r"\[0, 1\]"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), "strictly"),
        (torch.tensor([0.5, 1.0, 0.0]), "strictly"),
    ],
)
def test_what_is_no_schedule_is_refused(sigmas: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_sigmas(sigmas)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shift_that_is_not_positive_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        flow_sigmas(4, shift)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        flow_sigmas(0)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6))
def test_noise_depends_on_the_own_seed_alone(seeds: list[int]) -> None:
    together = draw_noise(seeds, (1, 2, 3))
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i : i + 1], draw_noise([seed], (1, 2, 3)))


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    noise = draw_noise([1, 2], (50_000,))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(noise[0], noise[1])
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("seeds", [[], [-1], [2**63], [1.0], [True]])
def test_seeds_that_are_none_are_refused(seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="seed"):
        draw_noise(seeds, (2,))
