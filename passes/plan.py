"""Plan: what the user chose, strict, frozen, with one stable text.

The text of a plan is part of every cache key of the compiler, so two plans that mean the same write the same text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import PlanError

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Plan(BaseModel):
    """What the compiler should do with a model.

    Unknown keys, wrong types and impossible combinations are refused with :class:`PlanError`, from every door:
    the constructor, :meth:`from_options`, :meth:`from_toml`.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    quantize: Literal["none", "int8"] = Field(
        "none", description="dynamic quantisation of token-path linears: int8 is per token x per output channel"
    )
    fuse: bool = Field(True, description="make one GEMM of linears that share an input (Q, K, V; gate and up)")
    fp32_matmul: Literal["default", "onednn"] = Field(
        "default", description="who multiplies fp32 matrices on a CPU; onednn is refused where it is not fp32-accurate"
    )
    weights: Literal["watch", "frozen"] = Field(
        "watch", description="watch: packed weights follow every edit of the module; frozen: packed once per module"
    )
    mode: Mode = Field("default", description="as torch.compile's mode")
    lower: Literal["inductor", "eager"] = Field(
        "inductor", description="who runs the rewritten graph; eager is for debugging and has no fusion"
    )

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise PlanError(_explain(error)) from None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.lower == "eager" and self.mode != "default":
            raise ValueError(f"mode={self.mode!r} is inductor's: with lower='eager' only mode='default' is possible")
        return self

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | Plan | None, mode: str | None = None) -> Plan:
        """The plan of ``torch.compile(..., backend="ditc", options=options, mode=mode)``.

        Raises:
            PlanError: an unknown option, a wrong value, or a combination that cannot be.
        """
        if isinstance(options, Plan):
            return options
        values = dict(options or {})
        if mode is not None:
            values["mode"] = mode
        return cls(**values)

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Reads what :meth:`to_toml` wrote.

        Raises:
            PlanError: no TOML, or not a plan.
        """
        try:
            return cls(**tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"the plan is not TOML: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan from a TOML file."""
        return cls.from_toml(Path(path).read_text(encoding="utf-8"))

    def to_options(self) -> dict[str, Any]:
        """The plan as ``torch.compile``'s ``options``; every field is written, so equal plans share graphs."""
        return self.model_dump(mode="json")

    def to_toml(self) -> str:
        """Stable text: every field, in the order of their declaration."""
        # a JSON string is a TOML basic string, and JSON's true and false are TOML's
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.to_options().items())

    def key(self) -> str:
        """16 hexadecimal digits that name this plan, for cache keys and file names."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()[:16]

    def __str__(self) -> str:
        changed = self.model_dump(exclude_defaults=True)
        return ", ".join(f"{name}={value}" for name, value in changed.items()) or "default"


def _explain(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, Plan.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(Plan.model_fields)}"
            lines.append(f"unknown option {where!r}: {hint}")
        elif where:
            lines.append(f"{where}={fault['input']!r}: {fault['msg']}")
        else:
            lines.append(fault["msg"].removeprefix("Value error, "))
    return "; ".join(lines)
