"""The generation loop: guidance, seeds, sessions, cancellation."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ditc.runtime.generate import Cancelled, Denoiser, Guidance, generate
from ditc.runtime.samplers import draw_noise, flow_sigmas
from ditc.runtime.session import current_branch, current_session

SHAPE = (1, 2, 4, 4)


def denoise(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    """A field that mixes the pixels of a sample and depends on time and condition, but not on other samples."""
    level = (timestep / 1000).view(-1, 1, 1, 1, 1)
    return torch.tanh(x + 0.3 * x.flip(-1)) * (1 + level) + condition.view(-1, 1, 1, 1, 1)


def draw(
    seeds: list[int], denoiser: Denoiser = denoise, guidance: Guidance | None = None, steps: int = 5, **kwargs: object
) -> Tensor:
    condition = torch.tensor(seeds, dtype=torch.float32) / 10
    sigmas = flow_sigmas(steps, 3.0)
    return generate(denoiser, condition, seeds=seeds, shape=SHAPE, sigmas=sigmas, guidance=guidance, **kwargs)  # type: ignore[arg-type]


def test_the_loop_is_euler_along_the_schedule() -> None:
    seen: list[float] = []

    def watched(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        assert timestep.shape == (len(x),)
        seen.append(float(timestep[0]))
        return denoise(x, timestep, condition)

    result = draw([1, 2], watched)
    sigmas = flow_sigmas(5, 3.0)
    x = draw_noise([1, 2], SHAPE)
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * denoise(x, (1000 * sigma).expand(2), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(result, x, rtol=1e-6, atol=1e-6)
    assert seen == (1000 * sigmas[:-1]).tolist()


def test_a_velocity_toward_known_data_arrives_there() -> None:
    data = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9))
    noise = draw_noise([1, 2], SHAPE)
    torch.testing.assert_close(draw([1, 2], lambda x, t, c: noise - data), data, rtol=0, atol=1e-5)


def test_a_second_generation_equals_the_first() -> None:
    assert torch.equal(draw([3, 4, 5]), draw([3, 4, 5]))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    together = draw([3, 4, 5, 6])
    for i, seed in enumerate([3, 4, 5, 6]):
        torch.testing.assert_close(together[i : i + 1], draw([seed]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_batched_guidance_equals_two_branches(scale: float) -> None:
    nothing = torch.tensor([-0.2, -0.3])
    batched = draw([1, 2], guidance=Guidance(scale, nothing))
    branches = draw([1, 2], guidance=Guidance(scale, nothing, batched=False))
    torch.testing.assert_close(batched, branches, rtol=1e-6, atol=1e-6)
    if scale == 1:
        assert torch.equal(batched, draw([1, 2]))


def test_guidance_moves_away_from_the_unconditional() -> None:
    # the field is the condition alone, so x0 = noise - (uncond + scale * (cond - uncond))
    guidance = Guidance(3.0, torch.tensor([0.5]))
    result = draw([1], lambda x, t, c: c.view(-1, 1, 1, 1, 1).expand_as(x), guidance)
    torch.testing.assert_close(result, draw_noise([1], SHAPE) - (0.5 + 3 * (0.1 - 0.5)), rtol=0, atol=1e-5)


def test_branches_and_session_are_set_around_the_calls() -> None:
    seen: list[tuple[int, str | None]] = []

    def watched(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        assert current_session() is not None
        seen.append((id(current_session()), current_branch()))
        return denoise(x, timestep, condition)

    draw([1], watched, Guidance(2.0, torch.zeros(1), batched=False), steps=2)
    assert [name for _, name in seen] == ["cond", "uncond", "cond", "uncond"]
    assert len({session for session, _ in seen}) == 1
    draw([1], watched, Guidance(2.0, torch.zeros(1)), steps=2)
    assert [name for _, name in seen[4:]] == [None, None]
    draw([1], watched, steps=1)
    assert seen[-1][1] == "cond"
    assert current_session() is None


@pytest.mark.parametrize("way", ["false", "raise", "denoiser"])
def test_a_generation_that_stops_leaves_nothing_behind(way: str) -> None:
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> bool:
        steps.append((done, total))
        if done == 2 and way == "raise":
            raise Cancelled("by the caller")
        return not (done == 2 and way == "false")

    def failing(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        if way == "denoiser" and len(steps) == 2:
            raise RuntimeError("out of memory")
        return denoise(x, timestep, condition)

    before, state = draw([1, 2]), torch.get_rng_state()
    with pytest.raises(RuntimeError if way == "denoiser" else Cancelled):
        draw([1, 2], failing, Guidance(2.0, torch.zeros(2), batched=False), progress=progress)
    assert steps == [(1, 5), (2, 5)]
    assert current_session() is None
    assert current_branch() is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.equal(draw([1, 2]), before)


def test_progress_is_told_every_step() -> None:
    told: list[tuple[int, int]] = []
    draw([1], steps=3, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_half_precision_denoiser_still_gives_fp32() -> None:
    assert draw([1], lambda x, t, c: x.bfloat16()).dtype == torch.float32


def test_a_denoiser_that_diverges_is_reported() -> None:
    with pytest.raises(FloatingPointError, match="diverged"):
        draw([1], lambda x, t, c: x / 0)


def test_arguments_that_do_not_fit_are_refused() -> None:
    condition, sigmas = torch.zeros(2), flow_sigmas(2)
    with pytest.raises(ValueError, match="one seed for each"):
        generate(denoise, condition, seeds=[1], shape=SHAPE, sigmas=sigmas)
    with pytest.raises(ValueError, match="condition's shape"):
        generate(denoise, condition, seeds=[1, 2], shape=SHAPE, sigmas=sigmas, guidance=Guidance(2.0, torch.zeros(1)))
    with pytest.raises(ValueError, match="strictly"):
        generate(denoise, condition, seeds=[1, 2], shape=SHAPE, sigmas=torch.tensor([0.5, 1.0, 0.0]))
    for scale in (-1.0, 101.0, float("nan")):
        with pytest.raises(ValueError, match="guidance scale"):
            Guidance(scale, condition)
