"""A distillation whose answers are known: data N(c m, s²), where c is the condition and the null condition is 0.

Its velocity is affine in x and in the mean, so guidance of scale w is the velocity of data of mean w c m. With
D(t) = (1 - t)² s² + t² the trajectory through x_t passes x_r = (1 - r) mean + sqrt(D(r) / D(t)) (x_t - (1 - t) mean).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ditc.distill.batch import Batch
from ditc.distill.nets import Nets
from ditc.distill.seeds import seeded
from ditc.distill.subject import Draw, Subject

SHAPE = (3, 2)
MEAN, SPREAD, GUIDANCE = 0.8, 0.5, 2.0
Known = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, t, mean, s) -> a velocity; t and mean broadcast against x."""


def velocity(x: Tensor, t: Tensor, mean: Tensor, s: Tensor) -> Tensor:
    """E[eps - x0 | x_t = x]."""
    variance = (1 - t) ** 2 * s**2 + t**2
    return (t - (1 - t) * s**2) / variance * (x - (1 - t) * mean) - mean


def flow_map(x: Tensor, t: Tensor, r: Tensor, mean: Tensor, s: Tensor) -> Tensor:
    """Where the trajectory through x at t is at r."""
    variance_t, variance_r = ((1 - u) ** 2 * s**2 + u**2 for u in (t, r))
    return (1 - r) * mean + (variance_r / variance_t).sqrt() * (x - (1 - t) * mean)


def average_velocity(levels: Tensor) -> Known:
    """(x_t - x_r) / (t - r), r the next of `levels` below t."""

    def known(x: Tensor, t: Tensor, mean: Tensor, s: Tensor) -> Tensor:
        r = (levels.view(-1, *[1] * t.ndim) < t - 1e-6).to(t) * levels.view(-1, *[1] * t.ndim)
        r = r.amax(0)
        return (x - flow_map(x, t, r, mean, s)) / (t - r)

    return known


class Gaussian(nn.Module):
    """A network of the closed form `known`, times `factor`: its parameters are the mean, s and the factor."""

    def __init__(self, known: Known = velocity, mean: float = MEAN, s: float = SPREAD, factor: float = 1.0) -> None:
        super().__init__()
        self.known = known
        self.mean, self.s, self.factor = (nn.Parameter(torch.tensor(value)) for value in (mean, s, factor))

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        t, c = (row.view(-1, *[1] * (x.ndim - 1)) for row in (timestep / 1000, condition))
        return self.factor * self.known(x, t, c * self.mean, self.s)


class Table(nn.Module):
    """Affine in x at each of `levels`: slope x + c offset, with its own slope and offset for each."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        self.slope, self.offset = (nn.Parameter(torch.zeros(len(levels))) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        place = (timestep[:, None] / 1000 - self.levels).abs().argmin(1)
        slope, offset = (table[place].view(-1, *[1] * (x.ndim - 1)) for table in (self.slope, self.offset))
        return slope * x + condition.view(-1, *[1] * (x.ndim - 1)) * offset


def tabulated(levels: Tensor) -> Table:
    """The velocity of the Gaussian, known at these levels."""
    table = Table(levels)
    slope = (levels - (1 - levels) * SPREAD**2) / ((1 - levels) ** 2 * SPREAD**2 + levels**2)
    table.slope.data, table.offset.data = slope, -MEAN * (1 + slope * (1 - levels))
    return table


def subject(s: float = SPREAD, guidance: float = GUIDANCE, data: bool = True) -> Subject:
    """Conditions 1 or -1; data of their Gaussians."""

    def draw(count: int, generator: torch.Generator) -> Draw:
        condition = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
        rows = condition.view(-1, 1, 1) * MEAN + s * torch.randn(count, *SHAPE, generator=generator)
        return Draw(condition, torch.zeros_like(condition), rows if data else None)

    return Subject("gaussian", Gaussian(s=s), lambda net, x, t, c: net(x, t, c), SHAPE, draw, guidance)


def play(subject: Subject, student: nn.Module, **players: nn.Module) -> Nets:
    """Networks for a student; its average is the student itself unless given."""
    return Nets(subject, {"student": student, "average": student, **players})


def batch(subject: Subject, rows: int = 6, seed: int = 0) -> Batch:
    """The rows of a seed; the same again for the same seed."""
    return Batch(subject, rows, seeded(seed))
