"""Attention by hand: what is proven to be one call, with which numbers, and what is not and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditc.passes.attention.recognise import RecogniseAttention
from ditc.passes.base import PassContext, PassReport
from ditc.passes.capture import capture_export
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan
from ditc.passes.rewrite import aten, calls
from ditc.passes.structure import analyse
from ditc.passes.verify import graph_text

B, H, L, D = 2, 3, 12, 8
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
CAUSAL = torch.ones(L, L).tril().bool()
PADDED = (torch.arange(L) < torch.tensor([[L], [7]]))[:, None, None]
BIAS = torch.randn(H, L, L, generator=torch.Generator().manual_seed(0))


class ByHand(nn.Module):
    """Three projections ``[B, H, L, D]`` and what a function makes of them."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * D, H * D) for _ in range(3))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        operands = (layer(x).unflatten(-1, (H, D)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.run(*operands)


def recognised(run: Run, dtype: torch.dtype = torch.float32) -> tuple[Rewritten, PassReport, float]:
    """The graph, what the pass says, and how far the output is from the original's."""
    torch.manual_seed(0)
    model, x = ByHand(run).eval().to(dtype), torch.randn(B, L, H * D).to(dtype)
    capture = capture_export(model, (x,))
    with torch.no_grad():
        want = model(x)
        done = rewrite(capture, Plan(), (RecogniseAttention(everywhere=True),))
        (got,) = done.graph(*capture.examples)
    assert got.shape == want.shape and got.dtype == want.dtype
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return done, done.reports[1], error


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def _merged(x: Tensor) -> Tensor:
    return x.reshape(B * H, L, D)


PROVEN: dict[str, Run] = {
    "plain": lambda q, k, v: _scores(q, k).softmax(-1) @ v,
    "scaled": lambda q, k, v: (_scores(q, k) * D**-0.5).softmax(-1) @ v,
    "divided": lambda q, k, v: (_scores(q, k) / math.sqrt(D)).softmax(dim=-1) @ v,
    "query scaled": lambda q, k, v: _scores(q * D**-0.5, k).softmax(-1) @ v,
    "key permuted": lambda q, k, v: ((q @ k.permute(0, 1, 3, 2)) / 3).softmax(-1) @ v,
    "in float32": lambda q, k, v: (_scores(q, k).float() * 0.3).softmax(-1).to(q.dtype) @ v,
    "softmax in float32": lambda q, k, v: torch.softmax(_scores(q, k), -1, dtype=torch.float32).to(q.dtype) @ v,
    "bias": lambda q, k, v: (_scores(q, k) * 0.3 + BIAS).softmax(-1) @ v,
    "bias in front": lambda q, k, v: (BIAS + _scores(q, k) * 0.3).softmax(-1) @ v,
    "bias, then scaled": lambda q, k, v: ((_scores(q, k) + BIAS) * 0.3).softmax(-1) @ v,
    "a bias of data": lambda q, k, v: (_scores(q, k) * 0.3 + q.sum(-1, keepdim=True)).softmax(-1) @ v,
    "two products": lambda q, k, v: (_scores(q, k) + _scores(q, v)).softmax(-1) @ v,
    "masked_fill": lambda q, k, v: _scores(q, k).masked_fill(~CAUSAL, -math.inf).softmax(-1) @ v,
    "masked, then scaled": lambda q, k, v: (_scores(q, k).masked_fill(~PADDED, -1e9) * 0.3).softmax(-1) @ v,
    "where": lambda q, k, v: torch.where(PADDED, _scores(q, k), -1e9).softmax(-1) @ v,
    "where hides": lambda q, k, v: torch.where(~PADDED, -math.inf, _scores(q, k)).softmax(-1) @ v,
    "where with a tensor": lambda q, k, v: torch.where(CAUSAL, _scores(q, k), torch.full((), -1e30)).softmax(-1) @ v,
    "two masks": lambda q, k, v: (
        (_scores(q, k) * 0.3 + BIAS).masked_fill(~CAUSAL, -math.inf).masked_fill(~PADDED, -1e9).softmax(-1) @ v
    ),
    "additive mask": lambda q, k, v: (_scores(q, k) + (~PADDED).to(q.dtype) * torch.finfo(q.dtype).min).softmax(-1) @ v,
    "no heads": lambda q, k, v: _scores(q[:, 0], k[:, 0]).softmax(-1) @ v[:, 0],
    "bmm": lambda q, k, v: torch.bmm(
        torch.bmm(_merged(q), _merged(k).transpose(1, 2)).mul(0.3).softmax(-1), _merged(v)
    ).view(B, H, L, D),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(BIAS.repeat(B, 1, 1), _merged(q), _merged(k).transpose(1, 2), alpha=0.3).softmax(-1), _merged(v)
    ),
    "baddbmm without": lambda q, k, v: torch.bmm(
        torch.baddbmm(BIAS[:1], _merged(q), _merged(k).transpose(1, 2), beta=0, alpha=0.3).softmax(-1), _merged(v)
    ),
    "masked with heads apart": lambda q, k, v: torch.bmm(
        (
            (torch.bmm(_merged(q), _merged(k).transpose(1, 2)).view(B, H, L, L) * 0.3)
            .masked_fill(~PADDED, -math.inf)
            .view(B * H, L, L)
            .softmax(-1)
        ),
        _merged(v),
    ),
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1), v
    ),
    "einsum, heads last": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        (torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)) * 0.3 + BIAS).softmax(-1),
        v.transpose(1, 2),
    ),
    "einsum of keys first": lambda q, k, v: torch.einsum("bhjd,bhid->bhij", k, q).softmax(-1) @ v,
    "keys of one head": lambda q, k, v: _scores(q, k[:, :1]).softmax(-1) @ v[:, :1],
}


