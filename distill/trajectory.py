"""What the trajectory methods share: the student's levels, the finer ones of the teacher's solver, walks along both.

Everything is a rectified flow, x = (1 - sigma) x0 + sigma eps, whose velocity v = eps - x0 is dx/dsigma along the
probability-flow ODE. A student of N steps walks along N + 1 levels with Euler's step; between two of them the teacher
walks along `parts` levels of its own. Both lie on one grid, so that a level of the student is one of the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ditc.runtime.samplers import Sampler, Shift, flow_mix, flow_sigmas

from .batch import Batch
from .errors import DistillError
from .method import Method
from .nets import Nets
from .subject import Subject

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), sigma (B,)) -> v (B, ...), fp32."""


class TrajectoryMethod(Method):
    """Options that the trajectory methods share.

    Attributes:
        steps: of the finished student.
        shift: static shift of the levels, student's and teacher's: above 1 they crowd toward noise.
        guidance: the teacher's scale that is distilled in; None for the subject's own.
    """

    steps: int = Field(4, ge=1, le=1000)
    shift: float = Field(1.0, gt=0, le=100)
    guidance: float | None = Field(None, ge=0, le=100)

    def teacher(self, nets: Nets, condition: Tensor, null: Tensor) -> Velocity:
        """The teacher's velocity with guidance, for samples of these conditions; no gradients."""
        scale = nets.subject.guidance if self.guidance is None else self.guidance
        return lambda x, sigma: nets.guided(x, sigma, condition, null, scale)

    def levels(self, device: torch.device, steps: int, parts: int = 1) -> Tensor:
        """(steps * parts + 1,) fp32 from 1 to 0, of which every `parts`-th is a level of `steps` steps."""
        return flow_sigmas(steps * parts, self.shift).to(device)

    def sampler(self, subject: Subject) -> Sampler:
        """Euler from each level to the next; guidance is distilled in."""
        return self.manifest(subject, kind="euler", solver="ode")

    def manifest(self, subject: Subject, **how: object) -> Sampler:
        """A manifest of the student's levels, sampled as `how` says."""
        return Sampler(
            name=f"{subject.name}, {self.name}",
            role="student",
            process="flow",
            prediction="velocity",
            steps=self.steps,
            sigmas=tuple(flow_sigmas(self.steps, self.shift).tolist()),
            warped=True,
            shift=None if self.shift == 1 else Shift(amount=self.shift),
            timestep_scale=subject.timestep_scale,
            shape=subject.shape,
            **how,
        )


def predictor(nets: Nets, name: str, condition: Tensor) -> Velocity:
    """Network `name` as a velocity, for samples of these conditions."""
    return lambda x, sigma: nets(name, x, sigma, condition)


def spread(level: Tensor, x: Tensor) -> Tensor:
    """A level for each sample, (B,), shaped (B, 1, ...) so that it multiplies `x` (B, ...)."""
    return level.view(-1, *[1] * (x.ndim - 1))


def euler_walk(velocity: Velocity, x: Tensor, levels: Tensor, first: Tensor, count: int) -> Tensor:
    """`count` steps of Euler along `levels`, each sample from its own place; see :func:`walk`."""
    return walk(velocity, x, levels, first, count, order=1)[-1]


def walk(
    velocity: Velocity, x: Tensor, levels: Tensor, first: Tensor, count: int, order: Literal[1, 2]
) -> list[Tensor]:
    """The samples of an explicit solver along `levels`, each sample from its own place.

    Args:
        velocity: called `count` times, whatever the order.
        x: (B, ...) fp32, the samples at `levels[first]`.
        levels: (N + 1,) fp32, falling.
        first: (B,) int64, with first + count <= N.
        order: 1 is Euler; 2 is Adams-Bashforth, which extends the line through this velocity and the last one by half
            a step; its first step is Euler's.

    Returns:
        count + 1 samples of the shape of `x`, at levels first, first + 1, ...
    """
    path = [x]
    last, last_length = None, torch.zeros(())
    for place in range(count):
        here, there = levels[first + place], levels[first + place + 1]
        length = spread(here - there, x)
        slope = now = velocity(path[-1], here)
        if last is not None:
            slope = now + (now - last) * length / (2 * last_length)
        path.append(path[-1] - length * slope)
        if order == 2:
            last, last_length = now, length
    return path


def real_data(batch: Batch) -> Tensor:
    """The batch's data (B, *shape) fp32. Raises DistillError where it has none."""
    if batch.data is None:
        raise DistillError("this method noises real samples, and the subject's draw gives none")
    return batch.data


def noised(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Samples (B, ...) at the level of each, sigma (B,): (1 - sigma) x0 + sigma eps."""
    return flow_mix(data, noise, spread(sigma, data))


def mean_square(difference: Tensor) -> Tensor:
    """The mean square of each sample, (B, ...) -> (B,)."""
    return difference.square().flatten(1).mean(1)
