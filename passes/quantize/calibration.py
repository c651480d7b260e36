"""Calibration: what a model's linears, attentions and blocks see along real trajectories, as data, on disk.

Ranges of activations drift from step to step of a generation, so they are kept per step. How they are observed is
told in ``observe``; here is what a compiler reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx

from ditc.kernels.formats import FORMATS

from ..cache.record import CacheRecord
from ..errors import DitcError
from ..rewrite import input_of, is_weight, made_from_weights

SCHEMA = 3
"""Raised when a field of the file changes its meaning."""

HEADER = "ditc_calibration"
"""Key of the JSON text in the metadata of the safetensors file."""

EXACT_DB = 200.0
"""SQNR of a product without any error (an all-zero weight, for one): finite, so that JSON can hold it."""

JOIN = " + "
"""Stands between the names of the weights that one graph-made weight comes from."""

Activations = Literal["dynamic", "none"]

_SCALE_OF_AMAX = {"int8": 127.0, "fp8": 448.0, "nvfp4": 6.0 * 448.0}
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class CalibrationError(DitcError):
    """A calibration cannot be made, read, or does not belong to this model."""


class LinearRecord(BaseModel):
    """What was seen of one linear ``[..., K] -> [..., N]``.

    Attributes:
        name: its weight's dotted path; of a weight that the graph makes, the paths of all its parts, joined by ``+``.
        role: what it does in the model.
        calls, rows: how often it ran, over how many rows in all.
        step_amax: the largest magnitude of its input at each step of a generation.
        sqnr: per format, the SQNR in dB of its output at each step, with both operands quantised, scales dynamic.
        weight_sqnr: the same with the weight alone quantised.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    name: str
    role: str
    N: int
    K: int
    calls: int
    rows: int
    step_amax: tuple[float, ...] = Field(min_length=1)
    sqnr: dict[str, tuple[float, ...]]
    weight_sqnr: dict[str, tuple[float, ...]]

    @property
    def amax(self) -> float:
        """The largest magnitude of the input over all steps."""
        return max(self.step_amax)


