"""Consistency distillation (Song et al. 2023; for flows): every point of a trajectory is led to the same end.

f(x, sigma) = x - (sigma - e) v(x, sigma) is where the student believes the trajectory through x to be at level e. The
boundary f(x, e) = x holds by itself: it is the flow's form of c_skip x + c_out F with c_skip = 1 and c_out = e - sigma.
The student at t has to agree with its own, held, answer at t' < t, a step of the teacher further on.

With one window e is 0: a consistency model, sampled by re-noising. With as many windows as steps e is the end of the
window (phased consistency, Wang et al. 2024; multistep consistency, Heek et al. 2024), and sampling draws no noise.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ditc.distill.batch import Batch
from ditc.distill.method import Loss
from ditc.distill.nets import AVERAGE, STUDENT, Nets
from ditc.distill.subject import Subject
from ditc.distill.trajectory import TrajectoryMethod, euler_walk, mean_square, noised, predictor, real_data, spread
from ditc.runtime.samplers import Sampler


class Consistency(TrajectoryMethod):
    """Options of consistency distillation.

    Attributes:
        windows: 1, or as many as `steps`; see the module.
        parts: the teacher's levels to each of the student's: t and t' are neighbours among `steps * parts` + 1.
        target: the network that is asked at t', without gradients: the student, or its moving average.
        huber: c of the pseudo-Huber distance, sqrt(|d|² + c²) - c, in units of the square root of the sample's size
            (Song & Dhariwal 2023).
    """

    name: ClassVar[str] = "consistency"
    needs_data: ClassVar[bool] = True

    windows: int = Field(1, ge=1)
    parts: int = Field(8, ge=1)
    target: Literal["student", "average"] = "student"
    huber: float = Field(0.00054, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.windows not in (1, self.steps):
            raise ValueError(f"windows must be 1 or steps={self.steps}; got {self.windows}")
        if self.windows == self.steps and self.parts == 1 and self.windows > 1:
            raise ValueError("parts=1 with a window to each step only copies the teacher's step: use more parts")
        return self

    def loss(self, player: str, nets: Nets, batch: Batch) -> Loss:
        """Pseudo-Huber distance of f at t from f at t', over t - t'."""
        levels = self.levels(batch.condition.device, self.steps, self.parts)
        place = batch.integers(len(levels) - 1)
        here, there = levels[place], levels[place + 1]
        end = self._end(levels, place)
        x = noised(real_data(batch), batch.normal(), here)
        with torch.no_grad():
            x_there = euler_walk(self.teacher(nets, batch.condition, batch.null), x, levels, place, 1)
            held = predictor(nets, AVERAGE if self.target == "average" else STUDENT, batch.condition)
            target = lead(x_there, held(x_there, there), there, end)
        square = mean_square(lead(x, nets(STUDENT, x, here, batch.condition), here, end) - target)
        return Loss((pseudo_huber(square, self.huber) / (here - there)).mean(), {"error": square.detach().mean()})

    def sampler(self, subject: Subject) -> Sampler:
        """Re-noising with one window, Euler with several."""
        if self.windows == 1 and self.steps > 1:
            return self.manifest(subject, kind="renoise", solver="sde")
        return super().sampler(subject)

    def _end(self, levels: Tensor, place: Tensor) -> Tensor:
        if self.windows == 1:
            return torch.zeros_like(levels[place])
        return levels[(place // self.parts + 1) * self.parts]


def lead(x: Tensor, velocity: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """Where the line through `x` (B, ...) at `sigma` (B,) is at level `end` (B,): x - (sigma - end) v; `x` at end."""
    return x - spread(sigma - end, x) * velocity


def pseudo_huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c²) - c: half of `square` / c where that is small, its root where it is large."""
    return (square + c * c).sqrt() - c
