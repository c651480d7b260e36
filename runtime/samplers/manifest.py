"""Sampler manifest: how a model must be sampled. It travels with a student, and contradictions are refused.

A distilled model is right at its own noise levels only, and nothing in its weights says which. The levels, whether a
shift is already in them, what the model predicts and how guidance is meant are therefore written down, once, strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from .consistency import check_contradictions, check_schedule
from .errors import SamplerError
from .schedule import check_sigmas, flow_sigmas
from .shift import exponential_shift, linear_shift, static_shift, terminal_shift, token_mu
from .text import check_origin, explain, from_text, to_json, to_toml
from .vp import BetaSchedule, alpha_bars

FORMAT = "ditc.sampler"
VERSION = 1

Kind = Literal["euler", "renoise", "lcm", "tcd", "trigflow", "flow_map", "perflow"]
Process = Literal["flow", "vp", "trigflow"]
Prediction = Literal["velocity", "eps", "diff_eps", "x0", "v", "trigflow", "average_velocity"]
Convention = Literal["none", "embedded", "from_unconditional", "from_conditional"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        # TOML and JSON know lists only
        if not isinstance(values, dict):
            return values
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class TokenLine(_Part):
    """mu of a dynamic shift by the number of image tokens, a line through two points (FLUX.1's by default)."""

    base: Finite = 0.5
    highest: Finite = 1.15
    base_tokens: int = Field(256, ge=1)
    highest_tokens: int = Field(4096, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.highest_tokens <= self.base_tokens:
            raise ValueError(f"highest_tokens={self.highest_tokens} must be above base_tokens={self.base_tokens}")
        return self

    def mu(self, tokens: int) -> float:
        """mu of a sample of `tokens` image tokens."""
        line = self.model_dump()
        return token_mu(tokens, **line)


class Shift(_Part):
    """A warp of sigmas toward noise.

    `amount` is the factor of a static shift, mu of an exponential or linear one; `by_tokens` gives mu by resolution
    instead. `terminal` stretches the result so that the last step starts there.
    """

    type: Literal["static", "exponential", "linear"] = "static"
    amount: Finite | None = None
    by_tokens: TokenLine | None = None
    terminal: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.amount is None) == (self.by_tokens is None):
            raise ValueError("a shift needs either amount, or by_tokens where it depends on the resolution")
        if self.by_tokens is not None and self.type == "static":
            raise ValueError("by_tokens gives mu of a dynamic shift: say type='exponential' (FLUX's) or 'linear'")
        if self.type != "exponential" and self.amount is not None and self.amount <= 0:
            raise ValueError(f"amount={self.amount} of a {self.type} shift must be positive; 1 changes nothing")
        return self

    def apply(self, sigmas: Tensor, tokens: int | None = None) -> Tensor:
        """`sigmas` (steps + 1,) fp64, falling from 1 to 0, warped.

        Raises:
            SamplerError: the shift depends on the resolution, and `tokens` is missing.
        """
        amount = self.amount
        if self.by_tokens is not None:
            if tokens is None:
                raise SamplerError("this sampler's shift depends on the resolution: pass tokens, how many a sample has")
            amount = self.by_tokens.mu(tokens)
        assert amount is not None
        warp = {"static": static_shift, "exponential": exponential_shift, "linear": linear_shift}[self.type]
        warped = warp(sigmas, amount)
        return warped if self.terminal is None else terminal_shift(warped, self.terminal)


class Betas(_Part):
    """The noise schedule of a variance-preserving model; the defaults are Stable Diffusion's."""

    schedule: BetaSchedule = "scaled_linear"
    start: Positive = 0.00085
    end: Positive = 0.012
    steps: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.start <= self.end < 1:
            raise ValueError(f"start={self.start} <= end={self.end} < 1 must hold")
        return self

    def table(self) -> tuple[float, ...]:
        """Alpha-bar of every timestep."""
        return tuple(alpha_bars(self.schedule, self.start, self.end, self.steps).tolist())


class GuidanceRule(_Part):
    """How guidance is meant.

    - "none": the model has no unconditional branch, or guidance is distilled into it for good;
    - "embedded": guidance is distilled into it and its scale is an input of the model (FLUX.1-dev);
    - "from_unconditional": uncond + w (cond - uncond), off at w = 1 (diffusers' `guidance_scale`);
    - "from_conditional": cond + w (cond - uncond), off at w = 0 (Z-Image, and many papers).
    """

    convention: Convention = "none"
    scale: Annotated[float, Field(ge=0, le=100)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.convention == "none" and self.scale is not None:
            raise ValueError(
                f"scale={self.scale} contradicts convention='none': name how the scale is meant, or leave it away"
            )
        if self.convention != "none" and self.scale is None:
            raise ValueError(f"convention={self.convention!r} needs scale, the default that the model was made for")
        return self


class Sampler(_Part):
    """How a model must be sampled; see the module.

    Exactly one list of levels is given, by `process`, from noise to the end, which is 0: `sigmas` in [0, 1] (flow),
    `timesteps`, discrete (vp), or `angles` in [0, pi/2] (trigflow).

    Raises:
        SamplerError: unknown keys, wrong types, contradictions; the message says what would be right.
    """

    format: Literal["ditc.sampler"] = "ditc.sampler"
    version: Literal[1] = 1
    name: str = Field("", description="of the model, for messages")
    role: Literal["student", "teacher"] = Field(
        description="a student is right at its own levels only; a teacher may be sampled in any number of steps"
    )
    kind: Kind
    process: Process
    solver: Literal["ode", "sde"] = Field(description="sde draws fresh noise at every step, ode only at the start")
    prediction: Prediction
    steps: int = Field(ge=1, le=1000, description="calls of the model in each branch of guidance")
    sigmas: tuple[Finite, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    angles: tuple[Finite, ...] | None = None
    warped: bool | None = Field(None, description="of sigmas: whether `shift` is already in them, as in most lists")
    shift: Shift | None = Field(None, description="of sigmas: what warps them, or has warped them")
    timestep_scale: Positive = Field(description="the model is given this times sigma, timestep or angle")
    guidance: GuidanceRule = GuidanceRule()
    shape: tuple[int, ...] | None = Field(
        None, description="of one sample, without the batch; -1 where any size will do"
    )
    betas: Betas | None = Field(None, description="of vp")
    eta: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="of tcd: 0 is its ode, 0.3 as published")
    sigma_data: Positive | None = Field(None, description="of trigflow: the deviation of the data, 0.5 as published")
    windows: int | None = Field(None, ge=1, description="of perflow")
    source: str = Field("", description="where the numbers are from")

    def __init__(self, **values: Any) -> None:
        check_origin(values, FORMAT, VERSION)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SamplerError(explain(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _plain_shift(cls, values: Any) -> Any:
        # shift = 5.0 is what people write
        if isinstance(values, dict) and type(values.get("shift")) in (int, float):
            return {**values, "shift": {"amount": float(values["shift"])}}
        return values

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check_contradictions(self)
        check_schedule(self)
        return self

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.name} ({self.role})" if self.name else f"this {self.role}"

    @property
    def levels(self) -> tuple[float, ...]:
        """The list of levels, as written."""
        return next(tuple(map(float, levels)) for levels in (self.sigmas, self.timesteps, self.angles) if levels)

    def resolve(self, tokens: int | None = None) -> Tensor:
        """The levels to walk along, from noise to 0: with the shift, where it is not yet in them.

        Args:
            tokens: image tokens of a sample, for a shift that depends on the resolution.

        Returns:
            (steps + 1,) fp32 on the CPU, computed in fp64.
        """
        levels = torch.tensor(self.levels, dtype=torch.float64)
        if self.process == "flow" and not self.warped and self.shift is not None:
            levels = self.shift.apply(levels, tokens)
        return levels.to(torch.float32)

    def for_steps(self, steps: int) -> Sampler:
        """This sampler, in another number of steps; itself where it has that number already.

        Raises:
            SamplerError: a student, or a list that no formula gives.
        """
        if steps == self.steps:
            return self
        if self.role == "student":
            raise SamplerError(
                f"{self.label} is sampled in {self.steps} steps, not {steps}: it was distilled at the levels "
                f"{_show(self.levels)} and knows no others; sample the teacher if you want more"
            )
        if self.process != "flow" or self.warped or self.kind == "perflow":
            raise SamplerError(
                f"{self.label} lists its {self.steps} levels one by one, so there is no rule for {steps} steps: only "
                "unwarped sigmas of a flow have one"
            )
        if not torch.allclose(torch.tensor(self.levels), flow_sigmas(self.steps), rtol=0, atol=1e-4):
            raise SamplerError(
                f"{self.label} lists sigmas that are not the even grid: nothing says what {steps} steps are"
            )
        return type(self)(**{**self._given(), "steps": steps, "sigmas": tuple(flow_sigmas(steps).tolist())})

    def check_request(
        self,
        *,
        steps: int | None = None,
        sigmas: Tensor | None = None,
        shift: float | None = None,
        shape: Sequence[int] | None = None,
        tokens: int | None = None,
    ) -> None:
        """Refuse what a caller asks for where it contradicts this manifest.

        Args:
            steps, sigmas: (steps + 1,) if the caller insists on them.
            shift: a static shift that the caller would apply.
            shape: of one sample, without the batch.
            tokens: see :meth:`resolve`.

        Raises:
            SamplerError: with what would be right.
        """
        if shift is not None and shift != 1:
            done = "already warped" if self.warped else "warped by its own shift"
            raise SamplerError(
                f"{self.label} is {done}: shift={shift} would warp its levels a second time; leave it away"
            )
        if steps is not None:
            self.for_steps(steps)
        if sigmas is not None:
            if self.process != "flow":
                raise SamplerError(f"{self.label} has no sigmas: its process is {self.process!r}; leave sigmas away")
            check_sigmas(sigmas)
            own = self.for_steps(len(sigmas) - 1).resolve(tokens)
            if not torch.allclose(sigmas.detach().cpu().float(), own, rtol=0, atol=1e-4):
                raise SamplerError(
                    f"{self.label} is sampled at {_show(own.tolist())}, not at {_show(sigmas.tolist())}: leave sigmas "
                    "away"
                )
        if shape is not None and self.shape is not None:
            fits = len(shape) == len(self.shape) and all(
                want in (-1, got) for want, got in zip(self.shape, shape, strict=False)
            )
            if not fits:
                raise SamplerError(f"{self.label} was made for samples of shape {self.shape}; got {tuple(shape)}")

    def _given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)

    def to_dict(self) -> dict[str, Any]:
        """Every field that has a value, in plain types."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> str:
        """Stable JSON, for a student's folder; :meth:`from_text` reads it."""
        return to_json(self.to_dict())

    def to_toml(self) -> str:
        """Stable TOML; :meth:`from_text` reads it."""
        return to_toml(self.to_dict())

    @classmethod
    def from_text(cls, text: str) -> Sampler:
        """Reads JSON or TOML.

        Raises:
            SamplerError: neither, or not a manifest of this format and version.
        """
        return cls(**from_text(text))


def _show(levels: Sequence[float]) -> str:
    shown = [f"{level:.4g}" for level in levels]
    return ", ".join(shown if len(shown) <= 9 else [*shown[:4], "...", *shown[-2:]])
