"""What a method of distillation has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ditc.runtime.samplers import Sampler

from .batch import Batch
from .nets import STUDENT, Nets
from .options import Options
from .subject import Subject


@dataclass(frozen=True)
class Loss:
    """`value`, a scalar with gradients, and scalars to `log` beside it, by name."""

    value: Tensor
    log: Mapping[str, Tensor] = field(default_factory=dict)


class Method(Options, ABC):
    """A method of distillation: its fields are its options, filled from a configuration file.

    Attributes:
        name: for messages and manifests.
        needs_data: whether `batch.data` is read.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False

    def players(self, subject: Subject) -> dict[str, nn.Module]:
        """Networks beside the student, by name, freshly made; all are saved in checkpoints.

        A player "fake" may have parts "fake.heads": they are trained in its turn. A network that no turn names is only
        kept (progressive's target).
        """
        return {}

    def turn(self, update: int) -> str:
        """The player that update `update`, counted from 0, trains: the student or one of :meth:`players`."""
        return STUDENT

    def pace_of(self, player: str) -> float:
        """What the learning rate of a player, or of a part of one, is multiplied by."""
        return 1.0

    @abstractmethod
    def loss(self, player: str, nets: Nets, batch: Batch) -> Loss:
        """The loss of one batch for `player`; nothing else may get gradients of it."""

    def advance(self, update: int, nets: Nets) -> None:
        """Called after `update` updates are done: changes networks by what checkpoints hold, and by nothing else."""
        return

    @abstractmethod
    def sampler(self, subject: Subject) -> Sampler:
        """How the finished student is sampled."""
