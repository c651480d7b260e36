"""Progressive distillation (Salimans & Ho 2022): one step of the student does two of its teacher's, round by round.

In the first round the teacher is the subject's, with guidance, so that guidance is distilled in (as Meng et al. 2023 do
beforehand). Each later round halves the steps and learns from the student of the round before. For Euler's step of a
flow the target is plain: two steps from x_t to x_u have the slope (x_t - x_u) / (t - u), and the student's one step is
right if its velocity at t is that slope.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ditc.distill.batch import Batch
from ditc.distill.method import Loss
from ditc.distill.nets import AVERAGE, STUDENT, Nets
from ditc.distill.subject import Subject
from ditc.distill.trajectory import (
    TrajectoryMethod,
    Velocity,
    euler_walk,
    mean_square,
    noised,
    predictor,
    real_data,
    spread,
)

PREVIOUS = "previous"
FINISHED = "finished_rounds"


class Progressive(TrajectoryMethod):
    """Options of progressive distillation.

    Attributes:
        rounds: the student of the last takes `steps` steps, and each earlier one twice as many as the next.
        round_updates: updates in a round; all that follow the last round belong to it.
    """

    name: ClassVar[str] = "progressive"
    needs_data: ClassVar[bool] = True

    rounds: int = Field(3, ge=1, le=10)
    round_updates: int = Field(ge=1)

    def players(self, subject: Subject) -> dict[str, nn.Module]:
        """The student of the round before, which is never trained. How many rounds are over is kept in a buffer."""
        previous = copy.deepcopy(subject.teacher).requires_grad_(False)
        previous.register_buffer(FINISHED, torch.zeros((), dtype=torch.int64))
        return {PREVIOUS: previous}

    def loss(self, player: str, nets: Nets, batch: Batch) -> Loss:
        """Mean square of the predicted data less the target's, weighted by max(SNR, 1), the paper's "truncated SNR".

        One velocity is sigma times as far from another as the data are that they predict, and the signal-to-noise
        ratio is ((1 - sigma) / sigma)²; on the velocity the weight is therefore max((1 - sigma)², sigma²).
        """
        finished = self._finished(nets)
        steps = self.steps * 2 ** (self.rounds - 1 - finished)
        levels = self.levels(batch.condition.device, steps, 2)
        first = 2 * batch.integers(steps)
        start, end = levels[first], levels[first + 2]
        x_start = noised(real_data(batch), batch.normal(), start)
        with torch.no_grad():
            x_end = euler_walk(self._pair_teacher(nets, batch, finished), x_start, levels, first, 2)
        slope = (x_start - x_end) / spread(start - end, x_start)
        error = mean_square(nets(STUDENT, x_start, start, batch.condition) - slope)
        return Loss((truncated_snr(start) * error).mean(), {"error": error.detach().mean()})

    @torch.no_grad()
    def advance(self, update: int, nets: Nets) -> None:
        """After a round, the average becomes the teacher of the next, and the student goes on from there."""
        finished = self._finished(nets)
        if finished + 1 >= self.rounds or update < (finished + 1) * self.round_updates:
            return
        average = nets.module(AVERAGE).state_dict()
        for name in (PREVIOUS, STUDENT):
            state = nets.module(name).state_dict()
            for key, value in average.items():
                state[key].copy_(value)
        _finished_rounds(nets).add_(1)

    def _finished(self, nets: Nets) -> int:
        return int(_finished_rounds(nets))

    def _pair_teacher(self, nets: Nets, batch: Batch, finished: int) -> Velocity:
        if finished == 0:
            return self.teacher(nets, batch.condition, batch.null)
        return predictor(nets, PREVIOUS, batch.condition)


def truncated_snr(sigma: Tensor) -> Tensor:
    """max(SNR, 1) as a weight on the square of the velocity's error: max((1 - sigma)², sigma²), shape of `sigma`."""
    return torch.maximum((1 - sigma).square(), sigma.square())


def _finished_rounds(nets: Nets) -> Tensor:
    return nets.module(PREVIOUS).get_buffer(FINISHED)
