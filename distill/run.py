"""How long, how fast and on what a training runs."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from .errors import DistillError
from .nets import Precision
from .options import Options

Share = Annotated[float, Field(ge=0, lt=1)]

MAY_CHANGE = frozenset({"updates", "save_every", "log_every", "measure_every", "device"})
"""What a resumed run may do otherwise: it changes no update that was taken."""


class Run(Options):
    """Options of a training that no method decides.

    The learning rate rises over `warmup` updates, stays, and falls linearly over the last `decay` of all updates.
    """

    updates: int = Field(2000, ge=1, description="of all players together")
    batch: int = Field(16, ge=1, description="rows of one forward, over all ranks")
    accumulate: int = Field(1, ge=1, description="forwards whose gradients make one update")
    learning_rate: float = Field(2e-4, gt=0, le=0.1)
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(20, ge=0, description="updates")
    decay: Share = 0.3
    clip_norm: float = Field(1.0, gt=0)
    ema: Share = Field(0.99, description="of the student, per update of its own")
    precision: Precision = "bf16"
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = Field(10, ge=1)
    save_every: int = Field(100, ge=1)
    measure_every: int = Field(500, ge=0, description="updates; 0 for never but at the end")

    @model_validator(mode="after")
    def _possible(self) -> Run:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' needs a CUDA device, and there is none here; use cpu")
        return self

    def pace_at(self, update: int) -> float:
        """The share, in (0, 1], of the learning rates that update `update`, counted from 0, goes at."""
        rise = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        falling = self.decay * self.updates
        fall = min(1.0, (self.updates - update) / falling) if falling else 1.0
        return min(rise, max(fall, 0.0))

    def pick_device(self) -> torch.device:
        """ "auto" is CUDA where there is one."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def check_ranks(self, ranks: int) -> None:
        """Raise DistillError where the ranks cannot share a batch."""
        if self.batch % ranks:
            raise DistillError(f"batch={self.batch} cannot be shared by {ranks} ranks: use a multiple of {ranks}")
