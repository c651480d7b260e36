"""Every sampler step by step against diffusers' scheduler of the same name, on the same noise."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditc.runtime.samplers import (
    alpha_bars,
    draw_noise,
    euler_step,
    exponential_shift,
    flow_map_step,
    flow_sigmas,
    lcm_step,
    lcm_timesteps,
    linear_shift,
    renoise_flow_step,
    tcd_landing,
    tcd_step,
    terminal_shift,
    token_mu,
    trigflow_step,
)

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 4, 4)
SEEDS = [11, 12]


def field(x: Tensor, level: float) -> Tensor:
    """A model's output: it depends on the sample and on time, so that a wrong state or a wrong time shows."""
    return torch.sin(x) + 0.3 * x.flip(-1) + level


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Feeds the schedulers our noise: the k-th draw of a module's `randn_tensor` is that of step k."""

    def feed(module: str) -> None:
        drawn = iter(range(1000))

        def randn_tensor(shape: Any, **kwargs: Any) -> Tensor:
            assert tuple(shape) == (len(SEEDS), *SHAPE)
            return draw_noise(SEEDS, SHAPE, step=next(drawn))

        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", randn_tensor)

    yield feed


def walk(scheduler: Any, x: Tensor, timesteps: Any) -> Iterator[tuple[int, Any, Tensor, Tensor]]:
    """The scheduler's own trajectory: (step, timestep, the sample before, the sample after)."""
    for step, timestep in enumerate(timesteps):
        after = scheduler.step(field(x, float(timestep) / 1000), timestep, x, return_dict=False)[0]
        yield step, timestep, x, after
        x = after


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("steps", [2, 4, 28])
@pytest.mark.parametrize("terminal", [None, 0.02, 0.1])
@pytest.mark.parametrize(("kind", "mu"), [("exponential", 0.5), ("exponential", 1.15), ("linear", 2.5)])
def test_dynamic_and_terminal_shifts(steps: int, terminal: float | None, kind: str, mu: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    sigmas = (exponential_shift if kind == "exponential" else linear_shift)(flow_sigmas(steps).double(), mu)
    if terminal is not None:
        sigmas = terminal_shift(sigmas, terminal)
        assert float(sigmas[-2]) == pytest.approx(terminal, abs=1e-12)
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=1e-6, atol=2e-7)
    x = draw_noise(SEEDS, SHAPE)
    for step, timestep, before, after in walk(scheduler, x, scheduler.timesteps):
        velocity = field(before, float(timestep) / 1000)
        close(euler_step(before, velocity, float(sigmas[step]), float(sigmas[step + 1])), after)


