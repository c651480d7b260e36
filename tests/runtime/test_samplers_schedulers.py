"""Generation by diffusers' schedulers, dropped in: each behaves as in its own loop, and leaves nothing behind."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditc.runtime.generate import Cancelled, Guidance, generate
from ditc.runtime.samplers import Sampler, SamplerError, draw_noise, flow_sigmas, lcm_timesteps, published
from ditc.runtime.samplers.noise import step_seed

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 4)


def field(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    """A smooth model that depends on its own sample, the time and the condition."""
    return torch.tanh(x + 0.3 * x.flip(-1)) * (1 + timestep.view(-1, 1, 1, 1) / 1000) + condition.view(-1, 1, 1, 1)


def draw(seeds: list[int], **more: Any) -> Tensor:
    condition = torch.tensor([float(seed % 97) for seed in seeds]) / 100
    return generate(field, condition, seeds=seeds, shape=SHAPE, **more)


def test_the_flow_scheduler_gives_what_sigmas_give() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    # its own grid is linear in the shifted levels, so hand it ours
    given = {"sigmas": np.linspace(1, 1 / 6, 6).tolist()}
    result = draw([1, 2], scheduler=scheduler, scheduler_options=given)
    torch.testing.assert_close(result, draw([1, 2], sigmas=flow_sigmas(6, 3.0)), rtol=1e-5, atol=1e-5)
    plain = diffusers.FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(draw([1, 2], scheduler=plain, sigmas=flow_sigmas(6, 3.0)), result, rtol=1e-5, atol=1e-5)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    options = {**given, "mu": math.log(3.0)}
    torch.testing.assert_close(draw([1, 2], scheduler=dynamic, scheduler_options=options), result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DDIMScheduler", {}),
        ("DDPMScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("FlowMatchLCMScheduler", {"shift": 5.0}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
    ],
)
def test_schedulers_can_be_dropped_in(name: str, arguments: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**arguments)
    before, noise = copy.deepcopy(scheduler.__dict__), torch.get_rng_state()
    told: list[tuple[int, int]] = []
    first = draw([1, 2], scheduler=scheduler, steps=4, progress=lambda *at: told.append(at))
    calls = told[-1][1]
    assert told == [(step + 1, calls) for step in range(calls)]
    assert torch.equal(torch.get_rng_state(), noise)
    # nothing is left in the caller's object, so the second generation equals the first, also after one that stopped
    assert repr(scheduler.__dict__) == repr(before)
    with pytest.raises(Cancelled):
        draw([1, 2], scheduler=scheduler, steps=4, progress=lambda done, total: done < 2)
    assert torch.equal(draw([1, 2], scheduler=scheduler, steps=4), first)
    assert torch.equal(draw([1], scheduler=scheduler, steps=4), first[:1])
    assert torch.equal(draw([2], scheduler=scheduler, steps=4), first[1:])
    nothing = torch.tensor([-0.2, -0.3])
    batched = draw([1, 2], scheduler=scheduler, steps=4, guidance=Guidance(2.0, nothing))
    branches = draw([1, 2], scheduler=scheduler, steps=4, guidance=Guidance(2.0, nothing, batched=False))
    torch.testing.assert_close(batched, branches, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batched, first, rtol=1e-2)


def test_a_schedulers_trajectory_is_the_one_of_its_own_loop() -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    result = draw([7], scheduler=scheduler, steps=5)
    scheduler.set_timesteps(5)
    x = draw_noise([7], SHAPE) * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        output = field(scheduler.scale_model_input(x, timestep), timestep.expand(1), torch.tensor([0.07]))
        generator = torch.Generator().manual_seed(step_seed(7, step))
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    torch.testing.assert_close(result, x, rtol=1e-5, atol=1e-4)


def test_previews_with_a_scheduler() -> None:
    seen: list[Tensor] = []
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    draw([1], scheduler=scheduler, steps=3, preview=lambda i, n, x0: seen.append(x0))
    assert [x0.shape for x0 in seen] == [(1, *SHAPE)] * 3
    with pytest.raises(SamplerError, match="no estimate of the data"):
        flow = diffusers.FlowMatchEulerDiscreteScheduler()
        draw([1], scheduler=flow, steps=3, preview=lambda i, n, x0: None)


def test_schedulers_that_would_change_or_ignore_the_sigmas_are_refused() -> None:
    sigmas = flow_sigmas(4, 5.0)
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
    ):
        with pytest.raises(SamplerError, match=r"made \[.*of the sigmas \[1.0, 0.9375.*does not shift them"):
            draw([1], scheduler=scheduler, sigmas=sigmas)
    with pytest.raises(SamplerError, match="set_timesteps knows no 'sigmas'"):
        draw([1], scheduler=diffusers.DDIMScheduler(), sigmas=sigmas)
    with pytest.raises(SamplerError, match="knows no 'mew'"):
        draw([1], scheduler=diffusers.DDIMScheduler(), steps=4, scheduler_options={"mew": 1.0})
    with pytest.raises(SamplerError, match="needs steps, or sigmas"):
        draw([1], scheduler=diffusers.DDIMScheduler())
    with pytest.raises(SamplerError, match="kind='trigflow'"):
        draw(
            [1],
            scheduler=diffusers.SCMScheduler(),
            steps=4,
            scheduler_options={"intermediate_timesteps": None},
        )
    with pytest.raises(ValueError, match="leave timesteps away"):
        draw([1], scheduler=diffusers.DDIMScheduler(), steps=4, timesteps=1)
    with pytest.raises(SamplerError, match="object is no scheduler: it has no set_timesteps"):
        draw([1], scheduler=object(), steps=4)


def test_a_scheduler_that_draws_from_the_global_generator_is_refused() -> None:
    class Careless:
        timesteps = torch.tensor([999.0, 499.0])

        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            pass

        def step(self, output: Tensor, timestep: Tensor, x: Tensor) -> tuple[Tensor]:
            return (x - output + torch.randn_like(x),)

    with pytest.raises(SamplerError, match="Careless draws noise from torch's global generator"):
        draw([1], scheduler=Careless(), steps=2)


TCD: dict[str, Any] = {
    **{"role": "student", "kind": "tcd", "process": "vp", "solver": "sde", "prediction": "eps", "eta": 0.3},
    **{"steps": 4, "timesteps": lcm_timesteps(4), "betas": {}, "timestep_scale": 1.0},
}


@pytest.mark.parametrize(
    ("sampler", "scheduler", "request_"),
    [
        (published("sdxl-dmd2-4step"), "LCMScheduler", {"scheduler_options": {"timesteps": [999, 749, 499, 249]}}),
        (Sampler(**TCD), "TCDScheduler", {"steps": 4}),
        (published("self-forcing"), "FlowMatchLCMScheduler", {"sigmas": published("self-forcing").resolve()}),
        (published("fastwan"), "FlowMatchLCMScheduler", {"sigmas": published("fastwan").resolve()}),
        (
            published("ltx-2-distilled"),
            "FlowMatchEulerDiscreteScheduler",
            {"sigmas": published("ltx-2-distilled").resolve()},
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_manifest_and_the_scheduler_of_its_model_draw_the_same_samples(
    sampler: Sampler, scheduler: str, request_: dict[str, Any]
) -> None:
    # the noise of a step is the same for both: it is the seed's
    theirs = draw([1, 2], scheduler=getattr(diffusers, scheduler)(), **request_)
    torch.testing.assert_close(draw([1, 2], sampler=sampler), theirs, rtol=1e-3, atol=1e-3)


def test_the_exponential_shift_of_qwen_image_lightning() -> None:
    sampler = published("qwen-image-lightning-4step")
    mu = math.log(3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=mu, max_shift=mu)
    options = {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": mu}
    # its pipeline divides the timestep by 1000
    wanted = generate(
        lambda x, t, c: field(x, t / 1000, c),
        torch.tensor([0.01]),
        seeds=[1],
        shape=SHAPE,
        scheduler=scheduler,
        scheduler_options=options,
    )
    torch.testing.assert_close(draw([1], sampler=sampler), wanted, rtol=1e-5, atol=1e-5)
