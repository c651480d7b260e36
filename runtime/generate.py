"""Generation: a denoiser called along a noise schedule, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .samplers import check_sigmas, draw_noise
from .samplers.drive import Drive, SchedulerDrive, SolverDrive
from .samplers.errors import SamplerError
from .samplers.manifest import Sampler
from .samplers.solver import euler_solver, make_solver
from .session import branch, session

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, ...), timestep (B,) fp32, condition (B, ...)) -> the velocity eps - x0, shape of x.

Under a sampler manifest or a scheduler it predicts what these say. Flow maps are also given the keyword `target` (B,),
the time to jump to, and models with embedded guidance the keyword `guidance` (B,), its scale.
"""

Applied = Literal["embedded", "from_unconditional", "from_conditional"]
OFF = {"from_unconditional": 1.0, "from_conditional": 0.0}
"""The scale at which guidance by two branches does nothing, and one is called."""


class Cancelled(Exception):  # noqa: N818 - it is an outcome that the caller asked for, not an error
    """Raised by a callback, or for one that returned False, to stop a generation."""


@dataclass(frozen=True)
class Guidance:
    """Guidance of a generation.

    Attributes:
        scale: its strength; None for the default of the sampler's manifest.
        unconditional: the condition of the branch without a class or prompt, with the shape of the conditional one.
        batched: whether both branches run in one call of twice the batch; otherwise there are two calls, which a
            session tells apart as the branches "cond" and "uncond".
        convention: what the scale means. "from_unconditional", uncond + scale * (cond - uncond), is that of Ho &
            Salimans 2022 and the default where no manifest says another; 1 is no guidance and costs one call a step.
            "from_conditional" is cond + scale * (cond - uncond), off at 0. "embedded" hands the scale to the model.
    """

    scale: float | None
    unconditional: Tensor | None = None
    batched: bool = True
    convention: Applied | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 <= self.scale <= 100:
            raise ValueError(f"guidance scale must be in [0, 100], 1 for none; got {self.scale}")


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    condition: Tensor,
    *,
    seeds: Sequence[int],
    shape: Sequence[int],
    sigmas: Tensor | None = None,
    guidance: Guidance | None = None,
    timesteps: float | None = None,
    progress: Callable[[int, int], bool | None] | None = None,
    preview: Callable[[int, int, Tensor], bool | None] | None = None,
    sampler: Sampler | None = None,
    scheduler: Any = None,
    steps: int | None = None,
    tokens: int | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Generate one sample for each seed: with flow Euler along `sigmas`, by a sampler's manifest, or by a scheduler.

    The whole generation is one session, so state that a compiled denoiser keeps between steps begins and ends with it,
    also when it is cancelled or fails. Nothing is kept here: a second generation equals the first.

    Args:
        denoiser: predicts the velocity, or what the sampler or scheduler says; called with timestep = timesteps *
            sigma. If it has an attribute `sampler` that is a manifest, as students have, that manifest is obeyed.
        condition: (B, ...), on the device to run on.
        seeds: B integers; the noise of a sample, also that of single steps, depends on its own seed alone.
        shape: of one sample, without the batch.
        sigmas: (steps + 1,), falling to 0, as from `flow_sigmas`; final, no shift is applied to them.
        guidance: classifier-free guidance; without it the denoiser sees the condition only.
        timesteps: what a sigma is multiplied by for the denoiser, 1000 by default; a manifest says it itself.
        progress: called with (steps done, steps) after each step; False stops the generation with `Cancelled`.
        preview: called with (steps done, steps, estimate of the data (B, *shape)) after each step, likewise.
        sampler: manifest of the model; what contradicts it is refused.
        scheduler: object with diffusers' `set_timesteps`, `timesteps` and `step`; it is copied, not changed.
        steps: number of steps, where `sigmas` do not say it; a student's manifest knows one only.
        tokens: image tokens of a sample, for manifests whose shift depends on the resolution.
        scheduler_options: more arguments of the scheduler's `set_timesteps`, such as `mu`.

    Returns:
        (B, *shape) fp32 on the device of `condition`.

    Raises:
        ValueError: where the arguments do not fit each other.
        SamplerError: a ValueError that names what contradicts the manifest or the scheduler, and what would be right.
        FloatingPointError: where the result holds NaN or infinity.
        Cancelled: where a callback asked for it.
    """
    if len(seeds) != len(condition):
        raise ValueError(f"one seed for each condition is needed: {len(seeds)} seeds, {len(condition)} conditions")
    own = getattr(denoiser, "sampler", None)
    if sampler is None and isinstance(own, Sampler):
        sampler = own
    strength = _settle_guidance(guidance, sampler, condition)
    drive = _choose_drive(
        seeds, tuple(shape), condition.device, sigmas, timesteps, sampler, scheduler, steps, tokens, scheduler_options
    )
    x = drive.start(draw_noise(seeds, shape, device=condition.device))
    with session(steps=drive.steps):
        for step in range(drive.steps):
            output = _call(denoiser, drive, step, x, condition, strength)
            before, x = x, drive.advance(step, x, output)
            done = step + 1
            stop = progress is not None and progress(done, drive.steps) is False
            if not stop and preview is not None:
                stop = preview(done, drive.steps, drive.x0(step, before, output)) is False
            if stop:
                raise Cancelled(f"generation was cancelled after step {done} of {drive.steps}")
    x = drive.finish(x)
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError("the generated samples hold NaN or infinity: the denoiser diverged")
    return x


def _choose_drive(
    seeds: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device,
    sigmas: Tensor | None,
    timesteps: float | None,
    sampler: Sampler | None,
    scheduler: Any,
    steps: int | None,
    tokens: int | None,
    options: Mapping[str, Any] | None,
) -> Drive:
    if sigmas is not None:
        check_sigmas(sigmas)
        if steps is not None and steps != len(sigmas) - 1:
            raise ValueError(f"steps={steps} contradicts the {len(sigmas) - 1} steps of sigmas")
    if options is not None and scheduler is None:
        raise ValueError("scheduler_options are of a scheduler, and there is none")
    if sampler is not None:
        if scheduler is not None:
            raise SamplerError(
                f"{sampler.label} is sampled as its manifest says, so a {type(scheduler).__name__} has no place here: "
                "leave scheduler away"
            )
        if timesteps is not None and timesteps != sampler.timestep_scale:
            raise SamplerError(
                f"{sampler.label} is given {sampler.timestep_scale:g} times its levels, not {timesteps:g} times: leave "
                "timesteps away"
            )
        sampler.check_request(steps=steps, sigmas=sigmas, shape=shape, tokens=tokens)
        count = steps if sigmas is None else len(sigmas) - 1
        chosen = sampler if count is None else sampler.for_steps(count)
        return SolverDrive(make_solver(chosen, tokens), seeds, shape, device)
    if scheduler is not None:
        if timesteps is not None:
            raise ValueError("a scheduler has its own timesteps: leave timesteps away")
        return SchedulerDrive(scheduler, seeds, device, steps=steps, sigmas=sigmas, options=options)
    if sigmas is None:
        raise ValueError("generation needs sigmas (as from flow_sigmas), a sampler, or a scheduler")
    return SolverDrive(euler_solver(sigmas, 1000 if timesteps is None else timesteps), seeds, shape, device)


@dataclass(frozen=True)
class _Strength:
    """Guidance as it is applied: None for the scale where there is none."""

    convention: Applied = "from_unconditional"
    scale: float | None = None
    unconditional: Tensor | None = None
    batched: bool = True


def _settle_guidance(guidance: Guidance | None, sampler: Sampler | None, condition: Tensor) -> _Strength:
    """What guidance and manifest make together.

    Raises:
        ValueError: they contradict each other, or the unconditional branch does not fit.
    """
    if sampler is not None:
        guidance = _obey(guidance, sampler)
    if guidance is None:
        return _Strength()
    convention = guidance.convention or "from_unconditional"
    if guidance.scale is None:
        raise ValueError("guidance needs a scale: only a sampler's manifest has a default")
    nothing = guidance.unconditional
    if nothing is not None and nothing.shape != condition.shape:
        raise ValueError(
            f"the unconditional branch must have the condition's shape {tuple(condition.shape)}; "
            f"got {tuple(nothing.shape)}"
        )
    if convention == "embedded":
        if nothing is not None:
            raise ValueError("embedded guidance has one branch: leave unconditional away")
    elif guidance.scale == OFF[convention]:
        return _Strength()
    elif nothing is None:
        raise ValueError(f"guidance of scale {guidance.scale:g} needs unconditional, the condition without a prompt")
    return _Strength(convention, guidance.scale, nothing, guidance.batched)


def _obey(guidance: Guidance | None, sampler: Sampler) -> Guidance | None:
    """`guidance` as the manifest means it."""
    rule = sampler.guidance
    if rule.convention == "none":
        if guidance is None or guidance.scale == OFF.get(guidance.convention or "from_unconditional"):
            return None
        raise SamplerError(
            f"{sampler.label} has its guidance distilled into it, or has none: guiding it again, with scale "
            f"{guidance.scale}, would overdo it; pass guidance=None"
        )
    if guidance is None:
        if rule.convention == "embedded":
            return Guidance(rule.scale, convention="embedded")
        raise SamplerError(
            f"{sampler.label} is sampled with guidance of scale {rule.scale:g} ({rule.convention}): pass "
            f"guidance=Guidance({rule.scale:g}, unconditional), or scale {OFF[rule.convention]:g} for none"
        )
    if guidance.convention not in (None, rule.convention):
        raise SamplerError(
            f"{sampler.label} means its guidance scale as {rule.convention!r}, not as {guidance.convention!r}: the "
            "same number would be another strength"
        )
    scale = rule.scale if guidance.scale is None else guidance.scale
    return Guidance(scale, guidance.unconditional, guidance.batched, rule.convention)


def _call(
    denoiser: Callable[..., Tensor], drive: Drive, step: int, x: Tensor, condition: Tensor, strength: _Strength
) -> Tensor:
    """The model's output for one step, (B, ...) fp32, guided."""
    x = drive.model_input(step, x)
    target = drive.target(step)
    times = {} if target is None else {"target": target.expand(len(x))}
    timestep = drive.timestep(step).expand(len(x))
    scale, nothing = strength.scale, strength.unconditional
    if scale is not None and strength.convention == "embedded":
        times["guidance"] = torch.full((len(x),), scale, device=x.device)
    if scale is None or nothing is None:
        with branch("cond"):
            return denoiser(x, timestep, condition, **times).float()
    if strength.batched:
        twice = {name: torch.cat((value, value)) for name, value in times.items()}
        both = denoiser(torch.cat((x, x)), torch.cat((timestep, timestep)), torch.cat((condition, nothing)), **twice)
        conditional, unconditional = both.float().chunk(2)
    else:
        with branch("cond"):
            conditional = denoiser(x, timestep, condition, **times).float()
        with branch("uncond"):
            unconditional = denoiser(x, timestep, nothing, **times).float()
    base = unconditional if strength.convention == "from_unconditional" else conditional
    return base + scale * (conditional - unconditional)