@pytest.mark.parametrize("tokens", [256, 1024, 3600, 4096, 9216])
def test_mu_of_a_resolution(tokens: int) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    assert token_mu(tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 5.0), (8, 3.0)])
@pytest.mark.parametrize("scheme", ["FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_renoising_of_a_flow(scheme: str, steps: int, shift: float, fresh: Any) -> None:
    stochastic = {"stochastic_sampling": True} if "Euler" in scheme else {}
    scheduler = getattr(diffusers, scheme)(shift=shift, **stochastic)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    fresh("scheduling_flow_match_lcm" if "LCM" in scheme else "scheduling_flow_match_euler_discrete")
    sigmas = flow_sigmas(steps, shift)
    x = ours = draw_noise(SEEDS, SHAPE)
    for step, timestep, _, after in walk(scheduler, x, scheduler.timesteps):
        noise = None if step == steps - 1 else draw_noise(SEEDS, SHAPE, step=step)
        velocity = field(ours, float(timestep) / 1000)
        ours = renoise_flow_step(ours, velocity, noise, float(sigmas[step]), float(sigmas[step + 1]))
        close(ours, after, 2e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm(prediction: str, steps: int, fresh: Any) -> None:
    name = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction]
    scheduler = diffusers.LCMScheduler(prediction_type=name)
    scheduler.set_timesteps(steps)
    fresh("scheduling_lcm")
    grid, bars = lcm_timesteps(steps), alpha_bars().tolist()
    assert scheduler.timesteps.tolist() == list(grid[:-1])
    x = draw_noise(SEEDS, SHAPE)
    for step, _, before, after in walk(scheduler, x, scheduler.timesteps):
        t, following = grid[step], grid[step + 1]
        noise = None if step == steps - 1 else draw_noise(SEEDS, SHAPE, step=step)
        ours = lcm_step(before, field(before, t / 1000), noise, t, bars[t], bars[following], prediction)  # type: ignore[arg-type]
        # diffusers multiplies a thousand alphas up in fp32
        close(ours, after, 3e-5)


def test_lcm_on_the_published_list_of_sdxl_dmd2(fresh: Any) -> None:
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    fresh("scheduling_lcm")
    grid, bars = (999, 749, 499, 249, 0), alpha_bars().tolist()
    for step, _, before, after in walk(scheduler, draw_noise(SEEDS, SHAPE), scheduler.timesteps):
        noise = None if step == 3 else draw_noise(SEEDS, SHAPE, step=step)
        t = grid[step]
        close(lcm_step(before, field(before, t / 1000), noise, t, bars[t], bars[grid[step + 1]]), after, 3e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd(prediction: str, eta: float, steps: int, fresh: Any) -> None:
    name = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction]
    scheduler = diffusers.TCDScheduler(prediction_type=name)
    scheduler.set_timesteps(steps)
    fresh("scheduling_tcd")
    grid, bars = lcm_timesteps(steps), alpha_bars().tolist()
    assert scheduler.timesteps.tolist() == list(grid[:-1])
    x = draw_noise(SEEDS, SHAPE)
    for step, timestep in enumerate(scheduler.timesteps):
        t, following = grid[step], grid[step + 1]
        output = field(x, t / 1000)
        after = scheduler.step(output, timestep, x, eta=eta, return_dict=False)[0]
        noise = None if step == steps - 1 or eta == 0 else draw_noise(SEEDS, SHAPE, step=step)
        landing = tcd_landing(following, eta)
        ours = tcd_step(x, output, noise, bars[t], bars[landing], bars[following], prediction)  # type: ignore[arg-type]
        close(ours, after, 3e-5)
        x = after


def test_tcd_lands_where_diffusers_does() -> None:
    timesteps = torch.arange(1000)
    for eta in (0.0, 0.25, 0.3, 0.5, 1.0):
        theirs = torch.floor((1 - eta) * timesteps).long().tolist()
        assert [tcd_landing(t, eta) for t in range(1000)] == theirs


@pytest.mark.parametrize(
    "arguments", [{"num_inference_steps": 2}, {"num_inference_steps": 1}, {"num_inference_steps": 4}]
)
def test_trigflow(arguments: dict[str, Any], fresh: Any) -> None:
    scheduler = diffusers.SCMScheduler()
    steps = arguments["num_inference_steps"]
    scheduler.set_timesteps(**arguments, **({} if steps == 2 else {"intermediate_timesteps": None}))
    fresh("scheduling_scm")
    angles = [float(angle) for angle in scheduler.timesteps]
    if steps == 2:
        assert angles == pytest.approx([1.5708, 1.3, 0], abs=1e-6)
    x = 0.5 * draw_noise(SEEDS, SHAPE)
    for step, (angle, following) in enumerate(pairwise(angles)):
        output = field(x, angle)
        after, x0 = scheduler.step(output * 0.5, scheduler.timesteps[step], x, return_dict=False)
        noise = draw_noise(SEEDS, SHAPE, step=step)
        close(trigflow_step(x, output, noise, angle, following, 0.5), after)
        close(trigflow_step(x, output, None, angle, following, 0.5), x0)
        x = after


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_flow_map(shift: float) -> None:
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    sigmas = flow_sigmas(4, shift).double()
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=1e-6, atol=0)
    x = draw_noise(SEEDS, SHAPE)
    for step, timestep, before, after in walk(scheduler, x, scheduler.timesteps):
        u = field(before, float(timestep) / 1000)
        close(flow_map_step(before, u, float(sigmas[step]), float(sigmas[step + 1])), after)
    # any target, not only the next of the list
    jumped = scheduler.step(field(x, 1.0), scheduler.timesteps[0], x, r_timestep=0.0, return_dict=False)[0]
    close(flow_map_step(x, field(x, 1.0), 1.0, 0.0), jumped)


def test_the_table_of_alphas() -> None:
    for name in ("linear", "scaled_linear"):
        theirs = diffusers.LCMScheduler(beta_schedule=name, beta_start=1e-4, beta_end=0.02).alphas_cumprod
        torch.testing.assert_close(alpha_bars(name, 1e-4, 0.02).float(), theirs, rtol=2e-5, atol=0)  # type: ignore[arg-type]
    assert float(alpha_bars()[999]) == pytest.approx(math.exp(torch.log1p(-_betas()).sum().item()), rel=1e-12)


def _betas() -> Tensor:
    return torch.tensor(
        [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * k / 999) ** 2 for k in range(1000)], dtype=torch.float64
    )
