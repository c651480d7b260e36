"""Cost tables: what is known of each device, as JSON files beside this one, read strictly."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ditc.kernels.attention import recipe_of
from ditc.kernels.formats import format_of

from ...errors import PlanError

TABLES = Path(__file__).parent

Activations = Literal["dynamic", "static", "none"]
"""How the input is quantised: with a scale found at every call, with a calibrated one, or not (the weight alone)."""

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a value of each dtype that a linear may have."""


NATIVE, CPU_INT8 = "native", "int8"
"""Ways to compute attention beside the recipes: torch's own, and the op of CPUs with integer dot products."""


class CostError(PlanError):
    """There is no cost table for a device, or a file is none."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Point(_Strict):
    """Seconds of one linear ``[M, K] x [N, K]``, all of it: quantisation of the input included, of the weight not."""

    format: str
    activations: Activations
    dtype: Dtype
    M: int = Field(ge=1)
    N: int = Field(ge=1)
    K: int = Field(ge=1)
    seconds: float = Field(gt=0)

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        return name if name == "none" else format_of(name).name


class AttentionPoint(_Strict):
    """Seconds of one attention without a mask, all of it: quantisation of the operands included.

    Attributes:
        recipe: ``native`` for torch's best ``scaled_dot_product_attention``, ``int8`` for the CPU kernel
            ``ditc::attention_int8``, else a name in ``ditc.kernels.attention.RECIPES``.
        dtype: of queries, keys, values and the output.
        B, H: batch and heads (as many of keys as of queries).
        Lq, Lk, D: queries, keys, features of a head.
    """

    recipe: str
    dtype: Dtype
    B: int = Field(ge=1)
    H: int = Field(ge=1)
    Lq: int = Field(ge=1)
    Lk: int = Field(ge=1)
    D: int = Field(ge=1)
    seconds: float = Field(gt=0)

    @field_validator("recipe")
    @classmethod
    def _known(cls, name: str) -> str:
        return name if name in (NATIVE, CPU_INT8) else recipe_of(name).name


class AttentionSection(_Strict):
    """What the cost model knows of attention on one device, beside its rates.

    Attributes:
        exponentials: per second, as reached: what softmax is bound by where the products are fast; ``None`` where
            this is not known, and then it bounds nothing.
        points: measured seconds that correct the roofline.
    """

    exponentials: Annotated[float, Field(gt=0)] | None = None
    points: tuple[AttentionPoint, ...] = ()


class Source(_Strict):
    """Where a table's numbers are from; ``text`` is what reports say, ``assumptions`` what is not in a data sheet."""

    kind: Literal["measured", "published"]
    text: str
    assumptions: str = ""
    hardware: str
    date: str
    versions: dict[str, str] = {}
    links: tuple[str, ...] = ()


class CostTable(_Strict):
    """What the cost model knows of one device.

    Attributes:
        device: ``cpu`` or ``cuda``.
        name: a regular expression that the device's name must match somewhere.
        capability: of the CUDA devices for which this table stands in where none matches by name.
        launch: seconds that every kernel takes at least.
        quantize: by format, seconds that dynamic quantisation of the input takes beside its bytes.
        bandwidth: bytes per second from memory, as reached.
        rates: multiply-adds x 2 per second, as reached, by dtype and by format. A format without a rate is storage
            only: the device has no arithmetic for it, so its operands are decoded at every call.
        points: measured seconds that correct the roofline.
        attention: the same for attention.
    """

    schema_number: Literal[1]
    device: Literal["cpu", "cuda"]
    name: str
    capability: tuple[int, int] | None
    source: Source
    launch: float = Field(ge=0)
    quantize: dict[str, float]
    bandwidth: float = Field(gt=0)
    rates: dict[str, float]
    points: tuple[Point, ...] = ()
    attention: AttentionSection = AttentionSection()

    @field_validator("name")
    @classmethod
    def _pattern(cls, text: str) -> str:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"{text!r} is no regular expression: {error}") from None
        return text

    @field_validator("rates", "quantize")
    @classmethod
    def _known(cls, values: dict[str, float]) -> dict[str, float]:
        for name, value in values.items():
            if name not in BYTES:
                format_of(name)
            if not value > 0:
                raise ValueError(f"{name}: {value} is not positive")
        return values

    @model_validator(mode="after")
    def _rated(self) -> Self:
        measured = {point.dtype for point in self.points} | {point.dtype for point in self.attention.points}
        missing = measured - set(self.rates)
        if missing:
            raise ValueError(f"points of {', '.join(sorted(missing))}, which has no rate")
        return self

    def dtype(self, name: str) -> str:
        """The dtype whose numbers stand for ``name``: itself, or the other half precision.

        Raises:
            CostError: neither has a rate.
        """
        other = {"float16": "bfloat16", "bfloat16": "float16"}.get(name, name)
        for known in (name, other):
            if known in self.rates:
                return known
        raise CostError(f"the cost table of {self.source.hardware} has no rate of {name}")


@dataclass(frozen=True)
class DeviceKind:
    """What a cost table is chosen by: type, marketing name, and CUDA's compute capability."""

    type: str
    name: str
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: torch.device | str) -> DeviceKind:
        """The kind of a device of this machine."""
        device = torch.device(device)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            return cls("cuda", properties.name, (properties.major, properties.minor))
        return cls(device.type, _cpu_name() if device.type == "cpu" else device.type)


def table_for(device: DeviceKind | torch.device | str) -> CostTable:
    """The table that ships for a device: by name, then by compute capability; on a CPU the only one there is.

    Raises:
        CostError: there is none; measure one with the suite ``linear-cost`` of the benchmarks, or write one.
    """
    kind = device if isinstance(device, DeviceKind) else DeviceKind.of(device)
    mine = [table for table in _shipped() if table.device == kind.type]
    named = [table for table in mine if re.search(table.name, kind.name)]
    capable = [table for table in mine if kind.capability is not None and table.capability == kind.capability]
    found = named or capable or [table for table in mine if kind.type == "cpu"]
    if not found:
        raise CostError(f"no cost table for {kind.name!r}: give one as cost_table, or choose the format yourself")
    # what was measured goes before what was published
    return min(found, key=lambda table: table.source.kind == "published")


def load_table(path: str | Path) -> CostTable:
    """Reads a table and refuses whatever is not exactly one.

    Raises:
        CostError: no such file, no JSON, an unknown or missing key, a wrong type or value.
    """
    path = Path(path)
    try:
        return CostTable.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CostError(f"the cost table {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise CostError(f"{path} is no cost table: {faults}") from None


@functools.cache
def _shipped() -> tuple[CostTable, ...]:
    return tuple(load_table(path) for path in sorted(TABLES.glob("*.json")))


@functools.cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: *(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1) if found else "unknown CPU"
