"""Norms and rotations in front of NVFP4 attention: found however they are written, and nothing else taken for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ditc.passes.attention.recognise import RecogniseAttention
from ditc.passes.attention.use import UseAttention
from ditc.passes.capture import Capture, capture_dynamo, capture_export
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan
from ditc.passes.quantize.tables import DeviceKind

B, L, T, H, D = 2, 24, 8, 4, 16
B200 = DeviceKind("cuda", "NVIDIA B200", (10, 0))
OPS = torch.ops.ditc
Zoo = Mapping[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]
Rope = Callable[[Tensor, Tensor, Tensor], Tensor]


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x[..., : D // 2], x[..., D // 2 :]
    return x * cos + torch.cat([-right, left], -1) * sin


def complex_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    table = torch.complex(cos[..., : D // 2].double(), sin[..., : D // 2].double())
    y = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * table)
    return y.flatten(3).to(x.dtype)


def into_memory(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty_like(x)
    cos, sin = cos[..., 0::2].double(), sin[..., 1::2]
    y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    y[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return y


def matrices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    table = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))[..., : D // 2, :, :]
    return (table * x.unflatten(-1, (-1, 1, 2))).sum(-1).flatten(3)


def later(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Text stands in front, and stays."""
    return torch.cat([x[:, :, :T], pairs(x[:, :, T:], cos[..., T:, :], sin[..., T:, :])], 2)


def some(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half of the features are rotated, by their halves."""
    a, b, rest = x[..., : D // 4], x[..., D // 4 : D // 2], x[..., D // 2 :]
    turned = torch.cat([-b, a], -1) * sin[..., : D // 2]
    return torch.cat([torch.cat([a, b], -1) * cos[..., : D // 2] + turned, rest], -1)


def axes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Two axes, each by the halves of its features."""
    made = []
    for part, c, s in zip(x.chunk(2, -1), cos.chunk(2, -1), sin.chunk(2, -1), strict=True):
        left, right = part.chunk(2, -1)
        made.append(part * c + torch.cat([-right, left], -1) * s)
    return torch.cat(made, -1)


def each_sample(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pairs(x, torch.stack([cos, 2 * cos]).unsqueeze(1), torch.stack([sin, -sin]).unsqueeze(1))


def each_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pairs(x, cos * torch.arange(1.0, H + 1).reshape(H, 1, 1), sin)


def none(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), weight, 1e-6)


def by_hand(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-4)
    return wide.to(x.dtype) * (1 + weight)


def divided(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x * x).mean(-1, keepdim=True).add(1e-5).sqrt()


def layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), weight, weight, 1e-3)


