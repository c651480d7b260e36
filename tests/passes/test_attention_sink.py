"""Transposes behind norms and rotations: the same bits, and one CUDA kernel up to the quantised operand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.passes.attention.sink import SinkTransposes
from ditc.passes.capture import capture_export
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan
from ditc.passes.verify import graph_text

B, L, H, D = 2, 48, 4, 16
aten = torch.ops.aten
Zoo = Mapping[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], -1).flatten(3) * sin


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Only the later tokens are turned, as where text stands in front."""
    return torch.cat([x[:, :, :8], pairs(x[:, :, 8:], cos[..., 8:, :], sin[..., 8:, :])], 2)


class Site(nn.Module):
    """An attention whose heads come first: transposes, then norms, then rotations."""

    def __init__(self, rope: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.rope, self.shape = rope, shape
        self.q, self.k, self.v = (nn.Linear(H * D, H * D) for _ in range(3))
        self.weight = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (f(x).view(B, L, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        tables = cos.view(self.shape), sin.view(self.shape)
        q, k = (self.rope(F.rms_norm(t, (D,), self.weight, 1e-6), *tables) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sunk(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[Rewritten, Any, Any]:
    """The rewritten graph, its outputs, and those of the graph as it was."""
    capture = capture_export(model.eval(), args, kwargs or {})
    plan = Plan(fuse=False)
    with torch.no_grad():
        before = rewrite(capture, plan, ()).graph(*capture.examples)
        found = rewrite(capture, plan, (SinkTransposes(everywhere=True),))
        return found, found.graph(*capture.examples), before


@pytest.mark.parametrize("rope", [pairs, halves, part])
@pytest.mark.parametrize("shape", [(L, D), (1, L, D), (1, 1, L, D), (1, 1, L, D)])
def test_the_bits_stay(rope: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found, after, before = sunk(Site(rope, shape), (torch.randn(B, L, H * D), torch.randn(L, D), torch.randn(L, D)))
    assert found.reports[-1].rewrites == 2 and all(map(torch.equal, after, before))
    for node in found.graph.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        assert all(operand.target is aten.transpose.int for operand in node.args[:2])
    norms = found.graph.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert [tuple(norm.meta["val"].shape) for norm in norms] == [(B, L, H, D)] * 2
    again = rewrite(capture_of(found), Plan(fuse=False), (SinkTransposes(everywhere=True),))
    assert again.reports[-1].rewrites == 0 and graph_text(again.graph) == graph_text(found.graph)


def capture_of(found: Rewritten) -> Any:
    from ditc.passes.capture import Capture

    return Capture(found.graph, (), "export")


def mixes_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pairs(x, cos, sin) + x.mean(1, keepdim=True)


def per_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pairs(x, cos, sin) * torch.arange(1.0, H + 1).reshape(1, H, 1, 1)


def turned_again(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pairs(x, cos, sin).softmax(2)


@pytest.mark.parametrize(("rope", "turns"), [(mixes_heads, True), (per_head, True), (turned_again, False)])
def test_what_does_not_turn_stays_or_is_met(rope: Callable[..., Tensor], turns: bool) -> None:
    torch.manual_seed(0)
    found, after, before = sunk(Site(rope, (L, D)), (torch.randn(B, L, H * D), torch.randn(L, D), torch.randn(L, D)))
    assert bool(found.reports[-1].rewrites) == turns and all(map(torch.equal, after, before))


@pytest.mark.parametrize(("name", "count"), [("hunyuan_dit", 16), ("allegro", 6), ("cogvideox", 6), ("flux", 0)])
def test_models(name: str, count: int, zoo: Zoo) -> None:
    model, args, kwargs = zoo[name]()
    found, after, before = sunk(model, args, kwargs)
    assert found.reports[-1].rewrites == count
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_graphs_for_cpus_stay() -> None:
    capture = capture_export(
        Site(pairs, (L, D)).eval(), (torch.randn(B, L, H * D), torch.randn(L, D), torch.randn(L, D)), {}
    )
    assert rewrite(capture, Plan(fuse=False), (SinkTransposes(),)).reports[-1].rewrites == 0
