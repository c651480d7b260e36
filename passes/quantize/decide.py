"""What becomes of each linear: its format, whether its input is quantised too, and why.

Three things decide: the plan, the linear's role in the structure, and what the cost model expects of its shape on the
device. An error inside a block reaches the stream through a residual; one in the conditioning, an embedder or the head
reaches every token, so those keep their precision, unless the plan's table names them. The exception are modulations
with few rows: reading their weight is all their cost, and a weight alone in 8 bits loses next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from ditc.kernels.formats import FORMATS, format_of
from ditc.kernels.linear import supported

from ..plan import Plan
from ..rewrite import facts_of, size_hint
from ..structure import Role
from .calibration import Calibration, weight_name
from .cost import FEW_ROWS, CostError, CostTable, choose, estimate, expected_sqnr, options

TOKEN_PATH = frozenset(
    {
        *(Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.QKV_MLP, Role.GATE, Role.OUT, Role.OUT_MLP),
        *(Role.MLP_UP, Role.MLP_GATE, Role.MLP_GATE_UP, Role.MLP_DOWN),
        Role.TOKEN,
    }
)
"""Roles inside blocks whose linears are quantised unless the plan says otherwise."""

WEIGHT_ONLY = frozenset({Role.MODULATION})
"""Roles of which, for few rows, the weight alone may be quantised, to 8 bits, where that is faster."""

SMALLEST_WEIGHT = 2**18
"""Elements of a modulation's weight below which reading it is no cost: it stays in the caches."""

NOMINAL_ROWS = 1024
"""Rows by which ``auto`` decides where originals are released: what is packed once must serve every number of rows."""

