"""A batch and its random draws, the same on every number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import DistillError
from .subject import Subject, check_draw


class Batch:
    """This rank's rows of a batch, and random numbers for them.

    Every draw is made for the whole batch and then cut to this rank's rows, one block of neighbours, so that what is
    trained does not depend on the number of ranks.

    Attributes:
        condition, null: (B, ...), on the device.
        data: (B, *shape) fp32, or None.
        size: B, the rows of this rank.

    Args:
        subject: gives the rows.
        rows: of the whole batch.
        generator: on the CPU; every random number comes from it, in the order of the calls.
        rank, ranks: which block of rows is kept, of how many.
        device: where to put everything.
        needs_data: whether to refuse a subject without data.

    Raises:
        DistillError: wrong rows (see :func:`check_draw`), or a number that the ranks cannot share.
    """

    def __init__(
        self,
        subject: Subject,
        rows: int,
        generator: torch.Generator,
        *,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
        needs_data: bool = False,
    ) -> None:
        if rows < 1 or rows % ranks:
            raise DistillError(f"a batch of {rows} rows cannot be shared by {ranks} ranks: use a multiple of {ranks}")
        drawn = subject.draw(rows, generator)
        check_draw(drawn, rows, subject.shape, needs_data)
        self.size = rows // ranks
        self._rows, self._shape, self._generator = rows, subject.shape, generator
        self._mine = slice(rank * self.size, (rank + 1) * self.size)
        self._device = torch.device(device)
        self.condition = self._keep(drawn.condition)
        self.null = self._keep(drawn.null)
        self.data = None if drawn.data is None else self._keep(drawn.data.float())

    def normal(self) -> Tensor:
        """Standard normal noise (B, *shape) fp32."""
        return self._keep(torch.randn(self._rows, *self._shape, generator=self._generator))

    def uniform(self) -> Tensor:
        """(B,) fp32 in [0, 1)."""
        return self._keep(torch.rand(self._rows, generator=self._generator))

    def integers(self, high: int) -> Tensor:
        """(B,) int64 in 0..high-1."""
        return self._keep(torch.randint(high, (self._rows,), generator=self._generator))

    def _keep(self, whole: Tensor) -> Tensor:
        return whole[self._mine].to(self._device)
