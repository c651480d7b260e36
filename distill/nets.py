"""The networks of a training, called in the flow's own terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import DistillError
from .subject import Subject

Precision = Literal["bf16", "fp32"]

STUDENT = "student"
TEACHER = "teacher"
AVERAGE = "average"


class Nets:
    """Networks by name: "student", "teacher", "average" (the student's moving average), and a method's players.

    All are called with the flow's sigma and give the velocity in fp32; inside, linears and attention run under
    autocast where `precision` is "bf16". Nothing here turns gradients off but :meth:`guided`: a method says where it
    needs none.
    """

    def __init__(self, subject: Subject, modules: Mapping[str, nn.Module], precision: Precision = "fp32") -> None:
        if precision not in ("bf16", "fp32"):
            raise DistillError(f"precision must be 'bf16' or 'fp32'; got {precision!r}")
        self.subject = subject
        self._modules = {TEACHER: subject.teacher, **modules}
        self._precision = precision

    def __call__(self, name: str, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """The velocity (B, *shape) fp32 that network `name` predicts.

        Args:
            x: (B, *shape) fp32.
            sigma: (B,) fp32 in [0, 1].
            condition: (B, ...).

        Raises:
            DistillError: there is no such network, or its output has not the sample's shape.
        """
        with self.autocast(x.device):
            velocity = self.subject.call(self.module(name), x, self.subject.timestep_scale * sigma, condition)
        if velocity.shape != x.shape:
            raise DistillError(
                f"{name} gave {tuple(velocity.shape)} for samples {tuple(x.shape)}: a velocity has the sample's shape"
            )
        return velocity.float()

    def observed(
        self, name: str, x: Tensor, sigma: Tensor, condition: Tensor, places: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """The velocity as from a call, and the outputs (B, ..., C) of the modules named `places` within the network.

        Raises:
            DistillError: a module was not run, or gave no tensor.
        """
        seen: dict[str, Tensor] = {}
        module = self.module(name)

        def keep(place: str, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(first, Tensor):
                raise DistillError(f"{place} gives {type(first).__name__}: features are tensors")
            seen[place] = first

        with ExitStack() as hooks:
            for place in places:
                found = module.get_submodule(place)
                handle = found.register_forward_hook(lambda _module, _inputs, output, place=place: keep(place, output))
                hooks.callback(handle.remove)
            velocity = self(name, x, sigma, condition)
        missing = [place for place in places if place not in seen]
        if missing:
            raise DistillError(f"{name} does not run {', '.join(missing)}: there are no features")
        return velocity, [seen[place] for place in places]

    @torch.no_grad()
    def guided(self, x: Tensor, sigma: Tensor, condition: Tensor, null: Tensor, scale: float) -> Tensor:
        """The teacher's velocity (B, *shape) fp32 with guidance, uncond + scale (cond - uncond), in one call.

        Args:
            x, sigma, condition: as for a call.
            null: (B, ...), the conditions of no condition.
            scale: 1 is none, and costs half.
        """
        if scale == 1:
            return self(TEACHER, x, sigma, condition)
        both = self(TEACHER, torch.cat((x, x)), torch.cat((sigma, sigma)), torch.cat((condition, null)))
        conditional, unconditional = both.chunk(2)
        return unconditional.lerp(conditional, scale)

    def module(self, name: str) -> nn.Module:
        """The network itself. Raises DistillError for a name that there is none for."""
        if name not in self._modules:
            raise DistillError(f"there is no network {name!r}; there are {', '.join(self._modules)}")
        return self._modules[name]

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which networks run."""
        # no cache: a weight that is cast without gradients would be reused where they are needed
        return torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bf16", cache_enabled=False)
