"""What becomes of each attention: its recipe, which keys it skips, and why.

The plan says what is wanted of each kind of site, the device which recipe that is, the cost model and the calibration
what is to be expected of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx

from ditc.kernels.attention import MAX_HEAD, RECIPES, attention_reason
from ditc.kernels.attention.cuda import implementation
from ditc.kernels.hardware import ADA

from ..plan import Plan
from ..quantize.calibration import Calibration
from ..quantize.tables import CPU_INT8, NATIVE, CostError, CostTable, DeviceKind
from ..rewrite import aten, size_hint
from ..structure import AttentionSite, Structure
from .cost import TYPICAL_SQNR, Size, estimate
from .recognise import UNPROVEN

SMALLEST_GAIN = 1.1
"""``auto`` leaves an attention as it is for less expected speed than this."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Decision:
    """What becomes of one attention.

    Attributes:
        site: its name in the structure.
        node: the node that makes its output.
        kind, axis, mask: as in :class:`AttentionSite`.
        batch, heads, kv_heads, q_len, kv_len, head_dim: sizes; of symbolic ones those of the example.
        recipe: ``native`` where it stays as it is, ``int8`` for the CPU's op, else one of the kernels' ``RECIPES``.
        sparse: the threshold below which blocks of keys are skipped; 0 where none are.
        window: positions to each side that are looked at; 0 for all.
        reason: why.
        sqnr: expected of its output in dB, skipped keys aside: measured where there is a calibration, else typical of
            Gaussian data.
        gain: expected speed against the attention as it is; ``None`` where no cost table covers it.
    """

    site: str
    node: str
    kind: str
    axis: str
    mask: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    recipe: str
    sparse: float
    window: int
    reason: str
    sqnr: float | None = None
    gain: float | None = None

    def row(self) -> Mapping[str, Any]:
        """The fields, for a report."""
        return asdict(self)


