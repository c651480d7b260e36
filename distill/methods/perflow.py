"""PeRFlow (Yan et al. 2024) and reflow (Liu et al. 2022): a flow that is straight within each window of time.

The teacher is solved from the start of a window to its end, x_s -> x_e; the student fits the slope of the line between
both, (x_s - x_e) / (sigma_s - sigma_e), at points of that line. One Euler step then crosses a window. One window over
the whole path is reflow: pairs of noise and what the teacher makes of it.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ditc.distill.batch import Batch
from ditc.distill.method import Loss
from ditc.distill.nets import STUDENT, Nets
from ditc.distill.subject import Subject
from ditc.distill.trajectory import (
    TrajectoryMethod,
    mean_square,
    noised,
    predictor,
    real_data,
    spread,
    walk,
)
from ditc.runtime.samplers import Sampler


class PeRFlow(TrajectoryMethod):
    """Options of PeRFlow.

    Attributes:
        windows: of time, at the levels of that many steps; None for one to each step, 1 is reflow.
        parts: the teacher's steps within a window.
        order: of the teacher's solver: 1 is Euler, 2 Adams-Bashforth, for the same number of calls.
        starts: where windows begin. "data": noised real samples, one window of each sample. "teacher": the teacher's
            own path from noise, all windows of each path; needs no data. "student": the student's path from noise, so
            that it learns to go on from its own errors; needs no data.
        times: where on the line the student is asked. "inside": anywhere, so that a window may also be crossed in
            several steps. "start": where a step begins, the only place a student of one step a window is asked at.
    """

    name: ClassVar[str] = "perflow"

    windows: int | None = Field(None, ge=1)
    parts: int = Field(4, ge=1)
    order: Literal[1, 2] = 2
    starts: Literal["data", "teacher", "student"] = "data"
    times: Literal["inside", "start"] = "inside"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.steps % self.count:
            raise ValueError(f"steps={self.steps} must be a multiple of windows={self.count}: a step stays in a window")
        if self.times == "start" and self.steps != self.count:
            raise ValueError(
                f"times='start' trains the starts of {self.count} windows, and steps={self.steps} begin elsewhere too: "
                "say times='inside'"
            )
        return self

    @property
    def count(self) -> int:
        """The number of windows."""
        return self.steps if self.windows is None else self.windows

    def loss(self, player: str, nets: Nets, batch: Batch) -> Loss:
        """Mean square of the student's velocity less the slope of the line."""
        repeats = 1 if self.starts == "data" else self.count
        condition, null = (torch.cat([rows] * repeats) for rows in (batch.condition, batch.null))
        window, x_start, x_end = self._lines(nets, batch, condition, null)
        ends = self.levels(x_start.device, self.count)
        start, length = ends[window], ends[window] - ends[window + 1]
        slope = (x_start - x_end) / spread(length, x_start)
        done = torch.zeros_like(start)
        if self.times == "inside":
            done = length * torch.cat([batch.uniform() for _ in range(repeats)])
        velocity = nets(STUDENT, x_start - spread(done, slope) * slope, start - done, condition)
        return Loss(mean_square(velocity - slope).mean())

    def sampler(self, subject: Subject) -> Sampler:
        """Euler; a manifest of PeRFlow where the windows are even."""
        if self.shift != 1:
            return super().sampler(subject)
        return self.manifest(subject, kind="perflow", solver="ode", windows=self.count)

    @torch.no_grad()
    def _lines(self, nets: Nets, batch: Batch, condition: Tensor, null: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The window (M,) of each line, and the samples (M, ...) at its start and its end."""
        levels, parts = self.levels(batch.condition.device, self.count, self.parts), self.parts
        if self.starts == "data":
            window = batch.integers(self.count)
            x_start = noised(real_data(batch), batch.normal(), levels[window * parts])
        else:
            window = torch.arange(self.count, device=levels.device).repeat_interleave(batch.size)
            top = torch.zeros(batch.size, dtype=torch.int64, device=levels.device)
            if self.starts == "teacher":
                teacher = self.teacher(nets, batch.condition, batch.null)
                path = walk(teacher, batch.normal(), levels, top, self.count * parts, self.order)[::parts]
                return window, torch.cat(path[:-1]), torch.cat(path[1:])
            student = predictor(nets, STUDENT, batch.condition)
            x_start = torch.cat(walk(student, batch.normal(), levels[::parts], top, self.count, 1)[:-1])
        teacher = self.teacher(nets, condition, null)
        return window, x_start, walk(teacher, x_start, levels, window * parts, parts, self.order)[-1]
