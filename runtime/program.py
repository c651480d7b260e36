"""Program: the callable of an artifact. It finds packed weights and state for a call, and counts what ran."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ditc.kernels.errors import DitcError
from ditc.kernels.matmul import fp32_matmul

from .artifact import Artifact, StateSpec, last_unknown
from .branched import Branched
from .chunks import ChunkLog, ChunkStats
from .guards import ONE_GRAPH, UNMEASURED, GuardLog, GuardStats
from .release import refuse_released
from .session import Slot, current_session, find_slot, listen_to_diffusers
from .stopwatch import Laps, together
from .weights import Memory, WeightCache

_programs: weakref.WeakSet[Program] = weakref.WeakSet()

_MOST_VECTORS = 64
"""Vectors of controls that a program keeps on its device."""


def programs_of(module: torch.nn.Module) -> list[Program]:
    """The programs that have run with a weight of ``module``."""
    owned = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    found = [program for program in list(_programs) if program.calls_by(owned)]
    return sorted(found, key=lambda program: program.number)


@dataclass(eq=False)
class _Owner:
    """A weight by which a module is known, the calls made with it, and the sums of what they measured.

    Modules of one class may share a program; each has state of its own, which this object names.
    """

    weight: weakref.ref[Any]
    calls: int = 0
    precise: int = 0
    gauges: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    guards: GuardLog = field(default_factory=GuardLog)
    chunks: ChunkLog = field(default_factory=ChunkLog)

    def record(self, spec: StateSpec, step: int, state: tuple[torch.Tensor, ...]) -> None:
        """Takes note of what a step decided."""
        log = self.chunks if ChunkLog.understands(spec) else self.guards
        log.record(spec, step, state)

    def add(self, name: str, values: torch.Tensor) -> None:
        """Takes note of a gauge's values, without waiting for a GPU."""
        with torch.no_grad():
            # a tensor of a CUDA graph is overwritten by the next replay: the first value is copied, the rest added up
            total, count = self.gauges.get(name, (None, 0))
            self.gauges[name] = (values.clone() if total is None else total + values), count + 1


class _Variant:
    """One way to run a program's graph: its segments, and its own packed weights."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        weights = [self._name(i) for i in artifact.prepare_inputs]
        self._kept: tuple[Sequence[int], list[str]] = ((), [])
        releasable = [k for k, i in enumerate(artifact.prepare_inputs) if i in artifact.releasable]
        self.weights = (
            WeightCache(artifact.prepare, artifact.watch_weights, releasable, weights) if artifact.prepare else None
        )
        self._matmul: Callable[[], AbstractContextManager[object]] = (
            nullcontext if artifact.fp32_matmul == "default" else fp32_matmul
        )

    @property
    def watches(self) -> bool:
        """Whether weights are looked at more thoroughly at the first step of a generation."""
        return self.weights is not None and self.artifact.watch_weights

    @property
    def branches(self) -> bool:
        """Whether the host takes a branch, between parts whose time can be told."""
        return any(isinstance(segment, Branched) for segment in self.artifact.segments)

    def __call__(self, inputs: tuple[Any, ...], state: tuple[torch.Tensor, ...], thorough: bool, laps: Laps) -> Any:
        """Takes the caller's inputs and the state; returns outputs and new state. Times of parts go to ``laps``."""
        artifact = self.artifact
        kept, names = self._kept_of(len(inputs))
        values = [inputs[i] for i in kept]
        refuse_released(values, names)
        if self.weights is not None:
            values += self.weights.get([inputs[i] for i in artifact.prepare_inputs], thorough)
        values += state
        with self._matmul():
            for segment in artifact.segments:
                values = segment.run(values, laps) if isinstance(segment, Branched) else segment(*values)  # type: ignore[assignment]
        return values

    def _kept_of(self, count: int) -> tuple[Sequence[int], list[str]]:
        """Positions and names of those of ``count`` inputs that the segments take; looked up once."""
        if not self._kept[1]:
            kept = range(count) if self.artifact.kept_inputs is None else self.artifact.kept_inputs
            self._kept = kept, [self._name(i) for i in kept]
        return self._kept

    def _name(self, position: int) -> str:
        names = self.artifact.input_names
        return names[position] if position < len(names) else f"input {position}"


