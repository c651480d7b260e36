"""Discriminator heads on the features of a network that is there anyway (DMD2, Yin et al. 2024; LADD, Sauer et al.)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import DistillError
from .nets import TEACHER, Nets
from .parallel import blocks_of
from .seeds import seeded
from .subject import Subject


class Heads(nn.Module):
    """One small network for each place that features are taken from; each scores every position of its features.

    Args:
        widths: C of the features of each place.
        hidden: width of the heads.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 128) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for width in widths
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Scores (B, positions), of all places side by side, high for real; features are (B, ..., C), any dtype."""
        scores = [head(part.float()).flatten(1) for head, part in zip(self.heads, features, strict=True)]
        return torch.cat(scores, 1)


def places_for(module: nn.Module, wanted: Sequence[str], count: int) -> tuple[str, ...]:
    """Names of the modules whose outputs are features.

    Args:
        wanted: names given by the configuration; empty for `count` blocks at even distances in the longest list of
            modules, one in its middle.

    Raises:
        DistillError: there is no such module, or no list of modules.
    """
    names = {part: name for name, part in module.named_modules()}
    for name in wanted:
        if name not in names.values():
            raise DistillError(f"{type(module).__name__} has no module {name!r} to take features from")
    if wanted:
        return tuple(wanted)
    blocks = blocks_of(module)
    if not blocks:
        raise DistillError(
            f"{type(module).__name__} has no list of blocks: name the modules that features are taken from"
        )
    if count > len(blocks):
        raise DistillError(f"{count} places are wanted, and {type(module).__name__} has {len(blocks)} blocks")
    chosen = [round((i + 1) * (len(blocks) + 1) / (count + 1)) - 1 for i in range(count)]
    return tuple(names[blocks[i]] for i in chosen)


def widths_at(subject: Subject, places: Sequence[str]) -> list[int]:
    """The width of the features at each place, found by one call of the teacher."""
    drawn = subject.draw(1, seeded(0))
    device = next(subject.teacher.parameters()).device
    x = torch.zeros(1, *subject.shape, device=device)
    with torch.no_grad():
        _, features = Nets(subject, {}).observed(
            TEACHER, x, torch.full((1,), 0.5, device=device), drawn.condition.to(device), places
        )
    return [part.shape[-1] for part in features]


def fooling_loss(scores: Tensor) -> Tensor:
    """What a generator minimises: softplus(-score), the mean over samples and positions."""
    return F.softplus(-scores).mean()


def telling_loss(real: Tensor, made: Tensor) -> Tensor:
    """What a critic minimises: softplus(-real) + softplus(made), means over samples and positions."""
    return F.softplus(-real).mean() + F.softplus(made).mean()
