"""``plan.cache``: which policy decides about reuse, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Policy = Literal["first-block", "teacache", "easycache", "magcache", "bwcache", "adacache", "fixed"]

Lowering = Literal["cond", "split", "schedule", "auto"]

Indicator = Literal["modulated", "timestep"]

THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {"first-block": 0.08, "teacache": 0.15, "easycache": 0.05, "magcache": 0.06, "bwcache": 0.15}
)
"""The threshold of a policy where a plan names none: the middle of what its paper uses."""

CODEBOOK = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))
"""AdaCache's for 30 to 100 steps: up to this rate of change, the next step but so many is computed."""

SHARE, TAIL = 0.1, 0.5
"""BWCache: reuse lasts this share of all steps; this part of the steps before the first reused one is computed at the
end."""


def _as_tuple(value: Any) -> Any:
    # TOML and torch.compile's options have lists
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Codebook = Annotated[tuple[tuple[float, int], ...], BeforeValidator(_as_tuple)]


class CacheOptions(BaseModel):
    """When the blocks of a model are skipped.

    Every number but ``front``, ``back`` and ``order`` is an input of the program:
    ``ditc.session(cache={...})`` changes it for one generation without compiling anything.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    policy: Policy = Field(description="what decides: see ditc.passes.cache.rules")
    threshold: float | None = Field(
        None, ge=0, description="change up to which is reused; each policy has its own scale"
    )
    scope: Literal["blocks", "model"] | None = Field(
        None,
        description="what is skipped: the blocks, or the whole model but for what the policy looks at; easycache "
        "always skips the model, first-block, bwcache and adacache always blocks",
    )
    front: int | None = Field(None, ge=0, description="blocks that always run, in front (first-block: 1)")
    back: int = Field(0, ge=0, description="blocks that always run, behind")
    warmup: int | None = Field(None, ge=0, description="steps at the start that are always computed")
    last: int | None = Field(
        None,
        ge=0,
        description="steps at the end that are always computed; needs ditc.session(steps=...) "
        "(0; adacache: 2; bwcache: half of those before the first reused one)",
    )
    max_run: int = Field(
        0, ge=0, description="longest run of reused steps; 0 for any length (bwcache: for a tenth of all steps)"
    )
    interval: int = Field(2, ge=1, description="policy 'fixed': every how many steps one is computed")
    growth: float = Field(1.0, ge=1, le=4, description="policy 'fixed': each interval is so many times the one before")
    indicator: Indicator = Field(
        "modulated",
        description="what the policy 'teacache' looks at: what the first block's first linear reads, or the embedding "
        "of the timestep, which no data has a part in",
    )
    order: int = Field(0, ge=0, le=2, description="order of the Taylor forecast that is reused; 0 reuses as it is")
    lowering: Lowering = Field(
        "auto",
        description="who takes the branch: the graph ('cond'), the host between parts of it ('split'), the host alone "
        "where no data has a part in it ('schedule'), or the best of what is possible",
    )
    storage: Literal["native", "int8", "fp8", "nvfp4"] = Field(
        "native", description="how what is reused is kept: in its own dtype, or in few bits"
    )
    group: str | None = Field(
        None, min_length=1, description="ranks that decide as one: 'world', or the name of a process group"
    )
    codebook: Codebook = Field(
        (), description="policy 'adacache': pairs of a rate of change and the interval up to it; else the paper's"
    )
    motion: Numbers = Field(
        (0.385, 8.0, 10.0),
        description="policy 'adacache': difference between frames at which motion counts as 1, its power, and the "
        "weight of its own change; [] for no motion",
    )
    polynomial: Numbers = Field(
        (), description="policy 'teacache': coefficients, highest power first; else those of the plan's calibration"
    )
    ratios: Numbers = Field(
        (), description="policy 'magcache': magnitude ratio of each step; else those of the plan's calibration"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.policy == "fixed" and self.threshold is not None:
            raise ValueError("threshold means nothing to the policy 'fixed': it counts steps, see interval")
        if self.policy == "first-block" and self.front == 0:
            raise ValueError("the policy 'first-block' looks at what the front blocks do: front is at least 1")
        alone = {"easycache": "model", "first-block": "blocks", "bwcache": "blocks", "adacache": "blocks"}
        if self.scope is not None and self.scope != alone.get(self.policy, self.scope):
            raise ValueError(f"the policy {self.policy!r} has the scope {alone[self.policy]!r} and no other")
        if self.whole and (self.front or self.back):
            raise ValueError("where the whole model is skipped, there are no front or back blocks")
        if (self.interval, self.growth) != (2, 1.0) and self.policy != "fixed":
            raise ValueError(f"interval and growth belong to the policy 'fixed', not to {self.policy!r}")
        if self.interval == 1 and self.growth == 1:
            raise ValueError("interval=1 computes every step: reuse begins at 2, or with growth above 1")
        if self.indicator != "modulated" and self.policy != "teacache":
            raise ValueError(f"indicator belongs to the policy 'teacache', not to {self.policy!r}")
        self._check_numbers()
        return self

    def _check_numbers(self) -> None:
        owners = {"polynomial": "teacache", "ratios": "magcache", "codebook": "adacache", "motion": "adacache"}
        for name, policy in owners.items():
            values = getattr(self, name)
            if values != type(self).model_fields[name].default and self.policy != policy:
                raise ValueError(f"{name} belongs to the policy {policy!r}, not to {self.policy!r}")
            numbers = [number for pair in values for number in pair] if name == "codebook" else values
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name} holds a value that is no finite number")
        if self.policy == "adacache" and self.threshold is not None:
            raise ValueError("threshold means nothing to the policy 'adacache': it has a codebook")
        bounds = [bound for bound, _ in self.codebook]
        if bounds != sorted(set(bounds)) or any(interval < 1 for _, interval in self.codebook):
            raise ValueError("codebook: rates go up, intervals are at least 1: [[0.05, 4], [0.1, 2], [1.0, 1]]")
        if self.motion and (len(self.motion) != 3 or self.motion[0] <= 0 or min(self.motion) < 0):
            raise ValueError("motion: three numbers, the first above 0, none below: [0.385, 8.0, 10.0], or []")

    @property
    def reads_calibration(self) -> bool:
        """Whether the policy goes by fitted numbers and this table names none.

        A calibration's polynomial was fitted to changes of what the first block reads: it says nothing of changes of
        the timestep's embedding, which are taken as they are.
        """
        return self.policy in ("teacache", "magcache") and not self.table and self.indicator == "modulated"

    @property
    def whole(self) -> bool:
        """Whether the whole model is skipped."""
        return self.policy == "easycache" or self.scope == "model"

    @property
    def front_blocks(self) -> int:
        """How many blocks in front always run."""
        return self.front if self.front is not None else int(self.policy == "first-block")

    @property
    def warmup_steps(self) -> int:
        """How many steps at the start are always computed: those that a forecast needs, and what was asked for."""
        return max(self.warmup or 0, self.order + 1)

    def controls(self) -> dict[str, float]:
        """The numbers that are inputs of the program, by name."""
        threshold = self.threshold if self.threshold is not None else THRESHOLDS.get(self.policy, 0.0)
        last = self.last if self.last is not None else 2 * (self.policy == "adacache")
        found = {
            "threshold": threshold,
            "warmup": float(self.warmup_steps),
            "last": float(last),
            "max_run": float(self.max_run),
            "interval": float(self.interval),
            "growth": self.growth,
            "steps": 0.0,
        }
        if self.policy == "bwcache":
            found |= {"share": 0.0 if self.max_run else SHARE, "tail": TAIL if self.last is None else 0.0}
        if self.policy == "adacache":
            reference, power, change = self.motion or (0.0, 1.0, 0.0)
            found |= {"motion_reference": reference, "motion_power": power, "motion_change": change}
        return found

    @property
    def table(self) -> tuple[float, ...]:
        """The numbers of the policy that have no names: an input of the program too."""
        if self.policy == "adacache":
            return tuple(float(number) for pair in self.codebook or CODEBOOK for number in pair)
        return self.polynomial or self.ratios
