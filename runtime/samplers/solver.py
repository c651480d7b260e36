"""A manifest made ready to run: the levels, what the model is given at each of them, and one pure step.

Everything that depends on the schedule alone is computed on the host when the solver is made, in fp64. The steps take
tensors and give tensors, so that :func:`walk`, a whole generation, can be captured as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .euler import euler_step
from .flow import flow_velocity, flow_x0
from .flow_map import flow_map_step
from .lcm import lcm_denoise, lcm_step
from .perflow import perflow_velocity, perflow_window
from .renoise import renoise_flow_step, renoise_vp_step
from .state import check_state, cos_sin
from .tcd import tcd_landing, tcd_step
from .trigflow import (
    trigflow_ode_step,
    trigflow_output,
    trigflow_sample_to_flow,
    trigflow_step,
    trigflow_to_flow,
    trigflow_x0,
)
from .vp import VpPrediction, vp_parts

if TYPE_CHECKING:
    from .manifest import Kind, Prediction, Process, Sampler


@dataclass(frozen=True)
class Solver:
    """How to walk from noise to data.

    Attributes:
        kind, process, prediction: as a manifest's.
        levels: steps + 1 sigmas, timesteps or angles, from noise to 0.
        timesteps: (steps,) fp32, what the model is given at each step.
        targets: (steps,) fp32, what a flow map is given as the time to jump to, or None for other models.
        noisy: whether each step but the last takes fresh noise.
        alpha_bars: of every discrete timestep, where the process is variance-preserving.
    """

    kind: Kind
    process: Process
    prediction: Prediction
    levels: tuple[float, ...]
    timesteps: Tensor
    targets: Tensor | None = None
    noisy: bool = False
    alpha_bars: tuple[float, ...] = ()
    eta: float = 0.0
    sigma_data: float = 1.0
    windows: int = 1

    @property
    def steps(self) -> int:
        """Calls of the model in each branch of guidance."""
        return len(self.levels) - 1

    def to(self, device: torch.device | str) -> Solver:
        """The same with its tensors on `device`: capture into a CUDA graph allows no copies from the host."""
        targets = None if self.targets is None else self.targets.to(device)
        return replace(self, timesteps=self.timesteps.to(device), targets=targets)

    def takes_noise(self, step: int) -> bool:
        """Whether `step` needs fresh noise."""
        return self.noisy and step < self.steps - 1

    def start(self, noise: Tensor) -> Tensor:
        """The sample at the first level, from standard normal noise of the same shape."""
        return self.sigma_data * noise if self.process == "trigflow" else noise

    def model_input(self, step: int, x: Tensor) -> Tensor:
        """What the model is given for the sample `x`: scaled for models of TrigFlow, else `x` itself."""
        if self.process != "trigflow":
            return x
        if self.prediction == "velocity":
            return trigflow_sample_to_flow(x, self.levels[step], self.sigma_data)
        return x / self.sigma_data

    def advance(self, step: int, x: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            step: 0 to steps - 1.
            x: the sample at `levels[step]`, any shape, fp32 or fp64.
            output: the model's for it, shape of `x`, any floating dtype.
            noise: fresh standard normal noise, shape of `x`, where :meth:`takes_noise` says so, else None.

        Returns:
            The sample at `levels[step + 1]`, shape and dtype of `x`.
        """
        if (noise is not None) != self.takes_noise(step):
            raise ValueError(f"step {step} of {self.steps} {'needs' if noise is None else 'takes no'} fresh noise")
        return _ADVANCE[self.kind](self, step, x, output, noise)

    def x0(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """The data that the model believes in at `step`, for previews; arguments as :meth:`advance`'s.

        For flow maps and PeRFlow it is where the present direction leads, since these models do not say more.
        """
        level = self.levels[step]
        if self.process == "trigflow":
            return self._trigflow_x0(level, x, output)
        if self.process == "vp":
            return self._vp_x0(step, x, output)
        if self.prediction == "x0":
            return check_state(x, output=output)[0]
        return flow_x0(x, output, level)

    def finish(self, x: Tensor) -> Tensor:
        """The result, from the sample at level 0: in the model's own units where a flow model is used on TrigFlow."""
        return x / self.sigma_data if self.process == "trigflow" and self.prediction == "velocity" else x

    def alpha_bar(self, timestep: float) -> float:
        """Alpha-bar of a discrete timestep."""
        return self.alpha_bars[round(timestep)]

    def trigflow_output(self, level: float, x: Tensor, output: Tensor) -> Tensor:
        """F of a TrigFlow model, from whatever this one predicts."""
        if self.prediction == "velocity":
            return trigflow_output(x, output, level, self.sigma_data)
        (output,) = check_state(x, output=output)
        if self.prediction == "x0":
            # of f = cos x - sigma_data sin F
            cos, sin = cos_sin(level)
            return (cos * x - output) / (self.sigma_data * sin)
        return output

    def _trigflow_x0(self, level: float, x: Tensor, output: Tensor) -> Tensor:
        return trigflow_x0(x, self.trigflow_output(level, x, output), level, self.sigma_data)

    def _vp_x0(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        level = self.levels[step]
        if self.kind == "perflow":
            velocity = self.perflow_velocity(step, x, output)
            return euler_step(x, velocity, level / len(self.alpha_bars), 0.0)
        if self.kind == "lcm":
            return lcm_denoise(x, output, level, self.alpha_bar(level), self.vp_prediction)
        return vp_parts(x, output, self.alpha_bar(level), self.vp_prediction)[0]

    @property
    def vp_prediction(self) -> VpPrediction:
        """The prediction of a variance-preserving model."""
        assert self.prediction in ("eps", "x0", "v")
        return self.prediction

    def perflow_velocity(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """The velocity within the window of `step`."""
        if self.prediction == "velocity":
            return output
        train = len(self.alpha_bars)
        time = self.levels[step] / train
        window = perflow_window(time, self.windows)
        # PeRFlow's timesteps count from 1
        start, end = (self.alpha_bars[max(int(edge * train - 1), 0)] for edge in window)
        form = "ddim" if self.prediction == "eps" else "diffusion"
        return perflow_velocity(x, output, time, window, (start, end), form)  # type: ignore[arg-type]


def _euler(solver: Solver, step: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    level, following = solver.levels[step : step + 2]
    velocity = flow_velocity(x, output, level) if solver.prediction == "x0" else output
    return euler_step(x, velocity, level, following)


def _renoise(solver: Solver, step: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    level, following = solver.levels[step : step + 2]
    if solver.process == "vp":
        bars = solver.alpha_bar(level), solver.alpha_bar(following)
        return renoise_vp_step(x, output, noise, *bars, solver.vp_prediction)
    velocity = flow_velocity(x, output, level) if solver.prediction == "x0" else output
    return renoise_flow_step(x, velocity, noise, level, following)


def _lcm(solver: Solver, step: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    level, following = solver.levels[step : step + 2]
    bars = solver.alpha_bar(level), solver.alpha_bar(following)
    return lcm_step(x, output, noise, level, *bars, solver.vp_prediction)


def _tcd(solver: Solver, step: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    level, following = solver.levels[step : step + 2]
    landing = tcd_landing(round(following), solver.eta)
    bars = solver.alpha_bar(level), solver.alpha_bar(landing), solver.alpha_bar(following)
    return tcd_step(x, output, noise, *bars, solver.vp_prediction)


def _trigflow(solver: Solver, step: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    level, following = solver.levels[step : step + 2]
    output = solver.trigflow_output(level, x, output)
    if solver.noisy:
        return trigflow_step(x, output, noise, level, following, solver.sigma_data)
    return trigflow_ode_step(x, output, level, following, solver.sigma_data)


def _flow_map(solver: Solver, step: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    level, following = solver.levels[step : step + 2]
    return flow_map_step(x, output, level, following)


def _perflow(solver: Solver, step: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    level, following = solver.levels[step : step + 2]
    train = len(solver.alpha_bars) or 1
    return euler_step(x, solver.perflow_velocity(step, x, output), level / train, following / train)


_ADVANCE: dict[str, Callable[[Solver, int, Tensor, Tensor, Tensor | None], Tensor]] = {
    "euler": _euler,
    "renoise": _renoise,
    "lcm": _lcm,
    "tcd": _tcd,
    "trigflow": _trigflow,
    "flow_map": _flow_map,
    "perflow": _perflow,
}


def euler_solver(sigmas: Tensor, timestep_scale: float = 1000) -> Solver:
    """Flow Euler along `sigmas` (steps + 1,), which fall to 0."""
    levels = sigmas.to("cpu", torch.float32)
    # in fp32, as the timesteps of diffusers' schedulers
    return Solver("euler", "flow", "velocity", tuple(levels.tolist()), timestep_scale * levels[:-1])


def make_solver(sampler: Sampler, tokens: int | None = None) -> Solver:
    """The solver that a manifest describes.

    Args:
        tokens: image tokens of a sample, where the shift depends on the resolution.
    """
    levels = sampler.resolve(tokens)
    seen = levels
    if sampler.process == "trigflow" and sampler.prediction == "velocity":
        # a flow model is told the flow's time
        seen = torch.tensor([trigflow_to_flow(level) for level in levels.tolist()])
    times = sampler.timestep_scale * seen
    return Solver(
        sampler.kind,
        sampler.process,
        sampler.prediction,
        tuple(levels.tolist()),
        times[:-1],
        times[1:] if sampler.kind == "flow_map" else None,
        sampler.solver == "sde",
        sampler.betas.table() if sampler.betas is not None else (),
        sampler.eta or 0.0,
        sampler.sigma_data or 1.0,
        sampler.windows or 1,
    )


def walk(
    solver: Solver,
    model: Callable[..., Tensor],
    noise: Tensor,
    fresh: Sequence[Tensor] | Tensor = (),
    **keywords: Tensor,
) -> Tensor:
    """A whole generation as one pure function, for capture in one graph: tensors in, tensors out.

    Args:
        solver: what to walk along, on the device of `noise`.
        model: called with (x, timestep (B,) fp32), `keywords`, and `target` (B,) where the solver has targets.
        noise: (B, ...) fp32, standard normal.
        fresh: the noise of every step that takes some, each of the shape of `noise`.

    Returns:
        The samples, shape and dtype of `noise`.
    """
    x = solver.start(noise)
    timesteps, targets = solver.timesteps, solver.targets
    if timesteps.device != noise.device:
        raise ValueError(f"the solver is on {timesteps.device} and the noise on {noise.device}: use solver.to(device)")
    for step in range(solver.steps):
        given = keywords if targets is None else {**keywords, "target": targets[step].expand(len(x))}
        output = model(solver.model_input(step, x), timesteps[step].expand(len(x)), **given)
        x = solver.advance(step, x, output, fresh[step] if solver.takes_noise(step) else None)
    return solver.finish(x)
