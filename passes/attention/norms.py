"""Proof that calls are a norm over the features of a head, by running them on numbers.

Whatever is computed of multiplications, powers, roots and means is analytic. Two such functions that agree on random
tensors agree on all of them, but for a set of random tensors that has no volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ditc.kernels.quantize.op import normalized

from ..rewrite import aten
from .chain import Chain, Facts, Heads, norm_chains, uncast

_EXACT = 1e-9
"""Of float64, after a few operations on numbers of order one."""


@dataclass(frozen=True)
class Norm:
    """``norm(source) * weight + bias`` over the features; ``kind`` as in the kernels, ``heads`` of the source."""

    kind: str
    eps: float
    source: fx.Node
    heads: Heads
    weight: fx.Node | None
    bias: fx.Node | None


def prove_norm(end: fx.Node, heads: Heads, facts: Facts) -> Norm | None:
    """The norm that ``end``, ``[B, H, L, D]`` or ``[B, L, H, D]``, is of something; ``None`` where it is none."""
    if heads is None:
        return None
    found = None
    for chain in norm_chains(end, heads, facts):
        # the longest says most: behind the mean's subtraction a layer norm is an RMS norm
        found = _proven(chain) or found
    return found


def _proven(chain: Chain) -> Norm | None:
    (source,) = chain.sources
    D = chain.end.meta["val"].shape[-1]
    vectors = [node.meta["val"] for node in chain.outside]
    if any(v.numel() != D or v.shape[-1] != D or v.is_complex() for v in vectors):
        return None
    generator = torch.Generator().manual_seed(0)
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    # rows so small that what is added to the variance shows
    x = torch.randn(1, 4, 5, D, generator=generator, **exact)
    x = x * torch.tensor([1.0, 1e-2, 1e-3, 1e-4, 3.0], **exact).reshape(5, 1)
    own = [torch.randn(v.shape, generator=generator, **exact) for v in vectors]
    y = chain([x], own)
    if chain.heads[source] != chain.heads[chain.end]:
        y = y.transpose(1, 2)
    if y.shape != x.shape or not y.isfinite().all():
        return None
    for kind, eps in _candidates(chain):
        n = normalized(x, kind, eps, None, None)
        rest = [None, *chain.outside]
        for weight, w in zip(rest, [torch.ones(D, **exact), *own], strict=True):
            for bias, b in zip(rest, [torch.zeros(D, **exact), *own], strict=True):
                if _close(n * w.reshape(D) + b.reshape(D), y):
                    return Norm(kind, eps, uncast(source), chain.heads[source], weight, bias)
    return None


def _close(actual: Tensor, expected: Tensor) -> bool:
    return bool(((actual - expected).abs() <= _EXACT * (1 + expected.abs())).all())


def _candidates(chain: Chain) -> Iterator[tuple[str, float]]:
    """Norms with any of the constants that are added or passed on the way."""
    constants = {0.0: None, **dict.fromkeys(_constants(chain.calls))}
    for kind in ("rms", "layer"):
        for eps in constants:
            yield kind, eps


def _constants(calls: Sequence[fx.Node]) -> Iterator[float]:
    for call in calls:
        if call.target is aten.rms_norm.default and (len(call.args) < 4 or call.args[3] is None):
            yield torch.finfo(call.meta["val"].dtype).eps
        elif call.target is aten.layer_norm.default:
            eps = call.args[4] if len(call.args) > 4 else 1e-5
            yield float(eps)  # type: ignore[arg-type]
        else:
            yield from (float(arg) for arg in call.args if isinstance(arg, (int, float)) and not isinstance(arg, bool))
