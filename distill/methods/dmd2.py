"""DMD2: distribution matching distillation without a regression loss (Yin et al. 2024, arXiv 2405.14867).

The student is trained to draw from the distribution of the guided teacher. The direction to move its samples in is the
difference of two scores at noised samples: the teacher's, with guidance, and that of a fake score, a network that keeps
learning what the student draws. Inputs of later steps are the student's own (backward simulation), so that training is
what sampling will be. Heads on the fake score's features, if wanted, tell its samples from data.
"""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditc.runtime.samplers import Sampler, flow_mix, flow_sigmas, flow_x0

from ..batch import Batch
from ..critic import Heads, fooling_loss, places_for, telling_loss, widths_at
from ..errors import DistillError
from ..manifest import renoising_sampler
from ..method import Loss, Method
from ..nets import STUDENT, Nets
from ..subject import Subject

FAKE = "fake"
HEADS = "fake.heads"
_EPS = 1e-6


class DMD2(Method):
    """Options of DMD2.

    Rows of a batch are trajectories of the student: each gives one row for every step. The batch must therefore be a
    multiple of `steps` on every rank.
    """

    name: ClassVar[str] = "dmd2"

    steps: int = Field(4, ge=1, le=64)
    sigmas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None, description="where the steps begin, falling from 1; evenly spaced by default"
    )
    guidance: float | None = Field(None, ge=0, le=100, description="of the real score; the subject's own by default")
    fake_updates: int = Field(3, ge=1, description="of the fake score, for each of the student")
    fake_pace: float = Field(1.0, gt=0, description="its learning rate, as a multiple of the student's")
    lowest: float = Field(0.02, gt=0, lt=1, description="sigma that samples are noised to, between")
    highest: float = Field(0.98, gt=0, le=1)
    adversarial: float = Field(0.0, ge=0, description="weight of the heads' loss for the student; 0 for no heads")
    adversarial_fake: float = Field(1e-2, gt=0, description="weight of the heads' loss for the fake score")
    heads_pace: float = Field(1.0, gt=0)
    places: tuple[str, ...] = Field((), description="modules whose outputs the heads see; the middle block by default")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.lowest < self.highest:
            raise ValueError(f"lowest={self.lowest} must be below highest={self.highest}")
        if self.sigmas is not None:
            falls = all(after < before for before, after in zip(self.sigmas, self.sigmas[1:], strict=False))
            if len(self.sigmas) != self.steps or self.sigmas[0] != 1 or not falls:
                raise ValueError(
                    f"sigmas must be {self.steps}, one for each step, falling from 1; got {list(self.sigmas)}"
                )
        return self

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.adversarial > 0

    @property
    def levels(self) -> tuple[float, ...]:
        """Where the steps begin."""
        return self.sigmas or tuple(flow_sigmas(self.steps).tolist()[:-1])

    def players(self, subject: Subject) -> dict[str, nn.Module]:
        players: dict[str, nn.Module] = {FAKE: copy.deepcopy(subject.teacher)}
        if self.adversarial:
            players[HEADS] = Heads(widths_at(subject, self._places(subject.teacher)))
        return players

    def turn(self, update: int) -> str:
        return STUDENT if update % (self.fake_updates + 1) == self.fake_updates else FAKE

    def pace_of(self, player: str) -> float:
        return {FAKE: self.fake_pace, HEADS: self.heads_pace}.get(player, 1.0)

    def loss(self, player: str, nets: Nets, batch: Batch) -> Loss:
        return self._fake_loss(nets, batch) if player == FAKE else self._student_loss(nets, batch)

    def _student_loss(self, nets: Nets, batch: Batch) -> Loss:
        """½ ‖x - sg(x - w (mu_fake - mu_real))‖², with w = 1 / mean|x - mu_real| for each sample: equation 7 of DMD."""
        condition = self._conditions(batch)
        inputs, sigma, _ = self.simulate(nets, batch, outputs=False)
        x = flow_x0(inputs, nets(STUDENT, inputs, sigma, condition), _over(inputs, sigma))
        level = self._noise_levels(batch)
        noisy = flow_mix(x, batch.normal(), _over(x, level))
        scale = nets.subject.guidance if self.guidance is None else self.guidance
        with torch.no_grad():
            null = _repeated(batch.null, self.steps)
            real = flow_x0(noisy, nets.guided(noisy, level, condition, null, scale), _over(x, level))
        if self.adversarial:
            velocity, features = nets.observed(FAKE, noisy, level, condition, self._places(nets.module(FAKE)))
        else:
            with torch.no_grad():
                velocity, features = nets(FAKE, noisy, level, condition), []
        with torch.no_grad():
            fake = flow_x0(noisy, velocity, _over(x, level))
            weight = 1 / ((x - real).abs().flatten(1).mean(1) + _EPS)
            direction = _over(x, weight) * (fake - real)
        matching = 0.5 * (x - (x - direction).detach()).square().mean()
        log = {"matching": matching, "gap": (fake - real).square().mean()}
        if not self.adversarial:
            return Loss(matching, log)
        fooling = fooling_loss(nets.module(HEADS)(features))
        return Loss(matching + self.adversarial * fooling, log | {"fooling": fooling})

    def _fake_loss(self, nets: Nets, batch: Batch) -> Loss:
        """The flow-matching loss on the student's samples; with heads, they learn to tell these from data."""
        condition = self._conditions(batch)
        _, _, made = self.simulate(nets, batch, outputs=True)
        level, noise = self._noise_levels(batch), batch.normal()
        noisy = flow_mix(made, noise, _over(made, level))
        places = self._places(nets.module(FAKE)) if self.adversarial else ()
        velocity, features = nets.observed(FAKE, noisy, level, condition, places)
        denoising = (velocity - (noise - made)).square().mean()
        if not self.adversarial:
            return Loss(denoising, {"denoising": denoising})
        assert batch.data is not None
        real_level = self._noise_levels(batch)
        real = flow_mix(batch.data, batch.normal(), _over(batch.data, real_level))
        _, real_features = nets.observed(FAKE, real, real_level, batch.condition, places)
        heads = nets.module(HEADS)
        told_real, told_made = heads(real_features), heads(features)
        telling = telling_loss(told_real, told_made)
        log = {"denoising": denoising, "telling": telling, "real": told_real.mean(), "made": told_made.mean()}
        return Loss(denoising + self.adversarial_fake * telling, log)

    @torch.no_grad()
    def simulate(self, nets: Nets, batch: Batch, *, outputs: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The student's own trajectories: what it is given at every step, and what it makes of it.

        Returns:
            inputs (B, *shape), sigma (B,), samples (B, *shape): rows `steps` apart are of one step. Without `outputs`
            the last step is not taken, and the samples are empty.
        """
        if batch.size % self.steps:
            raise DistillError(
                f"a batch of {batch.size} rows is no whole number of trajectories of {self.steps} steps: make "
                f"run.batch a multiple of {self.steps} on every rank"
            )
        noise = batch.normal().view(-1, self.steps, *nets.subject.shape)
        condition = batch.condition[:: self.steps]
        rows = len(condition)
        x, inputs, made = noise[:, 0], [], []
        for step, sigma in enumerate(self.levels):
            inputs.append(x)
            if step + 1 == self.steps and not outputs:
                break
            x0 = flow_x0(x, nets(STUDENT, x, x.new_full((rows,), sigma), condition), sigma)
            made.append(x0)
            if step + 1 < self.steps:
                x = flow_mix(x0, noise[:, step + 1], self.levels[step + 1])
        sigmas = x.new_tensor(self.levels).repeat(rows)
        samples = torch.stack(made, 1).flatten(0, 1) if outputs else x.new_empty(0)
        return torch.stack(inputs, 1).flatten(0, 1), sigmas, samples

    def _conditions(self, batch: Batch) -> Tensor:
        return _repeated(batch.condition, self.steps)

    def _noise_levels(self, batch: Batch) -> Tensor:
        return self.lowest + (self.highest - self.lowest) * batch.uniform()

    def _places(self, module: nn.Module) -> tuple[str, ...]:
        return places_for(module, self.places, 1)

    def sampler(self, subject: Subject) -> Sampler:
        return renoising_sampler(subject, self.name, self.levels, "DMD2, Yin et al. 2024")


def _over(x: Tensor, values: Tensor) -> Tensor:
    """Values (B,), one for each sample of x (B, ...), so that they broadcast over it."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def _repeated(rows: Tensor, steps: int) -> Tensor:
    """Row r of a batch belongs to trajectory r // steps, whose condition is that of its first row."""
    return rows[::steps].repeat_interleave(steps, 0)