class AttentionRecord(BaseModel):
    """What was seen of the attentions of one name.

    Attributes:
        name: as the structure analysis has it: the path of its module.
        kind: ``self``, ``cross`` or ``joint``.
        steps: of a generation, at which its operands were looked at.
        sqnr: per recipe (``int8`` for the CPU's op, else one of the kernels' ``RECIPES``), the SQNR in dB of its
            output at each of those steps, on a part of its batch, heads and queries.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    name: str
    kind: str
    steps: tuple[int, ...] = Field(min_length=1)
    sqnr: dict[str, tuple[float, ...]]


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    schema_number: int
    model: str
    fingerprint: str
    versions: dict[str, str]
    timesteps: tuple[float | None, ...]
    notes: tuple[str, ...]
    linears: tuple[LinearRecord, ...]
    attentions: tuple[AttentionRecord, ...]
    cache: CacheRecord | None


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranges and errors of a model's linears, by the name of the weight, and of its attentions. ``str()`` is a table.

    Look-ups of linears take the name as the compiler knows it, also that of several weights made into one (``a + b``,
    as after fusion): ranges are then the largest of the parts, SQNR the least.

    Attributes:
        model: the name of the model's class.
        fingerprint: of the model's parameters, see :func:`fingerprint_of`.
        versions: of ditc and torch that made it.
        timesteps: one entry per step of a generation: its timestep, ``None`` where the graph has no such input.
        notes: what could not be observed, and why.
        records: by name.
        channels: by name, float32 ``[K]``: the largest magnitude of each channel of the input.
        attentions: by the name of the site.
        cache: what cache policies learn of all blocks; ``None`` where no blocks were found, or nothing seen to change.
    """

    model: str
    fingerprint: str
    versions: Mapping[str, str]
    timesteps: tuple[float | None, ...]
    notes: tuple[str, ...]
    records: Mapping[str, LinearRecord]
    channels: Mapping[str, Tensor]
    attentions: Mapping[str, AttentionRecord] = field(default_factory=dict)
    cache: CacheRecord | None = None

    def __contains__(self, name: str) -> bool:
        return bool(self._find(name))

    def __len__(self) -> int:
        return len(self.records)

    def amax(self, name: str) -> float:
        """The largest magnitude of the linear's input over all steps.

        Raises:
            CalibrationError: the linear was not observed.
        """
        return max(record.amax for record in self._of(name))

    def static_scale(self, name: str, format: str) -> float:
        """The scale that lets ``format`` hold every value that was seen: ``static`` of ``ditc::quantize``.

        ``amax / 127`` for int8, ``amax / 448`` for fp8, ``amax / 2688`` (the outer scale) for nvfp4.

        Raises:
            CalibrationError: the linear was not observed, or the format takes no static scale.
        """
        amax = self.amax(name)
        if format not in _SCALE_OF_AMAX:
            known = ", ".join(_SCALE_OF_AMAX)
            raise CalibrationError(f"format {format!r} takes no static scale; those that do: {known}")
        return max(amax / _SCALE_OF_AMAX[format], _SMALLEST_SCALE)

    def channel_amax(self, name: str) -> Tensor:
        """Float32 ``[K]`` on the CPU: the largest magnitude of each channel of the linear's input, over all steps.

        Raises:
            CalibrationError: the linear was not observed, or the parts of ``a + b`` have inputs of different widths.
        """
        parts = [self.channels[record.name] for record in self._of(name)]
        if len({part.shape for part in parts}) > 1:
            raise CalibrationError(f"the parts of {name!r} read inputs of different widths")
        return torch.stack(parts).amax(0)

    def sqnr(self, name: str, format: str, activations: Activations = "dynamic") -> float | None:
        """The SQNR in dB of the linear's output at its worst step; ``None`` where the format does not fit its K.

        Args:
            name: of its weight.
            format: of both operands (``dynamic``) or of the weight alone (``none``).
            activations: whether the input is quantised.

        Raises:
            CalibrationError: the linear was not observed.
        """
        found = []
        for record in self._of(name):
            steps = (record.sqnr if activations == "dynamic" else record.weight_sqnr).get(format)
            if steps is None:
                return None
            found.append(min(steps))
        return min(found)

    def attention_sqnr(self, name: str, recipe: str) -> float | None:
        """The SQNR in dB of an attention's output at its worst step; ``None`` where that was not measured."""
        record = self.attentions.get(name)
        steps = record.sqnr.get(recipe) if record is not None else None
        return min(steps) if steps else None

    def drift(self, name: str) -> float:
        """The largest ``amax`` of a step by the smallest: 1 where the range stays the same; ``inf`` from zero.

        A static range costs a format with few exponents (int8) up to this factor in resolution at the quiet steps.

        Raises:
            CalibrationError: the linear was not observed.
        """
        return max(_ratio(record.step_amax) for record in self._of(name))

    def check(self, model: torch.nn.Module) -> None:
        """Refuses another model than the one that was calibrated.

        Raises:
            CalibrationError: names or shapes of the parameters differ.
        """
        found = fingerprint_of(model)
        if found != self.fingerprint:
            raise CalibrationError(
                f"this calibration is of a {self.model} with parameters {self.fingerprint}, the model given is a "
                f"{type(model).__name__} with {found}: calibrate it with ditc.calibrate"
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: ``channels`` as tensors, everything else as JSON in its metadata.

        The file appears as a whole or not at all.
        """
        from safetensors.torch import save as to_bytes

        path = Path(path)
        header = _Header(
            schema_number=SCHEMA,
            model=self.model,
            fingerprint=self.fingerprint,
            versions=dict(self.versions),
            timesteps=self.timesteps,
            notes=self.notes,
            linears=tuple(self.records.values()),
            attentions=tuple(self.attentions.values()),
            cache=self.cache,
        )
        data = to_bytes({n: t.contiguous() for n, t in self.channels.items()}, {HEADER: header.model_dump_json()})
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path, model: torch.nn.Module | None = None) -> Calibration:
        """Reads what :meth:`save` wrote, and checks that it is of ``model`` where that is given.

        Raises:
            CalibrationError: no such file, none of ours, written by another version, damaged, or of another model.
        """
        header, channels = _read(Path(path))
        found = cls(
            header.model,
            header.fingerprint,
            header.versions,
            header.timesteps,
            header.notes,
            {record.name: record for record in header.linears},
            channels,
            {record.name: record for record in header.attentions},
            header.cache,
        )
        if model is not None:
            found.check(model)
        return found

    def __rich__(self) -> Group:
        cache = [] if self.cache is None else [Text(f"cache: {self.cache}")]
        return Group(self._linears_table(), *([self._attentions_table()] if self.attentions else []), *cache)

    def _attentions_table(self) -> Table:
        table = Table(title=f"{len(self.attentions)} attentions", title_justify="left")
        recipes = list(dict.fromkeys(recipe for record in self.attentions.values() for recipe in record.sqnr))
        table.add_column("attention", overflow="fold")
        table.add_column("kind")
        for column in ("steps", *(f"{recipe} dB" for recipe in recipes)):
            table.add_column(column, justify="right")
        for name, record in self.attentions.items():
            errors = [self.attention_sqnr(name, recipe) for recipe in recipes]
            cells = ("-" if error is None else f"{error:.1f}" for error in errors)
            table.add_row(name, record.kind, str(len(record.steps)), *cells)
        return table

    def _linears_table(self) -> Table:
        seen = f"{len(self.records)} linears, {len(self.timesteps)} step{'s' if len(self.timesteps) > 1 else ''}"
        table = Table(title=f"ditc: calibration of {self.model}, {seen}", title_justify="left")
        formats = [name for name in FORMATS if any(name in record.sqnr for record in self.records.values())]
        table.add_column("linear", overflow="fold")
        table.add_column("role")
        for column in ("N × K", "amax", "drift", *(f"{format} dB" for format in formats)):
            table.add_column(column, justify="right")
        for name, record in self.records.items():
            errors = [self.sqnr(name, format) for format in formats]
            cells = ("-" if error is None else f"{error:.1f}" for error in errors)
            row = (name.removesuffix(".weight"), record.role, f"{record.N} × {record.K}", f"{record.amax:.3g}")
            table.add_row(*row, f"{self.drift(name):.2f}", *cells)
        return table

    def __str__(self) -> str:
        return _as_text(self)

    def _of(self, name: str) -> list[LinearRecord]:
        found = self._find(name)
        if not found:
            raise CalibrationError(f"no linear {name!r} in this calibration of a {self.model}")
        return found

    def _find(self, name: str) -> list[LinearRecord]:
        if name in self.records:
            return [self.records[name]]
        parts = name.split(JOIN)
        return [self.records[part] for part in parts] if all(part in self.records for part in parts) else []


def fingerprint_of(model: torch.nn.Module) -> str:
    """16 hexadecimal digits of the names and shapes of a model's parameters; their values and dtypes do not matter."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in model.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def weight_parts(weight: fx.Node) -> tuple[fx.Node, ...] | None:
    """The module's weights that a linear's weight comes from; ``None`` where an input of the caller's has a part."""
    if is_weight(weight):
        return (weight,)
    made = made_from_weights(weight)
    if made is None:
        return None
    return tuple(dict.fromkeys(part for node in made for part in node.all_input_nodes if is_weight(part)))


def weight_name(weight: fx.Node) -> str | None:
    """The name by which a calibration knows a linear: that of its weight, or of all weights behind it, joined."""
    parts = weight_parts(weight)
    return JOIN.join(input_of(part).name for part in parts) if parts else None


def _ratio(values: Iterable[float]) -> float:
    known = list(values)
    low, high = min(known), max(known)
    return high / low if low else (math.inf if high else 1.0)


def _as_text(table: Any) -> str:
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    Console(file=file, width=140, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            channels: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CalibrationError(f"there is no calibration at {path}") from None
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is damaged or no calibration: {error}") from error
    if HEADER not in metadata:
        raise CalibrationError(f"{path} is a safetensors file without a calibration in it")
    try:
        plain = json.loads(metadata[HEADER])
        found = plain.get("schema_number") if isinstance(plain, dict) else None
        if found != SCHEMA:
            raise CalibrationError(f"{path} has the layout {found}, this ditc reads {SCHEMA}: calibrate again")
        header = _Header.model_validate_json(metadata[HEADER])
    except ValueError as error:
        raise CalibrationError(f"{path} does not hold a calibration that this ditc reads: {_first(error)}") from error
    wanted = {record.name: (record.K,) for record in header.linears}
    if wanted != {name: tuple(tensor.shape) for name, tensor in channels.items()}:
        raise CalibrationError(f"{path} is damaged: its tensors are not those of its linears")
    return header, channels


def _first(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    return str(error)