@dataclass(frozen=True)
class Judge:
    """Decides site by site for one plan on one device."""

    plan: Plan
    kind: DeviceKind
    structure: Structure
    calibration: Calibration | None = None
    table: CostTable | None = None

    def decide(self, site: AttentionSite, node: fx.Node) -> tuple[Decision, list[str]]:
        """The decision on a site; and what was asked for and cannot be, as reasons.

        Args:
            site: as analysed.
            node: that makes its output now: the analysis' own, or the call that took its place.
        """
        kept = Decision(
            site.name, site.node, site.kind, site.axis, site.mask or "none", site.batch, site.heads, site.kv_heads,
            site.q_len, site.kv_len, site.head_dim, NATIVE, 0.0, 0, "",
        )  # fmt: skip
        wanted = self.plan.attention_for(site.kind)
        if wanted == "native":
            return replace(kept, reason="the plan leaves its kind alone", gain=1.0), []
        impossible = unfit(site, node)
        if impossible is not None:
            return replace(kept, reason=impossible, gain=1.0), [impossible]
        window, no_window = self._window(site, node)
        asked = replace(kept, sparse=self.plan.sparse_for(site.kind), window=window)
        if wanted == "auto":
            chosen = self._fastest(asked, node)
            reasons = [no_window] if no_window and chosen.recipe != NATIVE else []
        else:
            recipe = self._recipe(wanted)
            impossible = self._unsupported(recipe, node)
            if impossible is not None:
                return replace(kept, reason=impossible, gain=1.0), [impossible]
            chosen, reasons = self._asked(asked, recipe, node), [no_window] if no_window else []
        return replace(chosen, reason="; ".join((chosen.reason, *reasons))), reasons

    def _asked(self, asked: Decision, recipe: str, node: fx.Node) -> Decision:
        gain, source = self._gain(asked, recipe, node)
        reason = "the plan asks for it"
        if self._emulated(recipe):
            reason += "; computed by its reference here: for its numbers, not for speed"
            gain = None
        elif gain is not None and gain < 1:
            reason += f"; no gain in time is expected here ({source})"
        return replace(asked, recipe=recipe, reason=reason, sqnr=self._sqnr(asked, recipe), gain=gain)

    def _fastest(self, asked: Decision, node: fx.Node) -> Decision:
        """The fastest recipe that keeps the error budget, or the attention as it is."""
        budget = self.plan.error_budget
        kept = replace(asked, recipe=NATIVE, sparse=0.0, window=0, gain=1.0)
        good, bad = list[Decision](), list[str]()
        for recipe in (CPU_INT8,) if self.kind.type == "cpu" else tuple(RECIPES):
            impossible = self._unsupported(recipe, node)
            if impossible is None and self._emulated(recipe):
                impossible = "only its reference runs here"
            sqnr = self._sqnr(asked, recipe)
            if impossible is None and sqnr < budget:
                impossible = f"{sqnr:.1f} dB, less than {budget:g}"
            gain, source = (None, "") if impossible is not None else self._gain(asked, recipe, node)
            if gain is None:
                bad.append(f"{recipe}: {impossible or source}")
            elif gain < SMALLEST_GAIN:
                bad.append(f"{recipe}: {gain:.2f} x as fast ({source})")
            else:
                reason = f"{gain:.2f} x as fast, {sqnr:.1f} dB for at least {budget:g} ({source})"
                good.append(replace(asked, recipe=recipe, reason=reason, sqnr=sqnr, gain=gain))
        if not good:
            return replace(kept, reason="; ".join(bad))
        # of equally fast ones the most exact
        return max(good, key=lambda option: (option.gain, option.sqnr))

    def _recipe(self, wanted: str) -> str:
        """What a choice of the plan means on this device."""
        if wanted != "int8":
            return wanted
        if self.kind.type == "cpu":
            return CPU_INT8
        # FP8 products are twice as fast as FP16's from sm_89 on; before, they would be decoded
        return "int8_fp8" if self.kind.capability is not None and self.kind.capability >= ADA else "int8_fp16"

    def _emulated(self, recipe: str) -> bool:
        """Whether only the reference in plain torch computes a recipe here."""
        if recipe == CPU_INT8:
            return False
        return self.kind.capability is None or implementation(recipe, self.kind.capability) == "reference"

    def _unsupported(self, recipe: str, node: fx.Node) -> str | None:
        """Why a recipe cannot run here, or not on these operands."""
        if self.kind.type not in ("cpu", "cuda"):
            return f"there is no kernel for {self.kind.type}"
        if recipe != CPU_INT8:
            return None
        D = _operands(node)[0].shape[-1]
        return attention_reason() or (f"heads of {D} features, the kernel takes {MAX_HEAD}" if D > MAX_HEAD else None)

    def _gain(self, asked: Decision, recipe: str, node: fx.Node) -> tuple[float | None, str]:
        size = Size(asked.batch, asked.heads, asked.kv_heads, asked.q_len, asked.kv_len, asked.head_dim)
        causal = bool(node.args[5])
        windowed = min(1.0, (2 * asked.window + 1) / asked.kv_len) if asked.window else 1.0
        try:
            found = estimate(
                size, self.kind, recipe, _operands(node)[0].dtype,
                seen=0.5 if causal else 1.0, kept=windowed, table=self.table,
            )  # fmt: skip
        except CostError as error:
            return None, str(error)
        return found.gain, found.source

    def _sqnr(self, asked: Decision, recipe: str) -> float:
        measured = self.calibration.attention_sqnr(asked.site, recipe) if self.calibration is not None else None
        return TYPICAL_SQNR[recipe] if measured is None else measured

    def _window(self, site: AttentionSite, node: fx.Node) -> tuple[int, str | None]:
        """The window of a site; and where it was asked for and cannot be, the reason."""
        wanted = self.plan.window_for(site.kind)
        if not wanted:
            return 0, None
        if site.kind != "self":
            return 0, f"no window: queries and keys of {site.kind} attention are not positions along one axis"
        q, k, _ = _operands(node)
        if str(q.shape[-2]) != str(k.shape[-2]):
            return 0, "no window: there are more keys than queries, or fewer"
        for axis in self.structure.tokens:
            names = [sub.name for sub in axis.sub_axes]
            whole = site.axis == "full" and len(names) == 1
            if axis.name not in site.query_tokens or not (whole or site.axis in names):
                continue
            along = axis.sub_axes[0 if whole else names.index(site.axis)]
            if along.size != site.q_len:
                return 0, f"no window: {site.q_len} tokens are not the {along.size} positions of {along.name}"
            return wanted, None
        return 0, f"no window: it runs over {site.axis} tokens, not along one axis of a grid"


def _operands(node: fx.Node) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (arg.meta["val"] for arg in node.args[:3] if isinstance(arg, fx.Node))
    return q, k, v


def unfit(site: AttentionSite, node: fx.Node) -> str | None:
    """Why no recipe fits the attention that ``node`` computes; ``None`` where one may."""
    if site.written == "linear":
        return "linear attention has no softmax"
    if UNPROVEN in node.meta:
        return f"written out, and not proven to be one attention: {node.meta[UNPROVEN]}"
    if node.target is not aten.scaled_dot_product_attention.default:
        return f"{node.target} is not taken apart"
    if node.args[4]:
        return "it has dropout"
    scale = node.kwargs.get("scale")
    if scale is not None and not isinstance(scale, (int, float)):
        return "its scale is computed by the graph"
    q, k, v = _operands(node)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _FLOATS:
        return f"operands are {', '.join(str(x.dtype).removeprefix('torch.') for x in (q, k, v))}"
    if not q.dim() == k.dim() == v.dim() or q.dim() < 3:
        return "operands have no batch and tokens, or different ranks"
    mask = node.args[3]
    if q.dim() > 4 and isinstance(mask, fx.Node) and mask.meta["val"].dim() > 2:
        return f"operands have {q.dim()} dimensions, and a mask of {mask.meta['val'].dim()}"
    if list(map(str, k.shape)) != list(map(str, v.shape)):
        return "keys and values differ in shape"
    if not isinstance(q.shape[-1], int) or q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        return "queries and keys have no common number of features"
    grouped = bool(node.kwargs.get("enable_gqa"))
    lead = slice(0, -3 if grouped else -2)
    if list(map(str, q.shape[lead])) != list(map(str, k.shape[lead])):
        return "queries and keys differ in batch or heads"
    if size_hint(k.shape[-2]) == 0:
        return "there are no keys"
    return None
