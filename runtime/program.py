"""Program: the callable of an artifact. It finds packed weights and state for a call, and counts what ran."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ditc.kernels.matmul import fp32_matmul

from .artifact import Artifact
from .session import Slot, find_slot, listen_to_diffusers
from .weights import WeightCache

_programs: weakref.WeakSet[Program] = weakref.WeakSet()


def programs_of(module: torch.nn.Module) -> list[Program]:
    """The programs that have run with a weight of ``module``."""
    owned = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    found = [program for program in list(_programs) if program.calls_by(owned)]
    return sorted(found, key=lambda program: program.number)


class Program:
    """Runs an artifact. Safe to call from several threads, each with trajectories of its own."""

    _count = 0

    def __init__(self, artifact: Artifact) -> None:
        Program._count += 1
        self.number = Program._count
        self.artifact = artifact
        self.calls = 0
        self._owners: dict[int, list[Any]] = {}
        self._lock = threading.Lock()
        prepare = artifact.prepare
        self.weights = WeightCache(prepare, artifact.watch_weights, artifact.quantized) if prepare is not None else None
        self._matmul: Callable[[], AbstractContextManager[object]] = (
            nullcontext if artifact.fp32_matmul == "default" else fp32_matmul
        )
        _programs.add(self)
        listen_to_diffusers()

    def __call__(self, *inputs: Any) -> Any:
        """Takes the inputs of the captured graph and returns its outputs."""
        artifact = self.artifact
        self._count_call(inputs)
        run = list(inputs) if artifact.kept_inputs is None else [inputs[i] for i in artifact.kept_inputs]
        # finding the slot reads the timestep, which waits for a GPU: only for those who need it
        watched = self.weights is not None and artifact.watch_weights
        slot = self._slot(inputs) if watched or artifact.state.entries else Slot()
        if self.weights is not None:
            run += self.weights.get([inputs[i] for i in artifact.prepare_inputs], thorough=slot.calls == 0)
        if not artifact.state.entries:
            outputs = self._run(run)
            slot.commit(())
            return outputs
        state = slot.tensors or artifact.state.initial(self._device(inputs))
        outputs = self._run(run + list(state))
        kept_state = len(artifact.state.entries)
        slot.commit(tuple(outputs[-kept_state:]))
        return outputs[:-kept_state]

    def _run(self, values: list[Any]) -> Any:
        with self._matmul():
            for segment in self.artifact.segments:
                values = segment(*values)  # type: ignore[assignment]
        return values

    def _slot(self, inputs: tuple[Any, ...]) -> Slot:
        artifact = self.artifact
        signature = tuple(tuple(inputs[i].shape) for i in artifact.data_inputs)
        timestep: float | None = None
        if artifact.timestep is not None:
            value = inputs[artifact.timestep]
            if not (value.is_cuda and torch.cuda.is_current_stream_capturing()) and value.numel():
                timestep = float(value.reshape(-1)[0])
        return find_slot(self, signature, timestep)

    def _device(self, inputs: tuple[Any, ...]) -> torch.device:
        first: torch.Tensor = next(inputs[i] for i in self.artifact.data_inputs)
        return first.device

    def _count_call(self, inputs: tuple[Any, ...]) -> None:
        self.calls += 1
        if self.artifact.owner is None:
            return
        weight = inputs[self.artifact.owner]
        entry = self._owners.get(id(weight))
        if entry is None or entry[0]() is not weight:
            with self._lock:
                self._owners = {k: e for k, e in self._owners.items() if e[0]() is not None}
                self._owners[id(weight)] = entry = [weakref.ref(weight), 0]
        entry[1] += 1

    def calls_by(self, owned: dict[int, torch.Tensor]) -> int:
        """Calls made with one of these tensors (by ``id``) as a weight."""
        return sum(count for key, (ref, count) in self._owners.items() if key in owned and ref() is owned[key])