@pytest.mark.parametrize("name", PROVEN)
def test_is_proven_with_the_same_numbers(name: str) -> None:
    done, report, error = recognised(PROVEN[name])
    assert report.rewrites == 1, report.skipped
    assert len(calls(done.graph, aten.scaled_dot_product_attention.default)) == 1
    assert not calls(done.graph, aten.softmax.int)
    assert error < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["scaled", "in float32", "softmax in float32", "masked_fill", "additive mask"])
def test_in_half_precision(name: str, dtype: torch.dtype) -> None:
    _, report, error = recognised(PROVEN[name], dtype)
    assert report.rewrites == 1 and error < 2e-2


UNPROVEN: dict[str, Run] = {
    "its softmax does not run over the keys": lambda q, k, v: _scores(q, k).softmax(-2) @ v,
    "its scores are changed by aten.tanh": lambda q, k, v: _scores(q, k).tanh().softmax(-1) @ v,
    "its scores are changed by aten.clamp": lambda q, k, v: _scores(q, k).clamp(-3, 3).softmax(-1) @ v,
    "its scores are scaled by -1.0": lambda q, k, v: (_scores(q, k) * -1.0).softmax(-1) @ v,
    "its scores are scaled by a tensor": lambda q, k, v: (_scores(q, k) * q.mean()).softmax(-1) @ v,
    "fills in -3.0, which hides no key": lambda q, k, v: _scores(q, k).masked_fill(~CAUSAL, -3.0).softmax(-1) @ v,
    "fills in 0.0, which hides no key": lambda q, k, v: torch.where(CAUSAL, _scores(q, k), 0.0).softmax(-1) @ v,
    "its softmax weights are changed by aten.mul": lambda q, k, v: (_scores(q, k).softmax(-1) * BIAS) @ v,
    "its softmax weights are changed by aten.masked_fill": lambda q, k, v: (
        _scores(q, k).softmax(-1).masked_fill(~CAUSAL, 0.0) @ v
    ),
    "its softmax weights are read elsewhere too": lambda q, k, v: (
        (w := _scores(q, k).softmax(-1)) @ v + w.sum(-1, keepdim=True)
    ),
    "its scores are read elsewhere too": lambda q, k, v: (
        (s := _scores(q, k)).softmax(-1) @ v + s.amax(-1, keepdim=True)
    ),
}


@pytest.mark.parametrize("reason", UNPROVEN)
def test_says_why_it_is_not_proven(reason: str) -> None:
    _, report, error = recognised(UNPROVEN[reason])
    assert report.rewrites == 0 and error == 0.0
    assert [reason in skip.reason for skip in report.skipped] == [True]


def test_a_second_time_nothing_happens() -> None:
    done, _, _ = recognised(PROVEN["two masks"])
    before = graph_text(done.graph)
    context = PassContext(Plan(attention="fp8"), torch.device("cpu"), analyse(done.graph))
    assert RecogniseAttention(everywhere=True)(done.graph, context).rewrites == 0
    assert graph_text(done.graph) == before


def test_only_kinds_that_change_are_touched(zoo: Any) -> None:
    model, args, kwargs = zoo["explicit_dit"]()
    for attention, rewrites in (({"cross": "fp8"}, 0), ({"self": "fp8"}, 3)):
        reports = rewrite(capture_export(model, args, kwargs), Plan(attention=attention)).reports
        assert next(r for r in reports if r.name == RecogniseAttention.name).rewrites == rewrites


def test_symbolic_sizes_stay_symbolic() -> None:
    torch.manual_seed(0)
    model = ByHand(lambda q, k, v: (_scores(q, k) * 0.3).softmax(-1) @ v).eval()
    x = torch.randn(B, L, H * D)
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    done = rewrite(capture_export(model, (x,), dynamic_shapes=shapes), Plan(), (RecogniseAttention(everywhere=True),))
    assert done.reports[1].rewrites == 1
    (node,) = calls(done.graph, aten.scaled_dot_product_attention.default)
    assert [isinstance(size, torch.SymInt) for size in node.meta["val"].shape] == [True, False, True, False]
