"""Artifact: a compiled program, the state it carries between steps, and where it came from.

This is the contract between the compiler, which writes artifacts, and the runtime, which runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from .program import Program

Segment = Callable[..., Sequence[Any]]
"""A compiled piece of a graph: positional inputs to a flat sequence of outputs."""


@dataclass(frozen=True)
class SymbolicSize:
    """A size that is known when a program is called: an expression of symbols that are among its inputs.

    Attributes:
        expression: in Python, over the symbols.
        symbols: each symbol with the position of the input that holds its value.
        example: the size at the call that the program was compiled for.
    """

    expression: str
    symbols: tuple[tuple[str, int], ...]
    example: int

    def value(self, inputs: Sequence[Any]) -> int:
        """The size for a call with these inputs."""
        import sympy  # type: ignore[import-untyped]

        numbers = {sympy.Symbol(name): int(inputs[position]) for name, position in self.symbols}
        return int(sympy.sympify(self.expression, locals={s.name: s for s in numbers}).subs(numbers))


@dataclass(frozen=True)
class StateEntry:
    """One tensor that a program carries from step to step.

    It starts as zeros, so a ``bool`` entry starts false: programs mark what they have stored with one of those, and
    compute where there is nothing to reuse. ``host`` entries stay on the host, where decisions read them.
    """

    name: str
    shape: tuple[int | SymbolicSize, ...]
    dtype: torch.dtype
    host: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of one copy of this tensor, at the sizes that the program was compiled for."""
        sizes = [size.example if isinstance(size, SymbolicSize) else size for size in self.shape]
        return torch.Size(sizes).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StateSpec:
    """The state of one guidance branch of one trajectory, in the order in which the program takes and returns it."""

    entries: tuple[StateEntry, ...] = ()

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if len(set(names)) != len(names):
            raise ValueError(f"state entries need different names, got {names}")

    def initial(self, device: torch.device, inputs: Sequence[Any] = ()) -> tuple[torch.Tensor, ...]:
        """The state before the first step of a generation whose calls have ``inputs`` of these sizes."""
        return tuple(
            torch.zeros(
                [size.value(inputs) if isinstance(size, SymbolicSize) else size for size in entry.shape],
                dtype=entry.dtype,
                device=torch.device("cpu") if entry.host else device,
            )
            for entry in self.entries
        )

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Refuses a state that is not of this layout.

        Raises:
            ValueError: another number, shape or dtype of tensors.
        """
        found = [(tuple(t.shape), t.dtype) for t in tensors]
        wanted = [(entry.shape, entry.dtype) for entry in self.entries]
        if found != wanted:
            raise ValueError(f"the state has the layout {found}, this program needs {wanted}")

    @property
    def bytes(self) -> int:
        """Bytes of the state of one branch."""
        return sum(entry.bytes for entry in self.entries)


@dataclass(frozen=True)
class Gauge:
    """Something that a program measures at every call: float32, one value for each label.

    Unlike state nobody reads it in the next step, it belongs to no trajectory, and precise steps may lack it; so it is
    summed up per module, on the device, until somebody asks.
    """

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Controls:
    """Numbers that a program takes with every call, as one float32 vector: ``names`` first, then ``table``.

    ``defaults`` are those of the plan; a session may say otherwise. The number called :attr:`STEPS` is how many steps
    the session announced, 0 where nobody did. ``host``: the vector is read on the host.
    """

    names: tuple[str, ...] = ()
    defaults: tuple[float, ...] = ()
    table: tuple[float, ...] = ()
    host: bool = False

    STEPS: ClassVar[str] = "steps"
    NEED_STEPS: ClassVar[frozenset[str]] = frozenset({"last", "tail", "share"})
    """Controls that mean nothing, unless they are 0, where nobody said how many steps there are."""

    def __bool__(self) -> bool:
        return bool(self.names)

    def values(self, overrides: Mapping[str, float], steps: int | None) -> tuple[float, ...]:
        """The vector for one call.

        Raises:
            ValueError: an override that is no control of this program, or no number from 0 up; or steps at the end are
                to be computed and nobody said which those are.
        """
        for name, value in overrides.items():
            if name not in self.names or name == self.STEPS:
                known = ", ".join(n for n in self.names if n != self.STEPS)
                raise ValueError(f"this program has no control {name!r}: there are {known}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r}: a number from 0 up is wanted")
        found = dict(zip(self.names, self.defaults, strict=True)) | dict(overrides)
        for name in found:
            if name in self.NEED_STEPS and found[name] and steps is None:
                raise ValueError(last_unknown(f"{name}={found[name]:g}"))
        if self.STEPS in found:
            found[self.STEPS] = float(steps or 0)
        return (*found.values(), *self.table)


def last_unknown(setting: str) -> str:
    """What to say where a setting is about the last steps, and nobody said which those are."""
    return (
        f"{setting} needs to know which steps are the last: wrap the generation in "
        "`with ditc.session(steps=number_of_steps):`, or draw with ditc.generate"
    )


@dataclass(frozen=True)
class Manifest:
    """Where a program came from: the plan's TOML, the versions of what compiled it, a hash of the rewritten graph.

    ``untouched`` says why the graph runs as it was captured; ``reports`` is what each pass did.
    """

    plan: str
    graph_hash: str
    versions: Mapping[str, str]
    source: str
    untouched: str | None = None
    reports: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of the prologue that shares no computation with the others, and so can run on its own.

    Attributes:
        run: takes the weights at ``inputs``, returns the packed tensors at ``outputs``.
        inputs: positions among the prologue's weights (``Artifact.prepare_inputs``).
        outputs: positions among the packed tensors.
        key: names what ``run`` computes. Equal keys and the same weights mean equal results, which are packed once
            and shared by all programs, such as those of several resolutions.
        quantized: position among this piece's results, and name of the weight, of each quantised weight's scale.
    """

    run: Segment
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    key: str
    quantized: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A program: one prologue that packs weights, segments that run at every call, and the layout of its state.

    Attributes:
        segments: run one after the other; the first takes ``[kept inputs, packed weights, state, controls]``, each next
            one what the one before returned; the last returns ``[outputs, gauges, new state]``. A segment may be a
            :class:`.branched.Branched`, whose parts pass values among themselves.
        prepare: the prologue, which packs weights, in pieces; empty where nothing is packed.
        prepare_inputs: positions among the caller's inputs of the weights that ``prepare`` reads.
        releasable: positions among the caller's inputs of the weights that are released once they are packed.
        input_names: what each of the caller's inputs stands for, for messages.
        kept_inputs: positions among the caller's inputs of what the first segment still reads.
        owner: position of one weight of the module, by which its statistics are found; ``None`` if it has none.
        data_inputs: positions of the tensors that come with each call; their shapes are part of a state's key.
        timestep: position of the timestep input, or ``None`` where the analysis found none.
        watch_weights: whether edits of the weights are looked for at every call.
        controls: numbers that the first segment takes behind the state, where there are any.
        fp32_matmul: who multiplies fp32 matrices while the program runs (``default`` or ``onednn``).
        gauges: what the program measures beside its outputs.
        precise: the same graph without quantisation, for the first and last steps of a generation, or ``None``.
        precise_first, precise_last: how many steps at the start and at the end run ``precise``.

    Raises:
        ValueError: ``precise`` carries other state, or steps are to be precise and it is missing.
    """

    segments: tuple[Segment, ...]
    state: StateSpec
    manifest: Manifest
    prepare: tuple[Piece, ...] = ()
    prepare_inputs: tuple[int, ...] = ()
    releasable: tuple[int, ...] = ()
    input_names: tuple[str, ...] = ()
    kept_inputs: tuple[int, ...] | None = None
    owner: int | None = None
    data_inputs: tuple[int, ...] = ()
    timestep: int | None = None
    watch_weights: bool = True
    controls: Controls = Controls()
    fp32_matmul: str = "default"
    gauges: tuple[Gauge, ...] = ()
    precise: Artifact | None = None
    precise_first: int = 0
    precise_last: int = 0

    def __post_init__(self) -> None:
        if (self.precise is None) != (self.precise_first + self.precise_last == 0):
            raise ValueError("precise steps need a precise program, and a precise program needs precise steps")
        if self.precise is not None and self.precise.state != self.state:
            raise ValueError(
                "precise_first and precise_last are impossible here: without quantisation the program carries other "
                f"state between steps ({self.precise.state.entries} instead of {self.state.entries})"
            )

    def load(self) -> Program:
        """The callable of this artifact, with weights and state kept apart per module and per trajectory."""
        from .program import Program

        return Program(self)
