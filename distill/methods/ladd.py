"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015).

There is no score to follow: heads on the features of the frozen teacher, at noised samples, tell the student's samples
from data, and the student learns to fool them. It begins each of its steps from data noised to that step's level.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditc.runtime.samplers import Sampler, flow_mix, flow_sigmas, flow_x0

from ..batch import Batch
from ..critic import Heads, fooling_loss, places_for, telling_loss, widths_at
from ..manifest import renoising_sampler
from ..method import Loss, Method
from ..nets import STUDENT, TEACHER, Nets
from ..subject import Subject

CRITIC = "critic"


class LADD(Method):
    """Options of LADD."""

    name: ClassVar[str] = "ladd"
    needs_data: ClassVar[bool] = True

    steps: int = Field(4, ge=1, le=64)
    critic_updates: int = Field(1, ge=1, description="for each of the student")
    critic_pace: float = Field(3.0, gt=0, description="learning rate of the heads, as a multiple of the student's")
    location: float = Field(0.0, description="of the logit-normal distribution of sigmas that the critic looks at,")
    spread: float = Field(1.0, gt=0, description="and its scale")
    heads: int = Field(2, ge=1, description="blocks that have a head, at even distances")
    places: tuple[str, ...] = Field((), description="modules that have a head instead")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.places)) != len(self.places):
            raise ValueError(f"places must differ; got {list(self.places)}")
        return self

    @property
    def levels(self) -> tuple[float, ...]:
        """Where the steps begin."""
        return tuple(flow_sigmas(self.steps).tolist()[:-1])

    def players(self, subject: Subject) -> dict[str, nn.Module]:
        return {CRITIC: Heads(widths_at(subject, self._places(subject.teacher)))}

    def turn(self, update: int) -> str:
        return STUDENT if update % (self.critic_updates + 1) == self.critic_updates else CRITIC

    def pace_of(self, player: str) -> float:
        return self.critic_pace if player == CRITIC else 1.0

    def loss(self, player: str, nets: Nets, batch: Batch) -> Loss:
        return self._critic_loss(nets, batch) if player == CRITIC else self._student_loss(nets, batch)

    def _student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """softplus(-score) of the student's samples."""
        scores = self._scores(nets, batch, self._made(nets, batch))
        return Loss(fooling_loss(scores), {"made": scores.mean()})

    def _critic_loss(self, nets: Nets, batch: Batch) -> Loss:
        """softplus(-score) of data, and softplus(score) of the student's samples."""
        assert batch.data is not None
        with torch.no_grad():
            made = self._made(nets, batch)
        real, told = self._scores(nets, batch, batch.data), self._scores(nets, batch, made)
        return Loss(telling_loss(real, told), {"real": real.mean(), "made": told.mean()})

    def _made(self, nets: Nets, batch: Batch) -> Tensor:
        """The student's samples (B, *shape), each of one step from data noised to the level where the step begins."""
        assert batch.data is not None
        sigma = torch.tensor(self.levels, device=batch.data.device)[batch.integers(self.steps)]
        over = sigma.view(-1, *(1,) * (batch.data.ndim - 1))
        x = flow_mix(batch.data, batch.normal(), over)
        return flow_x0(x, nets(STUDENT, x, sigma, batch.condition), over)

    def _scores(self, nets: Nets, batch: Batch, samples: Tensor) -> Tensor:
        level = (self.location + self.spread * torch.special.ndtri(batch.uniform().clamp(1e-4, 1 - 1e-4))).sigmoid()
        noisy = flow_mix(samples, batch.normal(), level.view(-1, *(1,) * (samples.ndim - 1)))
        _, features = nets.observed(TEACHER, noisy, level, batch.condition, self._places(nets.module(TEACHER)))
        scores: Tensor = nets.module(CRITIC)(features)
        return scores

    def _places(self, module: nn.Module) -> tuple[str, ...]:
        return places_for(module, self.places, self.heads)

    def sampler(self, subject: Subject) -> Sampler:
        return renoising_sampler(subject, self.name, self.levels, "LADD, Sauer et al. 2024")
