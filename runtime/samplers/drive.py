"""What steps through a generation: a solver of ours, or a diffusers scheduler, behind one face."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import SamplerError
from .noise import draw_noise, step_seed
from .solver import Solver


class Drive(Protocol):
    """Steps through one generation of a batch."""

    @property
    def steps(self) -> int:
        """Calls of the model in each branch of guidance."""

    def start(self, noise: Tensor) -> Tensor:
        """The sample to begin with, from standard normal noise (B, ...) fp32."""

    def model_input(self, step: int, x: Tensor) -> Tensor:
        """What the model is given for the sample `x`."""

    def timestep(self, step: int) -> Tensor:
        """What the model is given as the time, a scalar fp32 on the device."""

    def target(self, step: int) -> Tensor | None:
        """What a flow map is given as the time to jump to, or None for other models."""

    def advance(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """The sample after `step`, from the model's output, shape of `x`."""

    def x0(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """The data that the model believes in, from the sample before `step`; asked after :meth:`advance`."""

    def finish(self, x: Tensor) -> Tensor:
        """The result, from the sample after the last step."""


class SolverDrive:
    """Steps with a :class:`Solver`. All fresh noise is drawn beforehand, so that no step waits for a copy."""

    def __init__(self, solver: Solver, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self._solver = solver.to(device)
        self._fresh = {
            step: draw_noise(seeds, shape, device=device, step=step)
            for step in range(solver.steps)
            if solver.takes_noise(step)
        }

    @property
    def steps(self) -> int:
        return self._solver.steps

    def start(self, noise: Tensor) -> Tensor:
        return self._solver.start(noise)

    def model_input(self, step: int, x: Tensor) -> Tensor:
        return self._solver.model_input(step, x)

    def timestep(self, step: int) -> Tensor:
        return self._solver.timesteps[step]

    def target(self, step: int) -> Tensor | None:
        return None if self._solver.targets is None else self._solver.targets[step]

    def advance(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        return _own(self._solver.advance(step, x, output, self._fresh.get(step)), output)

    def x0(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        return _own(self._solver.finish(self._solver.x0(step, x, output)), output)

    def finish(self, x: Tensor) -> Tensor:
        return self._solver.finish(x)


def _own(tensor: Tensor, output: Tensor) -> Tensor:
    # a model of x0 may be asked for what it just gave, and a captured graph writes into that again
    return tensor.clone() if tensor is output else tensor


class SchedulerDrive:
    """Steps with any object that has diffusers' `set_timesteps`, `timesteps` and `step`; diffusers is not imported.

    The scheduler is copied: the caller's keeps its state, and a generation that stops leaves nothing in it. Fresh
    noise, where `step` takes a generator, comes from one for each sample, seeded by the sample's seed and the step.

    Args:
        scheduler: as from `SomeScheduler.from_pretrained`.
        steps: for `set_timesteps`, unless `sigmas` or `options` say more.
        sigmas: (steps + 1,) to walk along as they are; a scheduler that would warp them again is refused.
        options: more arguments of `set_timesteps`, such as `mu`.

    Raises:
        SamplerError: the object is no scheduler, ignores or changes the sigmas, or draws noise from elsewhere.
    """

    def __init__(
        self,
        scheduler: Any,
        seeds: Sequence[int],
        device: torch.device,
        *,
        steps: int | None = None,
        sigmas: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        name = type(scheduler).__name__
        for method in ("set_timesteps", "step"):
            if not callable(getattr(scheduler, method, None)):
                raise SamplerError(f"{name} is no scheduler: it has no {method}")
        self._name, self._seeds, self._device = name, list(seeds), device
        self._scheduler = copy.deepcopy(scheduler)
        self._set_timesteps(steps, sigmas, dict(options or {}))
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self._last: Any = None
        if hasattr(self._scheduler, "set_begin_index"):
            # otherwise it looks the first timestep up, which reads it back from the device
            self._scheduler.set_begin_index(0)

    def _set_timesteps(self, steps: int | None, sigmas: Tensor | None, options: dict[str, Any]) -> None:
        takes = inspect.signature(self._scheduler.set_timesteps).parameters
        wanted = dict(options)
        if sigmas is not None:
            if steps is not None and steps != len(sigmas) - 1:
                raise SamplerError(f"steps={steps} contradicts the {len(sigmas) - 1} steps of sigmas")
            wanted["sigmas"] = sigmas[:-1].tolist()
        elif steps is not None:
            wanted["num_inference_steps"] = steps
        if not wanted.keys() & {"sigmas", "num_inference_steps", "timesteps"}:
            raise SamplerError(f"{self._name} needs steps, or sigmas")
        for argument in wanted:
            if argument not in takes and not any(taken.kind is taken.VAR_KEYWORD for taken in takes.values()):
                raise SamplerError(f"{self._name}.set_timesteps knows no {argument!r}; it takes {', '.join(takes)}")
        self._scheduler.set_timesteps(device=self._device, **wanted)
        self._timesteps = self._scheduler.timesteps
        if len(self._timesteps) == 0:
            raise SamplerError(f"{self._name} made no timesteps of {wanted}")
        if sigmas is not None:
            self._check_unchanged(sigmas)
        falling = bool((self._timesteps[1:] < self._timesteps[:-1]).all())
        count = getattr(self._scheduler, "num_inference_steps", None)
        first_order = getattr(self._scheduler, "order", 1) == 1
        if first_order and falling and count == len(self._timesteps) - 1 and float(self._timesteps[-1]) == 0:
            raise SamplerError(
                f"{self._name} counts the end among its timesteps and scales its samples: describe the model with a "
                "Sampler of kind='trigflow' instead"
            )

    def _check_unchanged(self, sigmas: Tensor) -> None:
        found = getattr(self._scheduler, "sigmas", None)
        if found is None:
            raise SamplerError(f"{self._name} keeps no sigmas, so nothing says that it walks along yours")
        found = found.detach().cpu().float()
        if found.shape != sigmas.shape or not torch.allclose(found, sigmas.cpu().float(), rtol=0, atol=1e-4):
            raise SamplerError(
                f"{self._name} made {[round(level, 4) for level in found.tolist()]} of the sigmas "
                f"{[round(level, 4) for level in sigmas.tolist()]}: sigmas are final here, so give it one that does "
                "not shift them (shift=1, use_dynamic_shifting=False), or steps instead of sigmas"
            )

    @property
    def steps(self) -> int:
        return len(self._timesteps)

    def start(self, noise: Tensor) -> Tensor:
        return noise * float(getattr(self._scheduler, "init_noise_sigma", 1.0))

    def model_input(self, step: int, x: Tensor) -> Tensor:
        scale = getattr(self._scheduler, "scale_model_input", None)
        scaled: Tensor = x if scale is None else scale(x, self._timesteps[step])
        return scaled

    def timestep(self, step: int) -> Tensor:
        timestep: Tensor = self._timesteps[step]
        return timestep.to(self._device, torch.float32)

    def target(self, step: int) -> Tensor | None:
        return None

    def advance(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        if output.shape != x.shape:
            raise ValueError(f"the model's output must have the sample's shape {tuple(x.shape)}; {tuple(output.shape)}")
        keywords: dict[str, Any] = {}
        if self._takes_generator:
            keywords["generator"] = [torch.Generator().manual_seed(step_seed(seed, step)) for seed in self._seeds]
        before = _global_noise(self._device)
        self._last = self._scheduler.step(output, self._timesteps[step], x, **keywords)
        if any(not torch.equal(a, b) for a, b in zip(before, _global_noise(self._device), strict=True)):
            raise SamplerError(
                f"{self._name} draws noise from torch's global generator, so a sample would not depend on its own seed "
                "alone: use one whose step takes a generator"
            )
        after: Tensor = self._last[0] if isinstance(self._last, tuple) else self._last.prev_sample
        return after.to(x.dtype)

    def x0(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        for name in ("pred_original_sample", "denoised"):
            found = getattr(self._last, name, None)
            if found is not None:
                estimate: Tensor = found.clone()
                return estimate
        raise SamplerError(f"{self._name} gives no estimate of the data, so there are no previews with it")

    def finish(self, x: Tensor) -> Tensor:
        return x


def _global_noise(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
