"""The state of a training, and one update of it: whatever the method, this is the only loop there is.

Every random draw of update k, forward m comes from a generator seeded by (seed, k, m). So a run that is killed and
resumed equals, bit for bit on the same machine, one that was not, and no generator state is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .batch import Batch
from .checkpoint import check_identity, read_checkpoint, write_checkpoint
from .errors import DistillError
from .method import Method
from .nets import AVERAGE, STUDENT, TEACHER, Nets
from .parallel import World, load_optimiser, load_state, optimiser_state, whole_state
from .run import MAY_CHANGE, Run
from .seeds import seeded
from .subject import Subject

_FORMAT = "ditc.distill/1"


@dataclass(frozen=True)
class UpdateResult:
    """One update: whose it was, its loss, the gradient's norm before clipping, and what the method logged."""

    player: str
    loss: float
    grad_norm: float
    log: Mapping[str, float]


class Training:
    """Networks, optimisers and the number of updates done.

    Args:
        subject, method, run: what, how, and how long.
        world: the processes that share it.
        initial: whole tensors that the student begins with; the teacher's without.

    Raises:
        DistillError: what the method, or the number of processes, cannot work with.
    """

    def __init__(
        self,
        subject: Subject,
        method: Method,
        run: Run,
        world: World,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        run.check_ranks(world.ranks)
        self.subject, self.method, self.run, self.world = subject, method, run, world
        self.update = 0
        self.student_updates = 0
        # of no memory: an undivided module for the finished weights
        self.blank = copy.deepcopy(subject.teacher).to("meta")
        subject.teacher.to(world.device)
        student = copy.deepcopy(subject.teacher).float()
        if initial is not None:
            load_state(student, dict(initial))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            players = method.players(subject)
        odd = players.keys() & {STUDENT, TEACHER, AVERAGE}
        if odd:
            raise DistillError(f"{method.name} names players {sorted(odd)}, which the loop has itself")
        self.modules = {STUDENT: student, AVERAGE: copy.deepcopy(student), **players}
        for module in (subject.teacher, *self.modules.values()):
            module.to(world.device).requires_grad_(False).eval()
            world.shard(module)
        self.nets = Nets(subject, self.modules, run.precision)
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        for name in (STUDENT, *players):
            if "." not in name:
                self.optimisers[name] = self._optimiser(name)

    def step(self) -> UpdateResult:
        """Take one update. Raises FloatingPointError, before weights change, where the loss is not finite."""
        player = self.method.turn(self.update)
        if player not in self.optimisers:
            raise DistillError(f"{self.method.name} gives a turn to {player!r}; there are {', '.join(self.optimisers)}")
        parts = self._parts(player)
        for name, module in self.modules.items():
            module.requires_grad_(name in parts)
        optimiser = self.optimisers[player]
        optimiser.zero_grad(set_to_none=True)
        loss, log = self._backward(player)
        norm = self._clip(parts)
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * self.run.pace_at(self.update)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if player == STUDENT:
            self.student_updates += 1
            self._average()
        self.update += 1
        self.method.advance(self.update, self.nets)
        return UpdateResult(player, loss, norm, log)

    def _backward(self, player: str) -> tuple[float, dict[str, float]]:
        total, log = 0.0, dict[str, float]()
        share = 1 / self.run.accumulate
        for forward in range(self.run.accumulate):
            batch = Batch(
                self.subject,
                self.run.batch,
                seeded(self.run.seed, self.update, forward),
                rank=self.world.rank,
                ranks=self.world.ranks,
                device=self.world.device,
                needs_data=self.method.needs_data,
            )
            result = self.method.loss(player, self.nets, batch)
            value = float(self.world.mean(result.value.detach()))
            if not torch.isfinite(torch.tensor(value)):
                raise FloatingPointError(
                    f"the loss of {player} is {value} at update {self.update}: lower run.learning_rate"
                )
            (result.value * share).backward()  # type: ignore[no-untyped-call]
            total += value * share
            for name, scalar in result.log.items():
                log[name] = log.get(name, 0.0) + float(self.world.mean(scalar.detach().float())) * share
        return total, log

    def _clip(self, parts: list[str]) -> float:
        parameters = [parameter for name in parts for parameter in self.modules[name].parameters()]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], error_if_nonfinite=True)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(parameters, self.run.clip_norm, whole)
        return float(whole)

    def _parts(self, player: str) -> list[str]:
        return [name for name in self.modules if name == player or name.startswith(f"{player}.")]

    def _optimiser(self, player: str) -> torch.optim.Optimizer:
        groups = []
        for name in self._parts(player):
            rate = self.run.learning_rate * self.method.pace_of(name)
            groups.append({"params": list(self.modules[name].parameters()), "lr": rate, "initial_lr": rate})
        return torch.optim.AdamW(groups, betas=self.run.betas, weight_decay=self.run.weight_decay)

    @torch.no_grad()
    def _average(self) -> None:
        # a short memory at first, so that the initial weights are forgotten
        decay = min(self.run.ema, (1 + self.student_updates) / (10 + self.student_updates))
        average, student = self.modules[AVERAGE], self.modules[STUDENT]
        for averaged, current in zip(average.parameters(), student.parameters(), strict=True):
            averaged.lerp_(current, 1 - decay)
        for kept, buffer in zip(average.buffers(), student.buffers(), strict=True):
            kept.copy_(buffer)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines this training, flat: a checkpoint of another is refused."""
        found = {"subject": self.subject.name, "method": self.method.name}
        for part, options in (("method", self.method), ("run", self.run)):
            values = options.model_dump(mode="json", exclude=set(MAY_CHANGE) if part == "run" else None)
            found |= {f"{part}.{name}": value for name, value in values.items()}
        return found

    def save(self, path: Path) -> None:
        """Write a checkpoint. All ranks have to call it; the first one writes."""
        state = {
            "format": _FORMAT,
            "identity": self.identity,
            "update": self.update,
            "student_updates": self.student_updates,
            "modules": {name: whole_state(module) for name, module in self.modules.items()},
            "optimisers": {name: optimiser_state(optimiser) for name, optimiser in self.optimisers.items()},
        }
        if self.world.leads:
            write_checkpoint(path, state)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, on any number of ranks.

        Raises:
            DistillError: it is of another training, or beyond this one's end.
        """
        state = read_checkpoint(path, _FORMAT)
        check_identity(path, state["identity"], self.identity)
        if state["update"] > self.run.updates:
            raise DistillError(f"{path} is at update {state['update']}, beyond the {self.run.updates} asked for")
        for name, module in self.modules.items():
            load_state(module, state["modules"][name])
        for name, optimiser in self.optimisers.items():
            load_optimiser(optimiser, state["optimisers"][name])
        self.update, self.student_updates = state["update"], state["student_updates"]
