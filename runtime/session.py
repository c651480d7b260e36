"""Sessions: whose state a call of a compiled program reads and writes.

State belongs to one trajectory (one generation of one request) and one guidance branch of it. Callers say so with
:func:`session` and :func:`branch`; diffusers' pipelines say it with ``cache_context``, and
:func:`listen_to_diffusers` hears them. Where nobody says anything, the timestep tells (:class:`Trajectory`). Reading
a context variable raises no guard in Dynamo, so none of this recompiles.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

MOST_BRANCHES = 4
"""More calls than this with one timestep are no guidance branches any more: a new generation is assumed."""

Signature = tuple[tuple[int, ...], ...]


@dataclass
class Slot:
    """The state of one module in one program, of one guidance branch of one trajectory.

    ``tensors`` is ``None`` before a step.
    """

    tensors: tuple[torch.Tensor, ...] | None = None
    calls: int = 0

    def commit(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Takes over the state after a step that succeeded; a step that raised never gets here."""
        self.tensors = tensors
        self.calls += 1


@dataclass
class Trajectory:
    """Tells generations and branches apart by the timesteps of consecutive calls.

    Within a generation the timestep moves in one direction (down for most samplers, up for some), and each branch of
    guidance repeats it. So: an equal timestep is the next branch of the same step; a step against the direction, or
    a new shape, begins a new generation. Interleaved requests that say nothing look like new generations, which
    costs reuse and never correctness.
    """

    last: float | None = None
    direction: int = 0
    calls_at_step: int = 0
    generation: int = 0

    def observe(self, timestep: float | None) -> tuple[int, str]:
        """Takes the timestep of a call and returns its generation and branch."""
        if timestep is None:
            self._restart(None)
        elif self.last is None or timestep != self.last:
            direction = 0 if self.last is None else (1 if timestep > self.last else -1)
            # NaN compares false with everything: it restarts
            if timestep != timestep or self.last is None or (self.direction and direction != self.direction):
                self._restart(timestep)
            else:
                self.direction, self.last, self.calls_at_step = direction, timestep, 1
        elif self.calls_at_step >= MOST_BRANCHES:
            self._restart(timestep)
        else:
            self.calls_at_step += 1
        return self.generation, f"call {self.calls_at_step}"

    def _restart(self, timestep: float | None) -> None:
        self.last, self.direction, self.calls_at_step = timestep, 0, 1
        self.generation += 1


@dataclass(eq=False)
class Session:
    """All state of one trajectory: a slot for each module and program, branch and set of input shapes.

    A session may be entered again (``with session(resume)``) to interleave the steps of several requests. ``steps`` is
    how many calls each branch of the generation will make, where somebody said so; ``cache`` what cache guards are
    told instead of the plan's numbers.
    """

    request: str | None = None
    steps: int | None = None
    cache: dict[str, float] = field(default_factory=dict)
    _slots: weakref.WeakKeyDictionary[Any, dict[tuple[str | None, Signature], Slot]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def slot(self, whose: object, branch: str | None, signature: Signature) -> Slot:
        """The slot of ``whose``; it is fresh when this combination has not run in this session."""
        with self._lock:
            return self._slots.setdefault(whose, {}).setdefault((branch, signature), Slot())

    def reset(self) -> None:
        """Forgets all state: the next step begins a new generation."""
        with self._lock:
            self._slots.clear()

    def bytes(self) -> int:
        """Bytes of all state held."""
        tensors = (t for slots in self._slots.values() for slot in slots.values() for t in slot.tensors or ())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_session: ContextVar[Session | None] = ContextVar("ditc_session", default=None)
_branch: ContextVar[str | None] = ContextVar("ditc_branch", default=None)


class _Implicit(threading.local):
    """What a thread's calls without a session share: one trajectory and one generation's state per module."""

    def __init__(self) -> None:
        self.modules: weakref.WeakKeyDictionary[Any, dict[str | None, tuple[Trajectory, Session]]] = (
            weakref.WeakKeyDictionary()
        )

    def clear(self) -> None:
        self.modules.clear()


_implicit = _Implicit()


def current_session() -> Session | None:
    """The session that surrounds the caller, if any."""
    return _session.get()


def current_branch() -> str | None:
    """The guidance branch that surrounds the caller, if any."""
    return _branch.get()


@contextmanager
def session(
    request: str | Session | None = None, *, steps: int | None = None, cache: Mapping[str, float] | None = None
) -> Iterator[Session]:
    """Opens the session of one generation: calls of compiled programs inside share state with nobody outside.

    Args:
        request: a label for reports, or a :class:`Session` to go on with.
        steps: how often the generation will call the model in each branch of guidance: the number of steps, for
            samplers with one call a step. A plan with ``precise_last`` needs it.
        cache: numbers of the cache guards (``threshold``, ``warmup``, ...) instead of the plan's; from now on, where a
            session goes on. A session inside another (as :func:`ditc.generate` opens one) begins with the other's.
            Nothing is compiled anew.

    Raises:
        ValueError: ``steps`` is below 1, or is not what a session to go on with was opened with.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"a generation has at least one step, got steps={steps}")
    around = _session.get()
    inherited = dict(around.cache) if around is not None else {}
    mine = request if isinstance(request, Session) else Session(request, steps, inherited)
    if steps is not None and mine.steps not in (None, steps):
        raise ValueError(f"this session was opened with steps={mine.steps}, got steps={steps}")
    mine.steps = steps if steps is not None else mine.steps
    mine.cache = dict(cache) if cache is not None else mine.cache
    token = _session.set(mine)
    try:
        yield mine
    finally:
        _session.reset(token)


@contextmanager
def branch(name: str) -> Iterator[None]:
    """Names the guidance branch (``"cond"``, ``"uncond"``) of the calls inside."""
    token = _branch.set(name)
    try:
        yield
    finally:
        _branch.reset(token)


def find_slot(whose: object, signature: Signature, timestep: float | None) -> Slot:
    """The slot that a call belongs to: by session and branch, or else by its timestep.

    Args:
        whose: what names a module in a program; the slot lives no longer than it.
        signature: shapes of the call's data.
        timestep: of the call, where it can be read.
    """
    mine, name = _session.get(), _branch.get()
    if mine is not None:
        return mine.slot(whose, name, signature)
    branches = _implicit.modules.setdefault(whose, {})
    if name not in branches:
        branches[name] = (Trajectory(), Session("implicit"))
    trajectory, state = branches[name]
    before = trajectory.generation
    generation, guessed = trajectory.observe(timestep)
    if generation != before:
        state.reset()
    return state.slot(whose, name or guessed, signature)


def end_generation() -> None:
    """Forgets the state of this thread's calls outside of sessions, as at the end of a pipeline's run."""
    _implicit.clear()


def listen_to_diffusers() -> bool:
    """Makes diffusers' ``cache_context`` name our branches, and its reset end our generation.

    Returns:
        Whether diffusers is loaded and listened to. It is never imported here.
    """
    module = sys.modules.get("diffusers.models.cache_utils")
    mixin = getattr(module, "CacheMixin", None)
    if mixin is None:
        return False
    if getattr(mixin.cache_context, "_ditc_listens", False):
        return True
    context, reset = mixin.cache_context, mixin._reset_stateful_cache

    @contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with context(self, name, *args, **kwargs) as value, branch(name):
            yield value

    def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = _session.get()
        if current is not None:
            current.reset()
        end_generation()
        return reset(self, *args, **kwargs)

    cache_context._ditc_listens = True  # type: ignore[attr-defined]
    mixin.cache_context, mixin._reset_stateful_cache = cache_context, _reset_stateful_cache
    return True