def layer_by_hand(x: Tensor, weight: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x * ((x**2).mean(-1, keepdim=True) + 1e-6) ** -0.5 * weight + weight


class Site(nn.Module):
    """Projections, perhaps of text too, norm, rotation, attention."""

    def __init__(self, norm: Callable[..., Tensor] | None, rope: Rope, text: bool = False, tokens_first: bool = False):
        super().__init__()
        self.norm, self.rope, self.text, self.tokens_first = norm, rope, text, tokens_first
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.other = nn.ModuleList(nn.Linear(H * D, H * D) for _ in range(3))
        self.weight = nn.Parameter(torch.rand(2, D))

    def forward(self, x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        made = []
        for i, part in enumerate(self.qkv(x).chunk(3, -1)):
            pieces = [part, *([self.other[i](text)] if self.text else [])]
            pieces = [piece.view(B, -1, H, D) for piece in pieces]
            if not self.tokens_first:
                pieces = [piece.transpose(1, 2) for piece in pieces]
            if i < 2 and self.norm is not None:
                pieces = [self.norm(piece, self.weight[j]) for j, piece in enumerate(pieces)]
            y = torch.cat(pieces[::-1], 1 if self.tokens_first else 2) if self.text else pieces[0]
            if i < 2:
                y = self.rope(y, *(t.unsqueeze(1) if self.tokens_first else t for t in (cos, sin)))
            made.append(y.transpose(1, 2) if self.tokens_first else y)
        return F.scaled_dot_product_attention(*made).transpose(1, 2).flatten(2)


def inputs(text: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, L, H * D), (B, T, H * D), *[(L + T * text, D)] * 2]
    return tuple(torch.randn(size, generator=generator) for size in sizes)


def compared(model: nn.Module, given: tuple[Tensor, ...]) -> tuple[Rewritten, float]:
    """The graph for a B200, and how far its result is from that of smoothing and quantising what the graph makes."""
    plan, results = Plan(attention="nvfp4"), []
    for kind in (DeviceKind("cpu", "", None), B200):
        capture = capture_export(model.eval(), given)
        done = rewrite(capture, plan, (RecogniseAttention(), UseAttention(kind=kind)))
        with torch.no_grad():
            results.append(done.graph(*capture.examples)[0].double())
    expected, actual = results
    return done, float((actual - expected).norm() / expected.norm())


def told(done: Rewritten) -> set[str]:
    return {line for line in done.reports[-1].details if line.startswith("nvfp4 ")}


def calls(done: Rewritten) -> list[fx.Node]:
    return [n for op in (OPS.smooth_queries, OPS.smooth_keys) for n in done.graph.graph.find_nodes(
        op="call_function", target=op.default)]  # fmt: skip


NEAR = 1e-2
"""Where rounding differs, few codes do: the next ones of NVFP4 are half of a value away."""
ROPES: dict[Rope, int] = {
    pairs: 1, halves: D // 2, complex_: 1, matrices: 1, some: D // 4, axes: D // 4, each_sample: 1, each_head: 1,
    into_memory: 1,
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_rotations(rope: Rope) -> None:
    done, error = compared(Site(rms, rope), inputs(False))
    assert told(done) == {f"nvfp4 {what} with rms norm and rotation x 1" for what in ("queries", "keys")}
    assert error < NEAR
    for call in calls(done):
        x, norm, eps, weight, bias, tables, distance = call.args[:7]
        assert (norm, eps, len(x), len(weight), bias, distance) == ("rms", 1e-6, 1, 1, [], ROPES[rope])
        samples, heads = B if rope is each_sample else 1, H if rope is each_head else 1
        assert [tuple(t.meta["val"].shape) for t in tables] == [(samples, heads, L, D)] * 2
    queries, keys = calls(done)
    assert queries.args[5] == keys.args[5], "one pair of tables serves both"


@pytest.mark.parametrize(
    ("norm", "kind", "eps"),
    [(by_hand, "rms", 1e-4), (divided, "rms", 1e-5), (layer, "layer", 1e-3), (layer_by_hand, "layer", 1e-6)],
)
@pytest.mark.parametrize("tokens_first", [False, True])
def test_norms(norm: Callable[..., Tensor], kind: str, eps: float, tokens_first: bool) -> None:
    done, error = compared(Site(norm, none, tokens_first=tokens_first), inputs(False))
    assert told(done) == {f"nvfp4 {what} with {kind} norm x 1" for what in ("queries", "keys")}
    assert error < NEAR
    for call in calls(done):
        assert call.args[1:3] == (kind, eps) and call.args[5] == []
        assert (len(call.args[3]), len(call.args[4])) == (1, 1 if kind == "layer" else 0)
        # the projection itself is read, where it lies
        assert call.args[0][0].target is torch.ops.aten.transpose.int


@pytest.mark.parametrize("rope", [none, pairs, later])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_text_stands_in_front_of_the_image(rope: Rope, tokens_first: bool) -> None:
    if rope is later and tokens_first:
        pytest.skip("written for heads first")
    done, error = compared(Site(rms, rope, True, tokens_first), inputs(True))
    what = "rms norm" if rope is none else "rms norm and rotation"
    assert told(done) == {f"nvfp4 {operand} with {what} x 1" for operand in ("queries", "keys")}
    assert error < NEAR
    for call in calls(done):
        assert [x.meta["val"].shape[2] for x in call.args[0]] == [T, L] and len(call.args[3]) == 2


def mixes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x[..., :1] * sin


def shifted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pairs(x, cos, sin) + sin


def folded(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pairs(x, cos, sin)[:, :, list(range(L))]


def squared(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pairs(x, cos, sin) * x


@pytest.mark.parametrize(
    ("norm", "rope", "said"),
    [
        (rms, mixes, "where they are: what stands in front of it rotates no pairs of features"),
        (rms, shifted, "where they are: what stands in front of it rotates no pairs of features"),
        (None, folded, "without norm or rotation"),
        (rms, squared, "without norm or rotation"),
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.mean()), pairs, "with rotation"),
        (lambda x, w: x * torch.rsqrt(x.abs().mean(-1, keepdim=True)), pairs, "with rotation"),
        (None, none, "without norm or rotation"),
    ],
)
def test_what_is_neither_stays_where_it_is(norm: Callable[..., Tensor] | None, rope: Rope, said: str) -> None:
    done, error = compared(Site(norm, rope), inputs(False))
    assert told(done) == {f"nvfp4 {what} {said} x 1" for what in ("queries", "keys")}
    assert error < NEAR


def test_blocks_of_keys_need_the_operands_themselves() -> None:
    capture = capture_export(Site(rms, pairs).eval(), inputs(False))
    plan = Plan(attention="nvfp4", attention_sparse=0.1)
    done = rewrite(capture, plan, (RecogniseAttention(), UseAttention(kind=B200)))
    assert not calls(done)
    assert told(done) == {"nvfp4 queries and keys smoothed where they are: blocks of keys are chosen by them x 1"}


def test_found_while_dynamo_compiles() -> None:
    seen = list[set[str]]()

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        capture = capture_dynamo(gm, example_inputs)
        seen.append(told(rewrite(capture, Plan(attention="nvfp4"), (UseAttention(kind=B200),))))
        return gm.forward

    with torch.inference_mode():
        torch.compile(Site(by_hand, complex_).eval(), backend=backend, fullgraph=True)(*inputs(False))
    assert seen == [{f"nvfp4 {what} with rms norm and rotation x 1" for what in ("queries", "keys")}]


ZOO = {
    "flux": {"with rms norm and rotation": 5},
    "wan": {"with rotation": 3, "without norm or rotation": 3},
    "hunyuan_video": {"with rms norm and rotation": 5, "without norm or rotation": 2},
    "cogvideox": {"with layer norm and rotation": 3},
    "ltx": {"with rotation": 3, "without norm or rotation": 3},
}


@pytest.mark.parametrize("name", ZOO)
def test_models(name: str, captured: Callable[..., list[Capture]]) -> None:
    from ditc.passes.backend import _copy

    capture = _copy(captured(name)[0])
    done = rewrite(capture, Plan(attention="nvfp4"), (RecogniseAttention(), UseAttention(kind=B200)))
    expected = {f"nvfp4 {op} {what} x {n}" for op in ("queries", "keys") for what, n in ZOO[name].items()}
    assert told(done) == expected
    # tables are made once for all blocks of a kind: these have two, with and without text of its own
    made = {node for call in calls(done) for node in call.args[5]}
    assert len(made) == (4 if name in ("flux", "hunyuan_video") else 2)