class Program:
    """Runs an artifact. Safe to call from several threads, each with trajectories of its own."""

    _count = 0

    def __init__(self, artifact: Artifact) -> None:
        Program._count += 1
        self.number = Program._count
        self.artifact = artifact
        self.calls = 0
        self._owners: dict[int, _Owner] = {}
        self._lock = threading.Lock()
        self._vectors: dict[tuple[Any, ...], torch.Tensor] = {}
        self._main = _Variant(artifact)
        self._precise = _Variant(artifact.precise) if artifact.precise is not None else None
        # finding the slot may read the timestep, which waits for a GPU: only for those who need it
        variants = [variant for variant in (self._main, self._precise) if variant is not None]
        carries = bool(artifact.state.entries or artifact.controls)
        self._timed = self._main.branches
        self._needs_slot = len(variants) > 1 or carries or any(v.watches for v in variants)
        self.caches = [variant.weights for variant in variants if variant.weights is not None]
        _programs.add(self)
        listen_to_diffusers()

    def __call__(self, *inputs: Any) -> Any:
        """Takes the inputs of the captured graph and returns its outputs.

        Raises:
            WeightError: a weight cannot be packed, or its values were released.
            DitcError: the last steps are to be precise, and nobody said which step is the last.
        """
        artifact = self.artifact
        owner = self._owner(inputs)
        slot = self._slot(inputs, owner) if self._needs_slot else Slot()
        variant = self._variant(slot.calls)
        self.calls += 1
        if owner is not None:
            owner.calls += 1
            owner.precise += variant is self._precise
        state: tuple[torch.Tensor, ...] = ()
        if artifact.state.entries:
            state = slot.tensors or artifact.state.initial(self._device(inputs), inputs)
        if artifact.controls:
            place = torch.device("cpu") if artifact.controls.host else self._device(inputs)
            state = (*state, self._controls(place))
        measured = self._timed and owner is not None and variant is self._main
        laps = owner.guards.watch.start(self._device(inputs)) if measured and owner is not None else Laps()
        outputs = variant(inputs, state, slot.calls == 0, laps)
        gauges = variant.artifact.gauges
        own = len(outputs) - len(artifact.state.entries) - len(gauges)
        new = tuple(outputs[own + len(gauges) :])
        if owner is not None and artifact.controls:
            owner.record(artifact.state, slot.calls, new)
            owner.guards.watch.stop(laps)
        slot.commit(new)
        if not gauges and not artifact.state.entries:
            return outputs
        if owner is not None:
            with self._lock:
                for gauge, values in zip(gauges, outputs[own:], strict=False):
                    owner.add(gauge.name, values)
        return outputs[:own]

    def _controls(self, device: torch.device) -> torch.Tensor:
        """The numbers of this call, on the device; those of the call before where they are the same."""
        current = current_session()
        overrides, steps = (current.cache, current.steps) if current is not None else ({}, None)
        try:
            key = (device, *self.artifact.controls.values(overrides, steps))
        except ValueError as error:
            raise DitcError(str(error)) from None
        found = self._vectors.get(key)
        if found is None:
            if len(self._vectors) >= _MOST_VECTORS:
                self._vectors.clear()
            self._vectors[key] = found = torch.tensor(key[1:], dtype=torch.float32).to(device)
        return found

    def _variant(self, step: int) -> _Variant:
        """What runs at the ``step``-th call (from 0) of a branch. Calls beyond the announced number are precise."""
        if self._precise is None:
            return self._main
        first, last = self.artifact.precise_first, self.artifact.precise_last
        if not last:
            return self._precise if step < first else self._main
        current = current_session()
        if current is None or current.steps is None:
            raise DitcError(last_unknown(f"precise_last={last}"))
        return self._precise if step < first or step >= current.steps - last else self._main

    def _slot(self, inputs: tuple[Any, ...], owner: _Owner | None) -> Slot:
        artifact = self.artifact
        signature = tuple(tuple(inputs[i].shape) for i in artifact.data_inputs)
        timestep: float | None = None
        if artifact.timestep is not None and current_session() is None:
            value = inputs[artifact.timestep]
            if not (value.is_cuda and torch.cuda.is_current_stream_capturing()) and value.numel():
                timestep = float(value.reshape(-1)[0])
        return find_slot(self if owner is None else owner, signature, timestep)

    def _device(self, inputs: tuple[Any, ...]) -> torch.device:
        first: torch.Tensor = next(inputs[i] for i in self.artifact.data_inputs)
        return first.device

    def _owner(self, inputs: tuple[Any, ...]) -> _Owner | None:
        """Whose call it is; ``None`` where the program takes no weights."""
        if self.artifact.owner is None:
            return None
        weight = inputs[self.artifact.owner]
        entry = self._owners.get(id(weight))
        if entry is None or entry.weight() is not weight:
            with self._lock:
                self._owners = {k: e for k, e in self._owners.items() if e.weight() is not None}
                # another thread may have come first, and both have to find the same state
                entry = self._owners.setdefault(id(weight), _Owner(weakref.ref(weight)))
        return entry

    def calls_by(self, owned: dict[int, torch.Tensor]) -> int:
        """Calls made with one of these tensors (by ``id``) as a weight."""
        return sum(entry.calls for entry in self._owned(owned))

    def precise_calls_by(self, owned: dict[int, torch.Tensor]) -> int:
        """Those of :meth:`calls_by` that ran without quantisation because of their step."""
        return sum(entry.precise for entry in self._owned(owned))

    def gauges_by(self, owned: dict[int, torch.Tensor]) -> dict[str, dict[str, float]]:
        """By gauge and label, the mean over those of :meth:`calls_by` that measured; waits for the device."""
        found: dict[str, dict[str, float]] = {}
        for gauge in self.artifact.gauges:
            sums = [entry.gauges[gauge.name] for entry in self._owned(owned) if gauge.name in entry.gauges]
            if sums:
                calls = sum(count for _, count in sums)
                totals = torch.stack([total.cpu() for total, _ in sums]).sum(0) / calls
                found[gauge.name] = dict(zip(gauge.labels, totals.tolist(), strict=True))
        return found

    def guard_by(self, owned: dict[int, torch.Tensor]) -> GuardStats | None:
        """What the guard decided in those of :meth:`calls_by`, if there is a guard; waits for the device."""
        if not self.artifact.controls or ChunkLog.understands(self.artifact.state):
            return None
        logs = [entry.guards for entry in self._owned(owned)]
        times = [time for time in (log.watch.read() for log in logs) if time is not None]
        why = None if times else (UNMEASURED if self._timed else ONE_GRAPH)
        return GuardStats(tuple(step for log in logs for step in log.steps()), together(times), why)

    def chunks_by(self, owned: dict[int, torch.Tensor]) -> ChunkStats | None:
        """Which chunks were computed in those of :meth:`calls_by`, if any are; waits for the device."""
        if not ChunkLog.understands(self.artifact.state):
            return None
        return ChunkStats(tuple(step for entry in self._owned(owned) for step in entry.chunks.steps()))

    def _owned(self, owned: dict[int, torch.Tensor]) -> list[_Owner]:
        return [e for key, e in list(self._owners.items()) if key in owned and e.weight() is owned[key]]

    def memory(self) -> Memory:
        """Bytes of packed weights and of the weights they came from; precise and quantised packings add up."""
        found = [cache.memory() for cache in self.caches]
        return Memory(
            sum(memory.packed for memory in found),
            max((memory.originals for memory in found), default=0),
            sum(memory.released for memory in found),
            max((memory.peak for memory in found), default=0),
        )