SMALLEST_GAIN = 1.1
"""A linear outside the token path is touched only for at least so much expected speed."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Decision:
    """What becomes of one linear.

    Attributes:
        linear: name of its node.
        weight: names of the weights behind it.
        role: in the structure; ``none`` where it has none.
        M, N, K: rows, output and input features; of symbolic sizes those of the example.
        format: ``none`` where it stays as it is.
        activations: ``dynamic``, ``static``, or ``none`` for the weight alone.
        reason: why.
        sqnr: expected of its output in dB; measured where there is a calibration, else typical of Gaussian data.
        gain: expected speed against the linear as it is; ``None`` where no cost table covers the device.
    """

    linear: str
    weight: str
    role: str
    M: int
    N: int
    K: int
    format: str
    activations: Literal["dynamic", "static", "none"]
    reason: str
    sqnr: float | None = None
    gain: float | None = None

    def row(self) -> Mapping[str, Any]:
        """The fields, for a report."""
        return asdict(self)


@dataclass(frozen=True)
class Judge:
    """Decides linear by linear for one plan on one device."""

    plan: Plan
    device: torch.device
    calibration: Calibration | None = None
    table: CostTable | None = None

    def decide(self, node: fx.Node) -> tuple[Decision, str | None]:
        """The decision on a linear; and where it was to be quantised and cannot be, the reason."""
        x, weight = node.args[:2]
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        facts = facts_of(node)
        role = facts.role if facts is not None else None
        N, K = (size_hint(size) for size in weight.meta["val"].shape)
        M = size_hint(x.meta["val"].numel()) // max(K, 1)
        name = weight_name(weight) or ""
        kept = Decision(node.name, name, str(role or "none"), M, N, K, "none", "none", "")
        if role is None:
            return replace(kept, reason="the analysis found no role for it"), None
        wanted = self.plan.format_for(role)
        if wanted is None or wanted == "none":
            return replace(kept, reason="the plan leaves its role alone"), None
        explicit = self.plan.names(role)
        if not explicit and role not in TOKEN_PATH | WEIGHT_ONLY:
            return replace(kept, reason=f"{role}: its errors reach every token"), None
        impossible = _impossible(node, name)
        if impossible is None and wanted != "auto":
            impossible = supported(self.device, wanted, K, N)
        if role in WEIGHT_ONLY and not explicit:
            return self._vector(kept, wanted, impossible, x.meta["val"].dtype), None
        if impossible is not None:
            return replace(kept, reason=impossible), impossible
        if wanted == "auto":
            return self._fastest(kept, x.meta["val"].dtype), None
        return self._asked(kept, wanted, x.meta["val"].dtype, explicit), None

    def _asked(self, kept: Decision, format: str, dtype: torch.dtype, explicit: bool) -> Decision:
        activations = self.plan.activations
        gain, source = self._gain(kept, format, activations, dtype)
        reason = f"the plan asks for it{' by role' if explicit else ''}"
        if gain is not None and gain < 1:
            reason += f"; no gain in time is expected here ({source})"
        sqnr = self._sqnr(kept, format, activations)
        return replace(kept, format=format, activations=activations, reason=reason, sqnr=sqnr, gain=gain)

    def _fastest(self, kept: Decision, dtype: torch.dtype) -> Decision:
        formats = [name for name in FORMATS if supported(self.device, name, kept.K, kept.N) is None]
        rows = NOMINAL_ROWS if self.plan.free_originals else kept.M
        found = options(
            rows, kept.N, kept.K, self.device, dtype, formats,
            calibration=self.calibration, name=kept.weight, table=self.table,
        )  # fmt: skip
        if self.plan.activations == "none":
            found = [option for option in found if option.activations == "none"]
        choice = choose(found, self.plan.error_budget)
        option = choice.option
        if option.format == "none":
            return replace(kept, reason=choice.reason, gain=1.0)
        activations = option.activations
        static = self.plan.activations == "static" and activations == "dynamic" and format_of(option.format).block != 32
        return replace(
            kept, format=option.format, activations="static" if static else activations, reason=choice.reason,
            sqnr=option.sqnr, gain=option.estimate.gain,
        )  # fmt: skip

    def _vector(self, kept: Decision, wanted: str, impossible: str | None, dtype: torch.dtype) -> Decision:
        """A linear of the conditioning: its weight alone, in 8 bits, where few rows make that pay."""
        format = "fp8" if wanted in ("fp8", "mxfp8", "mxfp4", "nvfp4") else "int8"
        if self.plan.free_originals:
            return replace(kept, reason=f"{kept.role}: free_originals packs what serves every number of rows")
        impossible = impossible or supported(self.device, format, kept.K, kept.N)
        if impossible is not None:
            return replace(kept, reason=impossible)
        if kept.M > FEW_ROWS:
            return replace(kept, reason=f"{kept.role} with {kept.M} rows: its errors reach every token")
        if kept.N * kept.K < SMALLEST_WEIGHT:
            return replace(kept, reason=f"{kept.role}: its weight is too small for reading it to cost anything")
        gain, source = self._gain(kept, format, "none", dtype)
        if gain is None or gain < SMALLEST_GAIN:
            return replace(
                kept, reason=f"{kept.role}: {format} for the weight alone gains nothing ({source})", gain=1.0
            )
        reason = f"few rows: reading the weight is its cost ({source})"
        sqnr = self._sqnr(kept, format, "none")
        return replace(kept, format=format, reason=reason, sqnr=sqnr, gain=gain)

    def _gain(
        self, kept: Decision, format: str, activations: Literal["dynamic", "static", "none"], dtype: torch.dtype
    ) -> tuple[float | None, str]:
        try:
            found = estimate(
                max(kept.M, 1), kept.N, kept.K, self.device, format, activations, dtype, table=self.table
            )  # fmt: skip
        except CostError as error:
            return None, str(error)
        return found.gain, found.source

    def _sqnr(self, kept: Decision, format: str, activations: Literal["dynamic", "static", "none"]) -> float:
        measured_as: Literal["dynamic", "none"] = "none" if activations == "none" else "dynamic"
        return expected_sqnr(format, measured_as, self.calibration, kept.weight)


def _impossible(node: fx.Node, name: str) -> str | None:
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if not name:
        return "its weight depends on an input"
    for operand, what in ((x, "input"), (weight, "weight")):
        dtype = operand.meta["val"].dtype
        if dtype not in _FLOATS:
            return f"its {what} is {str(dtype).removeprefix('torch.')}; float32, bfloat16 or float16 is wanted"
    return None
