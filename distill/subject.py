"""What is distilled: a teacher, how it is called, and where conditions and data come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DistillError

Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(net, x (B, *shape), timestep (B,) fp32, condition (B, ...)) -> the velocity eps - x0, (B, *shape)."""

Sample = Callable[[Tensor, Sequence[int]], Tensor]
"""(condition (B, ...), B seeds) -> samples (B, *shape) fp32 on the CPU, by a student along its sampler."""


@dataclass(frozen=True)
class Draw:
    """A batch of what a subject is trained on.

    `condition` and `null` (B, ...): what the networks are told, and what they are told for no condition; of one shape.
    `data` (B, *shape) fp32: samples that belong to the conditions, or None where there are none.
    """

    condition: Tensor
    null: Tensor
    data: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """Figures of a student, by name, and a picture of its samples (a PIL image) where one can be drawn."""

    figures: Mapping[str, float]
    picture: Any = None


@dataclass(frozen=True)
class Subject:
    """What is distilled.

    Attributes:
        name: for messages and manifests.
        teacher: any module; it is put in eval mode, and its parameters are frozen.
        call: how a network with the teacher's forward is called.
        shape: of one sample, without the batch.
        draw: (n, generator) -> n conditions, null conditions, and data where there is any. All randomness has to come
            from the generator.
        guidance: the teacher's own scale, uncond + guidance (cond - uncond); 1 is none.
        timestep_scale: the networks are given this times sigma.
        process: "flow", the only one that can be distilled.
        measure: figures of a student, from a function that draws samples with it.
        source: where the teacher is from, for model cards.

    Raises:
        DistillError: a field that makes no sense.
    """

    name: str
    teacher: nn.Module
    call: Call
    shape: tuple[int, ...]
    draw: Callable[[int, torch.Generator], Draw]
    guidance: float = 1.0
    timestep_scale: float = 1000.0
    process: str = "flow"
    measure: Callable[[Sample], Measured] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.process != "flow":
            raise DistillError(
                f"{self.name} is a process {self.process!r}: only rectified flows, process='flow', can be distilled; "
                "wrap a model of another process so that it predicts the flow's velocity"
            )
        if not self.shape or min(self.shape) < 1:
            raise DistillError(f"shape must be that of one sample, without the batch; got {self.shape}")
        if not self.timestep_scale > 0:
            raise DistillError(f"timestep_scale must be positive, 1000 as a rule; got {self.timestep_scale}")
        if not 0 <= self.guidance <= 100:
            raise DistillError(f"guidance must be in [0, 100], 1 for none; got {self.guidance}")
        if not any(True for _ in self.teacher.parameters()):
            raise DistillError(f"the teacher of {self.name} has no parameters: there is nothing to distil")
        self.teacher.eval().requires_grad_(False)


def check_draw(drawn: Draw, count: int, shape: Sequence[int], needs_data: bool) -> None:
    """Refuse a batch that would spoil a training.

    Raises:
        DistillError: not `count` rows; conditions of two shapes; data that are missing where they are needed, of
            another shape than `shape`, or no floating point; NaN or infinity.
    """
    rows = {"condition": drawn.condition, "null": drawn.null}
    if drawn.data is not None:
        rows["data"] = drawn.data
    elif needs_data:
        raise DistillError("this method learns from data, and the subject's draw gives none")
    for name, tensor in rows.items():
        if tensor.ndim == 0 or len(tensor) != count:
            raise DistillError(f"draw gave {name} of shape {tuple(tensor.shape)}: {count} rows were asked for")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DistillError(f"draw gave {name} with NaN or infinity")
    if drawn.null.shape != drawn.condition.shape:
        raise DistillError(
            f"null conditions {tuple(drawn.null.shape)} must have the shape of conditions "
            f"{tuple(drawn.condition.shape)}"
        )
    if drawn.data is not None and (tuple(drawn.data.shape[1:]) != tuple(shape) or not drawn.data.is_floating_point()):
        raise DistillError(
            f"data must be floating point of shape (B, {', '.join(map(str, shape))}); "
            f"got {drawn.data.dtype} {tuple(drawn.data.shape)}"
        )
