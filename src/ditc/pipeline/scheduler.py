"""A sampler manifest as a scheduler of diffusers, so that pipelines walk exactly as a student was distilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditc.runtime.samplers import Sampler, SamplerError, check_sigmas, flow_sigmas
from ditc.runtime.samplers.noise import draw_noise
from ditc.runtime.samplers.solver import Solver, make_solver

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
except ImportError as error:
    raise ImportError("pipelines are those of diffusers: pip install 'ditc[diffusers]'") from error

Generators = torch.Generator | Sequence[torch.Generator] | None
"""As pipelines take them."""

_TIMESTEPS = 1000
"""Pipelines count a flow's time in thousandths, whatever their transformer makes of it."""


@dataclass
class ManifestStep:
    """What :meth:`ManifestScheduler.step` returns: the sample after the step, and the data that the model believes in,
    both of the sample's shape and dtype."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class ManifestScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Walks as a :class:`ditc.Sampler` says. What a pipeline asks for besides is checked against it.

    Fresh noise of a step belongs to its sample's seed (:meth:`begin`), so a sample does not depend on its batch.

    Args:
        manifest: the sampler's fields, as :meth:`ditc.Sampler.to_dict` gives them. They are the scheduler's whole
            configuration, so that ``save_pretrained`` and ``from_pretrained`` of scheduler and pipeline keep them.

    Raises:
        SamplerError: the manifest is none, or of a kind that no pipeline of diffusers can walk.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, manifest: dict[str, Any]) -> None:
        self.sampler = Sampler(**manifest)
        if self.sampler.process == "trigflow" or self.sampler.kind == "flow_map":
            raise SamplerError(
                f"{self.sampler.label} is given scaled samples or the time to jump to, which pipelines of diffusers do "
                "not do: draw with ditc.generate"
            )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._solver: Solver | None = None
        self._generator: Generators = None
        self._seeds: Sequence[int] | None = None
        self._index = 0

    @classmethod
    def of(cls, sampler: Sampler) -> ManifestScheduler:
        """The scheduler of a manifest."""
        found: ManifestScheduler = cls(sampler.to_dict())
        return found

    def begin(self, generator: Generators = None) -> None:
        """Says whose noise the next walk draws: that of a generator for each sample, of one for all, or of chance."""
        self._generator, self._seeds = generator, None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepares a walk.

        Args:
            num_inference_steps: as the manifest says, or whatever a teacher's allows.
            device: of the timesteps.
            sigmas: levels without the final 0. Some pipelines always hand over the even grid, before any shift:
                that says no more than its length.
            timesteps: refused: the manifest has them.
            mu: a pipeline's guess of the dynamic shift. The manifest's own shift is applied, by tokens if it says so.

        Raises:
            SamplerError: it contradicts the manifest.
        """
        if timesteps is not None:
            raise SamplerError(f"{self.sampler.label} has its levels in its manifest: leave timesteps away")
        steps = num_inference_steps if sigmas is None else len(sigmas)
        chosen = self.sampler if steps is None else self.sampler.for_steps(steps)
        if sigmas is not None:
            self._check_sigmas(torch.tensor([*map(float, sigmas), 0.0]))
        shift = chosen.shift
        if not chosen.warped and shift is not None and shift.by_tokens is not None and shift.amount is None:
            if mu is None:
                raise SamplerError(f"{self.sampler.label} is shifted by resolution, and this pipeline gives no mu")
            chosen = Sampler(**{**chosen.to_dict(), "shift": {**_without_tokens(shift.model_dump()), "amount": mu}})
        self._solver = make_solver(chosen)
        self.num_inference_steps = chosen.steps
        levels = torch.tensor(self._solver.levels)
        self.sigmas = levels
        times = _TIMESTEPS * levels[:-1] if chosen.process == "flow" else levels[:-1].to(torch.int64)
        self.timesteps = times.to(device or "cpu")
        self._seeds, self._index = None, 0

    def _check_sigmas(self, sigmas: Tensor) -> None:
        check_sigmas(sigmas)
        steps = len(sigmas) - 1
        grids = (flow_sigmas(steps), torch.cat((torch.linspace(1, 1 / steps, steps), torch.zeros(1))))
        if not any(torch.allclose(sigmas, grid, rtol=0, atol=1e-4) for grid in grids):
            self.sampler.check_request(sigmas=sigmas)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the walk begins: behind 0 for pipelines that start from a picture."""
        self._index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """``sample``: nothing is scaled."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``sample`` noised to ``timestep`` (B,), for pipelines that start from a picture; a flow's only."""
        if self.sampler.process != "flow":
            raise SamplerError(f"{self.sampler.label} is no flow: it cannot start from a picture here")
        sigma = (timestep / _TIMESTEPS).to(sample.device, sample.dtype).reshape(-1, *[1] * (sample.dim() - 1))
        return (1 - sigma) * sample + sigma * noise

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> ManifestStep | tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_output, sample: (B, ...), of one shape.
            timestep: for form: the walk knows where it is.
            generator: gives the seeds of the samples where :meth:`begin` did not.

        Raises:
            SamplerError: before :meth:`set_timesteps`, or behind the last step.
        """
        solver, k = self._solver, self._index
        if solver is None or k >= solver.steps:
            raise SamplerError("there is no step to take: call set_timesteps, which begins a walk")
        if self._seeds is None:
            self._seeds = _seeds_of(self._generator or generator, len(sample))
        if len(self._seeds) != len(sample):
            raise SamplerError(f"{len(self._seeds)} seeds are given and {len(sample)} samples are drawn")
        fresh = None
        if solver.takes_noise(k):
            fresh = draw_noise(self._seeds, sample.shape[1:], device=sample.device, step=k)
        x, output = sample.float(), model_output.float()
        after = solver.advance(k, x, output, fresh).to(sample.dtype)
        self._index += 1
        if not return_dict:
            return after, solver.x0(k, x, output).to(sample.dtype)
        return ManifestStep(after, solver.x0(k, x, output).to(sample.dtype))

    def __len__(self) -> int:
        return _TIMESTEPS


def _seeds_of(generator: Generators, count: int) -> list[int]:
    """One seed for each of ``count`` samples: of its own generator, of its place behind a common one's, or by chance
    from torch's global generator."""
    if generator is None:
        return torch.randint(2**62, (count,)).tolist()
    if isinstance(generator, torch.Generator):
        return [(generator.initial_seed() + i) % 2**63 for i in range(count)]
    if count % len(generator):
        raise SamplerError(f"{len(generator)} generators are given for {count} samples: give one for each")
    return [one.initial_seed() % 2**63 for one in generator for _ in range(count // len(generator))]


def _without_tokens(shift: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in shift.items() if name != "by_tokens" and value is not None}
