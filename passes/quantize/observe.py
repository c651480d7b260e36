"""Observation: runs captured graphs node by node and keeps what calibration needs of linears, attentions and blocks."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ditc.kernels.formats import FORMATS, Format

from ..attention.decide import unfit
from ..attention.observe import errors_of, recipes_of
from ..attention.recognise import SITE, RecogniseAttention
from ..backend import reason_to_pass_through, versions
from ..cache.observe import CacheSites, CacheTally, MarkAllBlocks, cache_sites
from ..capture import capture_dynamo, graph_inputs
from ..errors import CaptureError
from ..pipeline import rewrite
from ..plan import Plan
from ..rewrite import aten, calls, facts_of
from ..structure import Role
from .calibration import (
    EXACT_DB,
    JOIN,
    AttentionRecord,
    Calibration,
    CalibrationError,
    LinearRecord,
    fingerprint_of,
    weight_parts,
)

SAMPLE = 256
"""Rows of an input, and output channels of a weight, on which the error of a format is measured: evenly spread ones,
so that the batch (both branches of guidance) and all of an image are among them."""


class Steps(Protocol):
    """One branch of one generation: how many of its calls are over, and what the last of them left."""

    calls: int
    tensors: tuple[Any, ...] | None

    def commit(self, tensors: tuple[Any, ...], /) -> None:
        """Ends a call."""


FindSteps = Callable[[object, tuple[tuple[int, ...], ...], float | None], Steps]
"""(program, shapes of a call's data, timestep or None) -> the branch of the generation that this call belongs to."""


@dataclass(frozen=True)
class _Site:
    """A linear of a graph; ``weights`` are the positions of its parts among the graph's inputs."""

    role: Role
    weights: tuple[int, ...]


@dataclass
class _AttentionTally:
    """What is known of the attentions of one name so far: energy of output and error by recipe and step."""

    kind: str
    energy: dict[str, dict[int, tuple[Tensor, Tensor]]] = field(default_factory=dict)


@dataclass
class _Tally:
    """What is known of one linear so far, as tensors on its device: nothing waits for a GPU before the end."""

    role: str
    N: int
    K: int
    channels: Tensor
    calls: int = 0
    rows: int = 0
    step_amax: dict[int, Tensor] = field(default_factory=dict)
    energy: dict[tuple[str, str], dict[int, tuple[Tensor, Tensor]]] = field(default_factory=dict)


@dataclass(eq=False)
class Observer:
    """A backend for ``torch.compile`` that runs each graph as captured and records its linears and attentions.

    Attributes:
        model: whose parameters name the linears: a graph of a submodule alone does not know where that stands. Weak,
            because Dynamo keeps its backends.
        find_steps: tells generations and their branches apart.
        formats: whose errors are measured.
    """

    model: weakref.ref[torch.nn.Module]
    find_steps: FindSteps
    formats: Sequence[Format] = tuple(FORMATS.values())
    graph_calls: int = 0
    _tallies: dict[str, _Tally] = field(default_factory=dict)
    _attentions: dict[str, _AttentionTally] = field(default_factory=dict)
    _cache: CacheTally = field(default_factory=CacheTally)
    _timesteps: dict[int, float | None] = field(default_factory=dict)
    _notes: dict[str, None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: bool = True

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Captures a graph as the compiler does; one that the compiler would leave alone runs unobserved."""
        reason = reason_to_pass_through(gm, example_inputs)
        if reason is None:
            try:
                capture = capture_dynamo(gm, example_inputs)
            except CaptureError as error:
                reason = str(error)
            else:
                reason = capture.unsupported
        if reason is None:
            return _ObservedGraph(self, _prepare(capture))
        self._notes[f"a graph was not observed: {reason}"] = None

        def unobserved(*inputs: Any) -> Any:
            self.graph_calls += 1
            return gm.forward(*inputs)

        return unobserved

    @property
    def is_open(self) -> bool:
        """Whether calls are still recorded."""
        return self._open

    def paths(self) -> dict[int, list[str]]:
        """All paths in the model of every parameter and buffer, by the tensor's ``id``."""
        model = self._model()
        found: dict[int, list[str]] = {}
        named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for path, tensor in itertools.chain(*named):
            found.setdefault(id(tensor), []).append(path)
        return found

    def _model(self) -> torch.nn.Module:
        model = self.model()
        assert model is not None, "whoever observes holds the model"
        return model

    def record(self, name: str, role: Role, x: Tensor, weight: Tensor, step: int) -> None:
        """Takes note of one call of a linear.

        Args:
            name: of its weight, or several joined.
            role: as the structure analysis has it.
            x: ``[..., K]``, its input.
            weight: ``[N, K]``.
            step: of the generation.
        """
        N, K = weight.shape
        rows_MK = x.detach().reshape(-1, K)
        if not len(rows_MK):
            return
        channels_K = rows_MK.abs().amax(0).float()
        errors = _errors(_spread(rows_MK), weight.detach(), self.formats)
        with self._lock:
            tally = self._tallies.get(name)
            if tally is None:
                tally = self._tallies[name] = _Tally(str(role), N, K, torch.zeros_like(channels_K))
            tally.calls += 1
            tally.rows += len(rows_MK)
            # maximum, unlike max(), keeps NaN
            tally.channels = torch.maximum(tally.channels, channels_K)
            amax = channels_K.amax()
            before = tally.step_amax.get(step)
            tally.step_amax[step] = amax if before is None else torch.maximum(before, amax)
            for key, found in errors.items():
                _add(tally.energy.setdefault(key, {}), step, found)

    def record_attention(self, name: str, kind: str, node: fx.Node, arguments: Sequence[Any], step: int) -> None:
        """Takes note of one call of an attention, at steps 0, 1, 2, 4, 8 and so on: the errors of all recipes take
        longer than the attention.

        Args:
            name, kind: as the structure analysis has them.
            node: the ``scaled_dot_product_attention``.
            arguments: what its positional arguments are in this call.
            step: of the generation.
        """
        if step & (step - 1):
            return
        found = errors_of(arguments, node.kwargs.get("scale"), recipes_of(self.formats))  # type: ignore[arg-type]
        with self._lock:
            tally = self._attentions.setdefault(name, _AttentionTally(kind))
            for recipe, energy in found.items():
                _add(tally.energy.setdefault(recipe, {}), step, energy)

    def record_cache(self, sites: CacheSites, steps: Steps, now: tuple[Tensor | None, ...]) -> None:
        """Takes note of what cache guards go by, in one call; ``now`` as :meth:`CacheSites.values` has it."""
        if steps.tensors:
            with self._lock:
                self._cache.record(sites.batch, steps.calls, steps.tensors, now)

    def saw(self, step: int, timestep: float | None) -> None:
        """Takes note of the timestep that a step had."""
        self._timesteps[step] = timestep if timestep is not None else self._timesteps.get(step)

    def close(self) -> None:
        """Ends recording; graphs that somebody still calls go on unobserved."""
        self._open = False

    def calibration(self) -> Calibration:
        """What was seen; the observer lets go of it.

        Raises:
            CalibrationError: nothing was called, no linear was seen, or an input held NaN or infinity.
        """
        tallies, self._tallies = self._tallies, {}
        attentions, self._attentions = self._attentions, {}
        cache, self._cache = self._cache, CacheTally()
        model = self._model()
        name = type(model).__name__
        if not self.graph_calls:
            raise CalibrationError(f"the calibration run never called the {name} that it was given: call its argument")
        if not tallies:
            why = "; ".join(self._notes) or "its graphs hold no linear on a path from an input"
            raise CalibrationError(f"no linear of the {name} was observed: {why}")
        return Calibration(
            model=name,
            fingerprint=fingerprint_of(model),
            versions=versions(),
            timesteps=tuple(self._timesteps[step] for step in sorted(self._timesteps)),
            notes=tuple(self._notes),
            records={weight: _record(weight, tally) for weight, tally in tallies.items()},
            channels={weight: tally.channels.cpu() for weight, tally in tallies.items()},
            attentions={name: _attention_record(name, tally) for name, tally in attentions.items()},
            cache=cache.result(),
        )


@dataclass(frozen=True)
class _Prepared:
    """A graph to be run: its linears and attentions (name, kind) by node, where its timestep is among its inputs."""

    graph: fx.GraphModule
    linears: dict[str, _Site]
    attentions: dict[str, tuple[str, str]]
    timestep: int | None
    cache: CacheSites | None


def _prepare(capture: Any) -> _Prepared:
    """The canonical graph, with attentions as one call each where that can be proven."""
    rewritten = rewrite(capture, Plan(), passes=(MarkAllBlocks(), RecogniseAttention(everywhere=True)))
    graph = rewritten.graph
    placeholders = graph.graph.find_nodes(op="placeholder")
    position = {node: index for index, node in enumerate(placeholders)}
    linears = {}
    for node in calls(graph, aten.linear.default):
        facts = facts_of(node)
        parts = weight_parts(node.args[1])  # type: ignore[arg-type]
        if facts is not None and facts.role not in (None, Role.UNKNOWN) and parts:
            linears[node.name] = _Site(facts.role, tuple(position[part] for part in parts))
    nodes = {node.meta.get(SITE, node.name): node for node in graph.graph.nodes}
    attentions: dict[str, tuple[str, str]] = {
        nodes[site.node].name: (site.name, site.kind)
        for site in rewritten.structure.attentions
        if site.node in nodes and unfit(site, nodes[site.node]) is None
    }
    found = rewritten.structure.timestep
    timestep = next((position[node] for node in placeholders if found is not None and node.name == found.node), None)
    return _Prepared(graph, linears, attentions, timestep, cache_sites(graph))


class _ObservedGraph:
    """One graph as a callable that records while its observer is open."""

    def __init__(self, observer: Observer, prepared: _Prepared) -> None:
        self._observer, self._prepared = observer, prepared
        self._inputs = graph_inputs(prepared.graph)

    def __call__(self, *inputs: Any) -> Any:
        observer, prepared = self._observer, self._prepared
        with torch.no_grad():
            if not observer.is_open:
                return prepared.graph(*inputs)
            observer.graph_calls += 1
            shapes = tuple(tuple(x.shape) for x, fact in zip(inputs, self._inputs, strict=True) if fact.kind == "data")
            timestep = None
            if prepared.timestep is not None and inputs[prepared.timestep].numel():
                timestep = float(inputs[prepared.timestep].reshape(-1)[0])
            steps = observer.find_steps(self, shapes, timestep)
            observer.saw(steps.calls, timestep)
            known = observer.paths()
            names = {node: self._name(site, inputs, known) for node, site in prepared.linears.items()}
            recording = _Recording(observer, prepared, names, steps.calls)
            returned = recording.run(*inputs)
            now: tuple[Tensor | None, ...] = ()
            if prepared.cache is not None:
                now = prepared.cache.values(recording.looked_at, returned)
                observer.record_cache(prepared.cache, steps, now)
            steps.commit(now)
            return returned

    def _name(self, site: _Site, inputs: Sequence[Any], known: Mapping[int, list[str]]) -> str:
        """The paths of a linear's weights in the whole model; of tied weights the one that the graph knows."""
        names = []
        for position in site.weights:
            own, paths = self._inputs[position].name, known.get(id(inputs[position]), [])
            names.append(own if own in paths or not paths else paths[0])
        return JOIN.join(names)


class _Recording(fx.Interpreter):
    """Runs a graph once and shows the operands of its linears and attentions to the observer."""

    def __init__(self, observer: Observer, prepared: _Prepared, names: Mapping[str, str], step: int) -> None:
        super().__init__(prepared.graph)
        self.extra_traceback = False
        self._observer, self._prepared, self._names, self._step = observer, prepared, names, step
        self._wanted = prepared.cache.names if prepared.cache is not None else frozenset()
        self.looked_at: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        linear = self._prepared.linears.get(n.name)
        if linear is not None:
            (x, weight, *_), _ = self.fetch_args_kwargs_from_env(n)
            self._observer.record(self._names[n.name], linear.role, x, weight, self._step)
        attention = self._prepared.attentions.get(n.name)
        if attention is not None:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            self._observer.record_attention(*attention, n, arguments, self._step)
        value = super().run_node(n)
        if n.name in self._wanted:
            self.looked_at[n.name] = value
        return value


def _spread(rows: Tensor) -> Tensor:
    return rows[:: -(-len(rows) // SAMPLE)]


def _errors(x_MK: Tensor, weight_NK: Tensor, formats: Sequence[Format]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Energy of the output and of its error, by (``dynamic`` or ``none``, format)."""
    x_MK = x_MK.float()
    sample_NK = _spread(weight_NK).float()
    y_MN = x_MK @ sample_NK.t()
    signal = y_MN.double().square().sum()
    found = {}
    for format in formats:
        if format.unsupported(x_MK.shape[1]) is not None:
            continue
        outer = weight_NK.abs().amax().float() / (6 * 448) if format.name == "nvfp4" else None
        w_NK = format.dequantize(format.quantize(sample_NK, static=outer))
        rounded_MK = format.dequantize(format.quantize(x_MK))
        for activations, operand in (("dynamic", rounded_MK), ("none", x_MK)):
            noise = (operand @ w_NK.t() - y_MN).double().square().sum()
            found[activations, format.name] = signal, noise
    return found


def _record(name: str, tally: _Tally) -> LinearRecord:
    amax = {step: float(value) for step, value in sorted(tally.step_amax.items())}
    for step, value in amax.items():
        if not math.isfinite(value):
            raise CalibrationError(f"the input of {name} held NaN or infinity at step {step}: the model diverged")
    errors = {
        key: tuple(_decibels(*map(float, steps[step])) for step in sorted(steps)) for key, steps in tally.energy.items()
    }
    return LinearRecord(
        name=name,
        role=tally.role,
        N=tally.N,
        K=tally.K,
        calls=tally.calls,
        rows=tally.rows,
        step_amax=tuple(amax.values()),
        sqnr={format: values for (activations, format), values in errors.items() if activations == "dynamic"},
        weight_sqnr={format: values for (activations, format), values in errors.items() if activations == "none"},
    )


def _attention_record(name: str, tally: _AttentionTally) -> AttentionRecord:
    steps = sorted({step for energies in tally.energy.values() for step in energies})
    sqnr = {}
    for recipe, energies in tally.energy.items():
        found = [tuple(map(float, energies[step])) for step in steps]
        if not all(math.isfinite(signal) and math.isfinite(noise) for signal, noise in found):
            raise CalibrationError(f"operands of the attention {name} held NaN or infinity: the model diverged")
        sqnr[recipe] = tuple(_decibels(signal, noise) for signal, noise in found)
    return AttentionRecord(name=name, kind=tally.kind, steps=tuple(steps), sqnr=sqnr)


def _add(steps: dict[int, tuple[Tensor, Tensor]], step: int, energy: tuple[Tensor, Tensor]) -> None:
    old = steps.get(step)
    steps[step] = energy if old is None else (old[0] + energy[0], old[1] + energy[1])


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return EXACT_DB
    if signal == 0:
        return -EXACT_DB
    return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(signal / noise)))
