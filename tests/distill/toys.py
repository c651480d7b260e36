"""A transformer small enough to be trained in milliseconds, and data for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditc.distill.subject import Draw, Measured, Sample, Subject

SHAPE = (4, 6)
WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


class Tiny(nn.Module):
    """(B, 4, 6) tokens, with time and condition (B, 2) added to each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(3, WIDTH), nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        x = x + self.embed(torch.cat((timestep[:, None] / 1000, condition), 1))[:, None]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(x)
        return out


def call(net: nn.Module, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    velocity: Tensor = net(x, timestep, condition)
    return velocity


def draw(count: int, generator: torch.Generator) -> Draw:
    """Conditions are one of two directions, data lie along them."""
    which = torch.randint(2, (count,), generator=generator)
    condition = torch.nn.functional.one_hot(which, 2).float()
    data = (2.0 * which - 1).view(-1, 1, 1) + 0.3 * torch.randn(count, *SHAPE, generator=generator)
    return Draw(condition, torch.zeros_like(condition), data)


def measure(sample: Sample) -> Measured:
    drawn = sample(torch.eye(2), [0, 1])
    return Measured({"mean": float(drawn.mean()), "rows": float(len(drawn))})


def tiny_subject(**changes: object) -> Subject:
    """Always the same teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        teacher = Tiny()
    fields = {"name": "tiny", "teacher": teacher, "call": call, "shape": SHAPE, "draw": draw, "guidance": 2.0}
    return Subject(**fields | {"measure": measure} | changes)  # type: ignore[arg-type]
