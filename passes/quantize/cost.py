"""Cost: how long a linear takes in each format on a device, and which format is the fastest that is good enough.

A table per device (``tables/*.json``) holds a roofline, and where the device was measured also points. The roofline
says how long one linear should take::

    launch + max(2 M N K / rate, bytes / bandwidth)        plus, for dynamic activations,
    quantise + bytes of the quantisation / bandwidth

and the points correct it: the estimate is the roofline times the ratio of measured to roofline at the points around
(M, N, K), so that it is exact at a point and keeps a sensible slope between and beyond them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ditc.kernels.formats import FORMATS, format_of

from .calibration import Calibration
from .tables import BYTES, Activations, CostError, CostTable, DeviceKind, load_table, table_for

__all__ = [
    "FEW_ROWS",
    "PLAIN",
    "TYPICAL_SQNR",
    "TYPICAL_WEIGHT_SQNR",
    "Activations",
    "Choice",
    "CostError",
    "CostTable",
    "DeviceKind",
    "Estimate",
    "Option",
    "choose",
    "estimate",
    "expected_sqnr",
    "load_table",
    "options",
    "roofline",
    "table_for",
]

PLAIN = "none"
"""The format of a linear that stays as it is."""

FEW_ROWS = 4
"""Up to so many rows a weight is read as it is stored, with the product in one loop; beyond, a weight-only linear
decodes its weight into memory first."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one linear in a format and as it is (``plain``); ``gain`` above 1 is faster."""

    seconds: float
    plain_seconds: float
    source: str

    @property
    def gain(self) -> float:
        """How many times faster than the plain linear."""
        return self.plain_seconds / self.seconds


def estimate(
    M: int,
    N: int,
    K: int,
    device: DeviceKind | torch.device | str,
    format: str,
    activations: Activations,
    dtype: torch.dtype,
    *,
    table: CostTable | None = None,
) -> Estimate:
    """How long a linear takes.

    Args:
        M, N, K: rows, output and input features.
        device: where it runs.
        format: of ``ditc.kernels.formats``, or ``none`` for the plain linear.
        activations: ``none`` for a weight-only linear; ``static`` takes the quantisation as part of what makes the
            input. Ignored for the plain linear.
        dtype: float32, bfloat16 or float16: of the input, the output and the plain weight.
        table: instead of the one that ships for the device (:func:`load_table`).

    Raises:
        CostError: no table is known for the device.
        ValueError: an unknown format or dtype, or an empty shape.
    """
    if min(M, N, K) < 1:
        raise ValueError(f"a linear of {M} x {N} x {K} costs nothing to estimate")
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise ValueError(f"the cost of {name} linears is not known; of {', '.join(BYTES)} it is")
    if format != PLAIN:
        format_of(format)
    kind = device if isinstance(device, DeviceKind) else DeviceKind.of(device)
    table = table or table_for(kind)
    name = table.dtype(name)
    plain = _seconds(table, M, N, K, PLAIN, "none", name)
    seconds = plain if format == PLAIN else _seconds(table, M, N, K, format, activations, name)
    return Estimate(seconds, plain, _source(table, kind, format))


def _source(table: CostTable, kind: DeviceKind, format: str) -> str:
    text = table.source.text
    if not re.search(table.name, kind.name):
        text += f" (of {table.source.hardware}, taken for {kind.name})"
    if format != PLAIN and format not in table.rates:
        text += f"; no arithmetic in {format} here: storage only"
    return text


# --- the choice -----------------------------------------------------------------------------------------------------

TYPICAL_SQNR: Mapping[str, float] = {"int8": 39.0, "fp8": 28.6, "mxfp8": 28.6, "mxfp4": 15.8, "nvfp4": 17.4}
"""dB of a linear's output on Gaussian data with K = 1152, both operands quantised, scales dynamic. Only int8 depends on
K (40 dB at 256, 38 at 4608): its one scale per row follows the largest value."""

TYPICAL_WEIGHT_SQNR: Mapping[str, float] = {"int8": 42.0, "fp8": 31.6, "mxfp8": 31.6, "mxfp4": 18.8, "nvfp4": 20.5}
"""The same with the weight alone quantised: 3 dB more, one of two equal errors being gone."""


@dataclass(frozen=True)
class Option:
    """One way to run a linear: its cost, and the SQNR in dB to be expected of its output (``inf`` for plain)."""

    format: str
    activations: Literal["dynamic", "none"]
    estimate: Estimate
    sqnr: float

    def __str__(self) -> str:
        return self.format + (" weight-only" if self.format != PLAIN and self.activations == "none" else "")


@dataclass(frozen=True)
class Choice:
    """What was chosen, why, and why each of the others was not."""

    option: Option
    reason: str
    rejected: tuple[tuple[Option, str], ...]


def options(
    M: int,
    N: int,
    K: int,
    device: DeviceKind | torch.device | str,
    dtype: torch.dtype,
    formats: Sequence[str],
    *,
    calibration: Calibration | None = None,
    name: str | None = None,
    table: CostTable | None = None,
) -> list[Option]:
    """The plain linear, and each format that fits K with dynamic activations and weight-only.

    Args:
        M, N, K, device, dtype, table: as for :func:`estimate`.
        formats: to be looked at.
        calibration, name: what was observed, and the name of the linear's weight: a linear that is in it gets its
            own SQNR, others the typical one.
    """
    kind = device if isinstance(device, DeviceKind) else DeviceKind.of(device)
    plain = estimate(M, N, K, kind, PLAIN, "none", dtype, table=table)
    found = [Option(PLAIN, "none", plain, math.inf)]
    for format in formats:
        if format_of(format).unsupported(K) is not None:
            continue
        for activations in _QUANTISED:
            sqnr = expected_sqnr(format, activations, calibration, name)
            found.append(
                Option(format, activations, estimate(M, N, K, kind, format, activations, dtype, table=table), sqnr)
            )
    return found


