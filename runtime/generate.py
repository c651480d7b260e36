"""Generation: a denoiser called along a noise schedule, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .samplers import check_sigmas, draw_noise, euler_step
from .session import branch, session

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, ...), timestep (B,) fp32, condition (B, ...)) -> the velocity eps - x0, shape of x."""


class Cancelled(Exception):  # noqa: N818 - it is an outcome that the caller asked for, not an error
    """Raised by a progress callback, or for one that returned False, to stop a generation."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022): v = v_uncond + scale * (v_cond - v_uncond).

    `unconditional` is the condition of the branch without a class or prompt, with the shape of the conditional one.
    Scale 1 is no guidance and costs one call a step. `batched` runs both branches in one call of twice the batch;
    otherwise there are two calls, which a session tells apart as the branches "cond" and "uncond".
    """

    scale: float
    unconditional: Tensor
    batched: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= 100:
            raise ValueError(f"guidance scale must be in [0, 100], 1 for none; got {self.scale}")


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    condition: Tensor,
    *,
    seeds: Sequence[int],
    shape: Sequence[int],
    sigmas: Tensor,
    guidance: Guidance | None = None,
    timesteps: int = 1000,
    progress: Callable[[int, int], bool | None] | None = None,
) -> Tensor:
    """Generate one sample for each seed with flow Euler.

    The whole generation is one session, so state that a compiled denoiser keeps between steps begins and ends with it,
    also when it is cancelled or fails. Nothing is kept here: a second generation equals the first.

    Args:
        denoiser: predicts the velocity; called with timestep = timesteps * sigma.
        condition: (B, ...), on the device to run on.
        seeds: B integers; the noise of a sample depends on its own seed alone.
        shape: of one sample, without the batch.
        sigmas: (steps + 1,), falling to 0, as from `flow_sigmas`.
        guidance: classifier-free guidance; without it the denoiser sees the condition only.
        progress: called with (steps done, steps) after each step; False stops the generation with `Cancelled`.

    Returns:
        (B, *shape) fp32 on the device of `condition`.

    Raises:
        ValueError: where the arguments do not fit each other.
        FloatingPointError: where the result holds NaN or infinity.
        Cancelled: where `progress` asked for it.
    """
    check_sigmas(sigmas)
    if len(seeds) != len(condition):
        raise ValueError(f"one seed for each condition is needed: {len(seeds)} seeds, {len(condition)} conditions")
    if guidance is not None and guidance.unconditional.shape != condition.shape:
        raise ValueError(
            f"the unconditional branch must have the condition's shape {tuple(condition.shape)}; "
            f"got {tuple(guidance.unconditional.shape)}"
        )
    x = draw_noise(seeds, shape, device=condition.device)
    # the schedule is read on the host: no device synchronisation between steps
    levels = sigmas.to("cpu", torch.float32)
    steps = len(levels) - 1
    with session(steps=steps):
        for step in range(steps):
            sigma, following = levels[step], levels[step + 1]
            timestep = (timesteps * sigma).to(x.device).expand(len(x))
            velocity = _guided(denoiser, x, timestep, condition, guidance)
            x = euler_step(x, velocity, float(sigma), float(following))
            if progress is not None and progress(step + 1, steps) is False:
                raise Cancelled(f"generation was cancelled after step {step + 1} of {steps}")
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError("the generated samples hold NaN or infinity: the denoiser diverged")
    return x


def _guided(denoiser: Denoiser, x: Tensor, timestep: Tensor, condition: Tensor, guidance: Guidance | None) -> Tensor:
    if guidance is None or guidance.scale == 1:
        with branch("cond"):
            return denoiser(x, timestep, condition).float()
    if guidance.batched:
        both = denoiser(
            torch.cat((x, x)), torch.cat((timestep, timestep)), torch.cat((condition, guidance.unconditional))
        )
        conditional, unconditional = both.float().chunk(2)
    else:
        with branch("cond"):
            conditional = denoiser(x, timestep, condition).float()
        with branch("uncond"):
            unconditional = denoiser(x, timestep, guidance.unconditional).float()
    return unconditional + guidance.scale * (conditional - unconditional)
