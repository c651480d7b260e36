"""What cache policies learn of a model from generations that reuse nothing: plain data, kept in a calibration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

DEGREE = 4
"""Degree of TeaCache's polynomial."""


class CacheRecord(BaseModel):
    """How a model's blocks change from step to step.

    Attributes:
        polynomial: TeaCache (2411.19108): coefficients, highest power first, of the polynomial of degree
            :data:`DEGREE` that takes the relative change of what the first block reads to that of the output; empty
            where too few steps were seen, or the first block has no linear on the token path.
        deviation: root mean square of what the polynomial leaves unexplained, in units of relative change.
        pairs: how many changes it was fitted to.
        ratios: MagCache (2506.09045): of each step, the mean over samples and tokens of ``|R_t| / |R_t-1|``, the
            magnitudes of what all blocks add; 1 for the first step. Empty where blocks change the shape of a stream.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    polynomial: tuple[float, ...] = Field(max_length=DEGREE + 1)
    deviation: float
    pairs: int
    ratios: tuple[float, ...]

    def __str__(self) -> str:
        fit = " ".join(f"{c:.4g}" for c in self.polynomial) or "none"
        ratios = f"{min(self.ratios):.3g} to {max(self.ratios):.3g}" if self.ratios else "none"
        return (
            f"teacache polynomial {fit} (deviation {self.deviation:.2g} over {self.pairs} changes); "
            f"magcache ratios {ratios} over {len(self.ratios)} steps"
        )