_QUANTISED: tuple[Literal["dynamic", "none"], ...] = ("dynamic", "none")


def expected_sqnr(
    format: str,
    activations: Literal["dynamic", "none"],
    calibration: Calibration | None = None,
    name: str | None = None,
) -> float:
    """The calibrated SQNR in dB where there is one, else the typical one of Gaussian data."""
    if calibration is not None and name is not None and name in calibration:
        measured = calibration.sqnr(name, format, activations)
        if measured is not None:
            return measured
    return (TYPICAL_SQNR if activations == "dynamic" else TYPICAL_WEIGHT_SQNR)[format_of(format).name]


def choose(candidates: Sequence[Option], error_budget_db: float) -> Choice:
    """The fastest option whose expected SQNR is at least the budget; of equally fast ones the most exact.

    Raises:
        ValueError: no candidate meets the budget (the plain linear always does).
    """
    good = [option for option in candidates if option.sqnr >= error_budget_db]
    if not good:
        best = max((option.sqnr for option in candidates), default=-math.inf)
        raise ValueError(f"no candidate reaches {error_budget_db:g} dB; the best has {best:.1f} dB")
    chosen = min(good, key=lambda option: (option.estimate.seconds, -option.sqnr))
    rejected = tuple((o, _why_not(o, chosen, error_budget_db)) for o in candidates if o is not chosen)
    gain = chosen.estimate.gain
    if chosen.format == PLAIN:
        reason = "; ".join(why for _, why in rejected) or "nothing else to choose from"
    else:
        reason = f"{gain:.2f} x as fast, {chosen.sqnr:.1f} dB for at least {error_budget_db:g}"
    return Choice(chosen, f"{chosen}: {reason} ({chosen.estimate.source})", rejected)


def _why_not(option: Option, chosen: Option, budget: float) -> str:
    if option.sqnr < budget:
        return f"{option}: {option.sqnr:.1f} dB, less than {budget:g}"
    return f"{option}: {option.estimate.seconds / chosen.estimate.seconds:.2f} x the time of {chosen}"


# --- the model ------------------------------------------------------------------------------------------------------


def roofline(table: CostTable, M: int, N: int, K: int, format: str, activations: Activations, dtype: str) -> float:
    """Seconds of one linear by rates and bytes alone; ``dtype`` is one that the table has a rate of."""
    width = BYTES[dtype]
    rate = table.rates[dtype]
    stored: float = width if format == PLAIN else FORMATS[format].bits / 8
    own = table.rates.get(format) if format != PLAIN else None
    moved: float = M * N * width
    extra = 0.0
    if format == PLAIN or activations == "none":
        moved += M * K * width
        if format != PLAIN and (M > FEW_ROWS or own is None):
            extra = N * K * (stored + width) / table.bandwidth
    elif own is None:
        # quantised and decoded again, operand by operand
        moved += M * K * width
        extra = 2 * table.launch + (2 * M * K + N * K) * (stored + width) / table.bandwidth
    else:
        rate = own
        moved += M * K * stored
        extra = M * K * stored / table.bandwidth
        if activations == "dynamic":
            extra += table.launch + table.quantize.get(format, 0.0) + M * K * width / table.bandwidth
    moved += N * K * stored
    return table.launch + max(2 * M * N * K / rate, moved / table.bandwidth) + extra


def _seconds(table: CostTable, M: int, N: int, K: int, format: str, activations: Activations, dtype: str) -> float:
    return roofline(table, M, N, K, format, activations, dtype) * math.exp(
        _correction(table, M, N, K, format, activations, dtype)
    )


def _correction(table: CostTable, M: int, N: int, K: int, format: str, activations: Activations, dtype: str) -> float:
    """Logarithm of measured by roofline around a shape: the points' mean, weighted by distance in doublings."""
    # a static scale leaves the same GEMM
    measured_as = "dynamic" if activations == "static" else activations
    series = [p for p in table.points if p.format == format and p.activations == measured_as]
    if format != PLAIN and activations == "none":
        # few rows run other code than many
        series = [p for p in series if (p.M <= FEW_ROWS) == (M <= FEW_ROWS)]
    points = [p for p in series if p.dtype == dtype]
    if not points and format != PLAIN:
        # another dtype multiplies the same integers; what was never measured strays as the plain linear does
        points = series or [p for p in table.points if p.format == PLAIN and p.dtype == dtype]
    total = weights = 0.0
    for point in points:
        modelled = roofline(table, point.M, point.N, point.K, point.format, point.activations, point.dtype)
        ratio = math.log(point.seconds / modelled)
        distance = sum(math.log2(a / b) ** 2 for a, b in ((M, point.M), (N, point.N), (K, point.K)))
        if distance == 0:
            return ratio
        weight = distance**-2
        total, weights = total + weight * ratio, weights + weight
    return total / weights if weights else 0.0
