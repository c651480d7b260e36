"""``plan.cache``: which policy decides about reuse, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Policy = Literal["first-block", "teacache", "easycache", "magcache", "fixed"]

Lowering = Literal["cond", "split", "schedule", "auto"]

THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {"first-block": 0.08, "teacache": 0.15, "easycache": 0.05, "magcache": 0.06}
)
"""The threshold of a policy where a plan names none: the middle of what its paper uses."""


def _as_tuple(value: Any) -> Any:
    # TOML and torch.compile's options have lists
    return tuple(value) if isinstance(value, list) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]


class CacheOptions(BaseModel):
    """When the blocks of a model are skipped.

    Every number but ``front``, ``back`` and ``order`` is an input of the program:
    ``ditc.session(cache={...})`` changes it for one generation without compiling anything.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    policy: Policy = Field(description="what decides: see ditc.passes.cache.policy")
    threshold: float | None = Field(
        None, ge=0, description="change up to which is reused; each policy has its own scale"
    )
    front: int | None = Field(None, ge=0, description="blocks that always run, in front (first-block: 1)")
    back: int = Field(0, ge=0, description="blocks that always run, behind")
    warmup: int | None = Field(None, ge=0, description="steps at the start that are always computed")
    last: int = Field(0, ge=0, description="steps at the end that are always computed; needs ditc.session(steps=...)")
    max_run: int = Field(0, ge=0, description="longest run of reused steps; 0 for any length")
    interval: int = Field(2, ge=2, description="policy 'fixed': every how many steps one is computed")
    order: int = Field(0, ge=0, le=2, description="order of the Taylor forecast that is reused; 0 reuses as it is")
    lowering: Lowering = Field(
        "auto",
        description="who takes the branch: the graph ('cond'), the host between parts of it ('split'), the host alone "
        "where no data has a part in it ('schedule'), or the best of what is possible",
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
        if self.policy == "easycache" and (self.front or self.back):
            raise ValueError("the policy 'easycache' skips the whole model: it has no front or back blocks")
        for name, policy in (("polynomial", "teacache"), ("ratios", "magcache")):
            values = getattr(self, name)
            if values and self.policy != policy:
                raise ValueError(f"{name} belongs to the policy {policy!r}, not to {self.policy!r}")
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name} holds a value that is no finite number")
        return self

    @property
    def reads_calibration(self) -> bool:
        """Whether the policy goes by fitted numbers and this table names none."""
        return self.policy in ("teacache", "magcache") and not self.table

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
        return {
            "threshold": threshold,
            "warmup": float(self.warmup_steps),
            "last": float(self.last),
            "max_run": float(self.max_run),
            "interval": float(self.interval),
            "steps": 0.0,
        }

    @property
    def table(self) -> tuple[float, ...]:
        """The numbers of the policy that have no names: an input of the program too."""
        return self.polynomial or self.ratios
