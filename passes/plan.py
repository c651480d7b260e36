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
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ditc.kernels.formats import FORMATS

from .cache.chunks.options import ChunkOptions
from .cache.options import CacheOptions
from .errors import PlanError
from .structure import AttentionKind, Role

Format = Literal["int8", "fp8", "mxfp8", "mxfp4", "nvfp4"]
Quantize = Literal["none", "auto", "int8", "fp8", "mxfp8", "mxfp4", "nvfp4"]
Threshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positions = Annotated[int, Field(ge=0)]
Attention = Literal["auto", "native", "int8", "fp8", "nvfp4"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

KINDS: tuple[str, ...] = get_args(AttentionKind)
"""Kinds of attention sites by which a plan's tables name them, beside ``*`` for the rest."""


class Plan(BaseModel):
    """What the compiler should do with a model.

    Unknown keys, wrong types and impossible combinations are refused with :class:`PlanError`, from every door:
    the constructor, :meth:`from_options`, :meth:`from_toml`.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    quantize: Quantize | dict[str, Quantize] = Field(
        "none",
        description="the format of linears: one for the token path inside blocks, 'auto' for the fastest that keeps "
        "error_budget, or a table from roles ('attention', 'mlp.down', ...; '*' for the rest) to formats",
    )
    activations: Literal["dynamic", "static", "none"] = Field(
        "dynamic", description="ranges of activations: of each call, from a calibration, or weights only are quantised"
    )
    calibration: str | None = Field(
        None,
        description="file written by ditc.calibrate: static ranges, smoothing, measured errors, cache policies' fits",
    )
    error_budget: float = Field(
        20.0, ge=0, le=200, description="least SQNR in dB of an output that quantize='auto' and attention='auto' accept"
    )
    lowrank: int = Field(
        0, ge=0, le=1024, description="rank of a high-precision branch beside each quantised linear (SVDQuant)"
    )
    cost_table: str | None = Field(None, description="file with measured times of this device, instead of ditc's own")
    precise_first: int = Field(0, ge=0, description="steps at the start of a generation that run at full precision")
    precise_last: int = Field(
        0,
        ge=0,
        description="steps at the end that run at full precision; needs ditc.session(steps=...) or ditc.generate",
    )
    free_originals: bool = Field(
        False, description="release weights once they are packed: the module itself cannot run any more"
    )
    fuse: bool = Field(True, description="make one GEMM of linears that share an input (Q, K, V; gate and up)")
    fp32_matmul: Literal["default", "onednn"] = Field(
        "default", description="who multiplies fp32 matrices on a CPU; onednn is refused where it is not fp32-accurate"
    )
    attention: Attention | dict[str, Attention] = Field(
        "native",
        description="how attention is computed: as the model has it, on operands of few bits, or 'auto' for the "
        "fastest that keeps error_budget; or a table from kinds of sites ('self', 'cross', 'joint'; '*' for the rest)",
    )
    attention_sparse: Threshold | dict[str, Threshold] = Field(
        0.0,
        description="blocks of keys whose pooled weight is below this part of the largest are skipped (0: none); "
        "one for all sites or a table by kind",
    )
    attention_window: Positions | dict[str, Positions] = Field(
        0,
        description="positions that a token sees to each side where self-attention runs along one axis of a grid, "
        "such as frames (0: all); one for all sites or a table by kind",
    )
    cache: CacheOptions | None = Field(
        None, description="skip blocks that would change little: a table {policy = ..., threshold = ...}"
    )
    chunks: ChunkOptions | None = Field(
        None,
        description="compute only the tokens of chunks that still change: a table {box = [frames, height, width], ...}",
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
        if isinstance(self.quantize, dict):
            self._check_roles(self.quantize)
        self._check_quantisation()
        self._check_attention()
        self._check_cache()
        return self

    @staticmethod
    def _check_roles(table: Mapping[str, str]) -> None:
        known = sorted({part for role in Role for part in (str(role), str(role).split(".")[0])})
        for name in table:
            if name != "*" and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"known roles: {', '.join(known)}, and '*' for the rest"
                )
                raise ValueError(f"quantize has no role {name!r}: {hint}")
        if not table:
            raise ValueError("quantize is an empty table: use 'none', or name a role")

    def _check_quantisation(self) -> None:
        if not self.quantizes:
            defaults = type(self).model_fields
            for name in ("activations", "lowrank", "free_originals"):
                if getattr(self, name) != defaults[name].default:
                    raise ValueError(f"{name}={getattr(self, name)!r} needs something quantised, and quantize='none'")
        if not self.quantizes and not self.changes_attention:
            for name in ("precise_first", "precise_last"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs something that is not precise, and quantize='none' and "
                        "attention='native'"
                    )
        if self.activations == "static":
            if self.calibration is None:
                raise ValueError("activations='static' needs ranges: calibration='file written by ditc.calibrate'")
            named = self.quantize.values() if isinstance(self.quantize, dict) else (self.quantize,)
            blocks = sorted({name for name in named if name.startswith("mx")})
            if blocks:
                raise ValueError(
                    f"activations='static' is impossible for {', '.join(blocks)}: scales of MX blocks are always those "
                    "of the values at hand; use int8, fp8 or nvfp4"
                )
        if self.free_originals and (self.precise_first or self.precise_last):
            raise ValueError(
                "free_originals=True releases what precise_first and precise_last run on: drop one of them"
            )

    def _check_attention(self) -> None:
        for name in ("attention", "attention_sparse", "attention_window"):
            table = getattr(self, name)
            if not isinstance(table, dict):
                continue
            if not table:
                raise ValueError(f"{name} is an empty table: name a kind ({', '.join(KINDS)}, or '*'), or leave it out")
            for kind in table:
                if kind != "*" and kind not in KINDS:
                    near = difflib.get_close_matches(kind, KINDS, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known kinds: {', '.join(KINDS)}, and '*'"
                    raise ValueError(f"{name} has no kind of attention {kind!r}: {hint}")
        for kind in (kind for kind in KINDS if self.attention_for(kind) == "native"):
            asked = {"attention_sparse": self.sparse_for(kind), "attention_window": self.window_for(kind)}
            for name, value in asked.items():
                if value and self._asks(name, kind):
                    raise ValueError(
                        f"{name}={value!r} needs a kernel that skips keys, and {kind} attention stays native: choose "
                        "'auto', 'int8', 'fp8' or 'nvfp4' for it"
                    )
        if isinstance(self.attention_window, dict):
            for kind in ("cross", "joint"):
                if self.attention_window.get(kind):
                    raise ValueError(
                        f"attention_window has no meaning for {kind} attention, whose queries and keys are not "
                        "positions along one axis: name 'self'"
                    )

    def _check_cache(self) -> None:
        if self.cache is not None and self.chunks is not None:
            raise ValueError(
                "cache and chunks are impossible together: whole steps that are reused would age all chunks unseen; "
                "drop one of them"
            )
        if self.cache is None or self.cache.policy != "magcache" or self.cache.ratios:
            return
        if self.calibration is None:
            raise ValueError(
                "the cache policy 'magcache' needs ratios, one for each step: give them, or "
                "calibration='file written by ditc.calibrate'"
            )
        if self.cache.front_blocks or self.cache.back:
            raise ValueError(
                "a calibration has the ratios of all blocks together: leave out front and back, or give ratios"
            )

    def _asks(self, name: str, kind: str) -> bool:
        """Whether an option is meant for this kind: tables name it; one value for all is meant for what changes."""
        value = getattr(self, name)
        if isinstance(value, dict):
            return kind in value or ("*" in value and not self.changes_attention)
        return not self.changes_attention

    @property
    def changes_attention(self) -> bool:
        """Whether any kind of attention is to be computed otherwise than the model has it."""
        return any(self.attention_for(kind) != "native" for kind in KINDS)

    def attention_for(self, kind: str) -> Attention:
        """What ``attention`` says of sites of this kind."""
        found: Attention = _by_kind(self.attention, kind, "native")
        return found

    def sparse_for(self, kind: str) -> float:
        """The threshold of ``attention_sparse`` for sites of this kind; 0 for none."""
        found: float = _by_kind(self.attention_sparse, kind, 0.0)
        return found

    def window_for(self, kind: str) -> int:
        """The positions to each side that ``attention_window`` leaves sites of this kind; 0 for all."""
        found: int = _by_kind(self.attention_window, kind, 0)
        return found

    @property
    def formats(self) -> frozenset[str]:
        """The formats that ``quantize`` names; all of them for ``auto``."""
        named = set(self.quantize.values()) if isinstance(self.quantize, dict) else {self.quantize}
        return frozenset(FORMATS) if "auto" in named else frozenset(named - {"none"})

    @property
    def quantizes(self) -> bool:
        """Whether anything is to be quantised."""
        return bool(self.formats)

    def format_for(self, role: Role) -> Quantize | None:
        """What ``quantize`` says of linears of this role; ``None`` where it says nothing.

        The longest name wins: ``mlp.down`` before ``mlp`` before ``*``.
        """
        if not isinstance(self.quantize, dict):
            return self.quantize
        for name in (str(role), str(role).split(".")[0], "*"):
            if name in self.quantize:
                return self.quantize[name]
        return None

    def names(self, role: Role) -> bool:
        """Whether ``quantize`` is a table that names this role or its family, other than by ``*``."""
        return isinstance(self.quantize, dict) and bool({str(role), str(role).split(".")[0]} & set(self.quantize))

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
        """The plan as ``torch.compile``'s ``options``; every field that has a value is written, so equal plans share
        graphs."""
        values = self.model_dump(mode="json", exclude_none=True)
        # a table means the same in any order
        return {name: dict(sorted(v.items())) if isinstance(v, dict) else v for name, v in values.items()}

    def to_toml(self) -> str:
        """Stable text: every field, in the order of their declaration."""
        return "".join(f"{name} = {_toml(value)}\n" for name, value in self.to_options().items())

    def key(self) -> str:
        """16 hexadecimal digits that name this plan, for cache keys and file names."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()[:16]

    def __str__(self) -> str:
        changed = self.model_dump(exclude_defaults=True)
        return ", ".join(f"{name}={value}" for name, value in changed.items()) or "default"


def _by_kind(value: Any, kind: str, default: Any) -> Any:
    """What a value for all kinds, or a table of them, says of one."""
    return value.get(kind, value.get("*", default)) if isinstance(value, dict) else value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + " }"
    # a JSON string is a TOML basic string, and JSON's numbers, true and false are TOML's
    return json.dumps(value)


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
