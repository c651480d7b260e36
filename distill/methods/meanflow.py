"""MeanFlow (Geng et al. 2025), windowed: the student predicts the average velocity from t down to the next level.

The average velocity u(x, t) = (x_t - x_r) / (t - r) obeys u = v - (t - r) du/dt, where du/dt is the derivative along
the trajectory at a fixed r: with x moving at v and t at 1. MeanFlow gives the network both times. A network with one
timestep input cannot be told r, so here t fixes it: r is the student's next level below t. Euler's step from one level
to the next is then exact, and the network keeps the teacher's parameters and inputs.

Most networks embed the timestep, 1000 sigma, in sines, the fastest of which turn within a few thousandths of sigma. At
first the exact derivative in time is mostly of these, which the network has no reason to keep still (Lu & Song 2024
slow the embedding down for it). A difference over a reach of some hundredths averages them out, and starts with targets
nearer to the truth; see the option `derivative`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditc.distill.batch import Batch
from ditc.distill.method import Loss
from ditc.distill.nets import STUDENT, Nets
from ditc.distill.trajectory import TrajectoryMethod, Velocity, noised, predictor, real_data, spread


class MeanFlow(TrajectoryMethod):
    """Options of MeanFlow.

    Attributes:
        velocity: v. "teacher": its velocity with guidance. "data": eps - x0 of the sample, unguided.
        derivative: of u along the trajectory. "jvp": forward-mode differentiation, exact. "difference": from two more
            calls, at `reach` before and after, for networks whose kernels have no forward derivative.
        reach: in units of sigma; small against a window, and large enough that the precision shows a difference.
        time_mean, time_std: t is logit-normal, the sigmoid of a normal variable of these moments.
        level_share: of the samples, t of which is one of the student's levels instead: it is asked nowhere else, and
            logit-normal times never reach 1.
        power, floor: p and c of the weight 1 / (|d|² + c)^p, held, of each sample's squared error |d|².
    """

    name: ClassVar[str] = "meanflow"
    needs_data: ClassVar[bool] = True

    velocity: Literal["teacher", "data"] = "teacher"
    derivative: Literal["jvp", "difference"] = "jvp"
    reach: float = Field(0.005, gt=0, le=0.1)
    time_mean: float = -0.4
    time_std: float = Field(1.0, gt=0)
    level_share: float = Field(0.25, ge=0, le=1)
    power: float = Field(1.0, ge=0, le=1)
    floor: float = Field(1e-3, gt=0)

    def loss(self, player: str, nets: Nets, batch: Batch) -> Loss:
        """Squared distance of u from v - (t - r) du/dt, weighted."""
        levels = self.levels(batch.condition.device, self.steps)
        t = self._times(batch, levels)
        r = next_level(levels, t)
        data, noise = real_data(batch), batch.normal()
        x = noised(data, noise, t)
        student = predictor(nets, STUDENT, batch.condition)
        with torch.no_grad():
            v = noise - data if self.velocity == "data" else self.teacher(nets, batch.condition, batch.null)(x, t)
            slope = along(student, x, t, v, self.reach if self.derivative == "difference" else None)
            target = v - spread(t - r, x) * slope
        square = (student(x, t) - target).square().flatten(1).sum(1)
        weight = (square.detach() + self.floor) ** -self.power
        return Loss((weight * square).mean(), {"error": square.detach().mean() / x[0].numel()})

    def _times(self, batch: Batch, levels: Tensor) -> Tensor:
        t = logit_normal(batch.uniform(), self.time_mean, self.time_std)
        at_level = levels[batch.integers(self.steps)]
        return torch.where(batch.uniform() < self.level_share, at_level, t)


def logit_normal(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Logit-normal times in (0, 1) from uniform numbers in [0, 1), shape of `uniform`."""
    # the quantile of 0 is minus infinity
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)))


def next_level(levels: Tensor, t: Tensor) -> Tensor:
    """The highest of `levels` (N + 1,), which fall from 1 to 0, that lies below each t (B,) in (0, 1]."""
    return levels[torch.searchsorted(-levels, -t, right=True).clamp(max=len(levels) - 1)]


def along(u: Velocity, x: Tensor, t: Tensor, v: Tensor, reach: float | None) -> Tensor:
    """du/dt along the trajectory: the derivative of u(x, t) where x moves at `v` and t at 1.

    Args:
        u: asked once for the derivative itself, or twice for a central difference.
        x, v: (B, ...); t: (B,).
        reach: half the distance of a central difference; None for forward-mode differentiation, which needs a forward
            derivative of all that `u` calls, and so runs attention by its plain formula.

    Returns:
        Shape of `x`.
    """
    if reach is None:
        with sdpa_kernel(SDPBackend.MATH):
            derivative: Tensor = torch.func.jvp(u, (x, t), (v, torch.ones_like(t)))[1]
        return derivative
    # no network knows levels beyond 0 and 1
    high, low = (t + reach).clamp(max=1), (t - reach).clamp(min=0)
    above, below = (u(x + spread(level - t, x) * v, level) for level in (high, low))
    return (above - below) / spread(high - low, x)
