"""``python -m benchmarks.linear_int8``: INT8 linears of a DiT block on CPU, VNNI kernels beside inductor's.

Each candidate works through several layers of one shape, so that weights come from memory as they do in a model. What
competes is a whole linear with what surrounds it in a block (norm and modulation or GELU before, GELU or gate and
residual behind), the GEMM alone, and the weight-only product of one row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditc.bench.harness import Call, Candidate, Clock, measure, ratios
from ditc.kernels.formats.int8 import quantize_int8
from ditc.kernels.linear import vnni
from ditc.kernels.linear.lowering import int8_linear, int8_weight_linear

PEER, OWN, OWN_PRODUCT = "inductor", "vnni", "vnni, norm beside it"
_LAYERS = 4
_BOUND = 1e-3  # a value on the edge between two integers may fall on either side
_SHAPES = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152), (384, 1536))
Layer = Callable[[Tensor], Tensor]


def weights(K: int, N: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Integers, scales and biases of the layers."""
    return [(*quantize_int8(torch.randn(N, K)), torch.randn(N)) for _ in range(_LAYERS)]


def peer_linear(x: Tensor, w: tuple[Tensor, Tensor, Tensor], gate: Any = None, residual: Any = None) -> Tensor:
    """A linear layer as the compiler lowers it without these kernels."""
    return int8_linear(quantize_int8(x), w[:2], w[2], gate, residual, "int8", torch.float32)


def peer_row(x: Tensor, w: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return int8_weight_linear(x, w[:2], w[2], "int8")


def both(parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Each layer's packed weight beside the layer."""
    return [(vnni.pack(w[0], w[1]), w) for w in parts]


def over(layers: list[Layer], x: Tensor, compiled: bool) -> Callable[[], Call]:
    """A call that runs every layer on ``x`` and returns the last output."""

    def prepare() -> Call:
        functions = [torch.compile(layer, fullgraph=True, dynamic=False) for layer in layers] if compiled else layers

        def call(_: int) -> Tensor:
            for function in functions:
                y = function(x)
            return y

        return call

    return prepare


def product(M: int, K: int, N: int) -> tuple[Tensor, dict[str, list[Layer]]]:
    """Integers in: the GEMM into int32 against the GEMM into float32 with scales and bias."""
    q, scale = quantize_int8(torch.randn(M, K))
    parts = weights(K, N)
    return q, {
        PEER: [lambda x, w=w: torch._int_mm(x, w[0].t()) * (scale * w[1].t()) + w[2] for w in parts],
        OWN: [lambda x, p=p, w=w: torch.ops.ditc.vnni_linear(x, scale, p, N, w[2]) for p, w in both(parts)],
    }


def plain(M: int, K: int, N: int) -> tuple[Tensor, dict[str, list[Layer]]]:
    """Floats in and out: quantise, multiply, scale, bias."""
    parts = weights(K, N)
    return torch.randn(1, M, K), {
        PEER: [lambda x, w=w: peer_linear(x, w) for w in parts],
        OWN: [lambda x, p=p, w=w: torch.ops.ditc.vnni_linear(x, None, p, N, w[2]) for p, w in both(parts)],
    }


def gated(M: int, K: int, N: int) -> tuple[Tensor, dict[str, list[Layer]]]:
    """As :func:`plain`, then a gate and a residual."""
    parts, gate, residual = weights(K, N), torch.randn(1, 1, N), torch.randn(1, M, N)
    return torch.randn(1, M, K), {
        PEER: [lambda x, w=w: peer_linear(x, w, gate, residual) for w in parts],
        OWN: [
            lambda x, p=p, w=w: torch.ops.ditc.vnni_linear(x, None, p, N, w[2], "none", gate, residual)
            for p, w in both(parts)
        ],
    }


def normed(M: int, K: int, N: int) -> tuple[Tensor, dict[str, list[Layer]]]:
    """Layer norm and modulation, then as :func:`plain`."""
    parts, multiplier, shift = weights(K, N), 1 + torch.randn(1, 1, K) / 4, torch.randn(1, 1, K)

    def front(x: Tensor) -> Tensor:
        return F.layer_norm(x, (K,), None, None, 1e-6) * multiplier + shift

    ops = torch.ops.ditc
    return torch.randn(1, M, K), {
        PEER: [lambda x, w=w: peer_linear(front(x), w) for w in parts],
        OWN: [
            lambda x, p=p, w=w: ops.vnni_norm_linear(
                x, "layer", 1e-6, None, None, multiplier, shift, p, N, w[2]
            )
            for p, w in both(parts)
        ],
        OWN_PRODUCT: [
            lambda x, p=p, w=w: ops.vnni_linear(front(x), None, p, N, w[2])
            for p, w in both(parts)
        ],
    }  # fmt: skip


def mlp(M: int, K: int, N: int) -> tuple[Tensor, dict[str, list[Layer]]]:
    """Up, GELU (tanh), down, gate, residual."""
    ups, downs, gate, residual = weights(K, N), weights(N, K), torch.randn(1, 1, K), torch.randn(1, M, K)
    pairs = list(zip(ups, downs, strict=True))
    packed = [(vnni.pack(*up[:2]), vnni.pack(*down[:2])) for up, down in pairs]
    ops = torch.ops.ditc

    def peer(x: Tensor, up: Any, down: Any) -> Tensor:
        y = F.gelu(peer_linear(x, up), approximate="tanh")
        return peer_linear(y, down, gate, residual)

    def own(x: Tensor, up: Any, down: Any, p: Any) -> Tensor:
        y = ops.vnni_linear(x, None, p[0], N, up[2], "gelu_tanh")
        return ops.vnni_linear(y, None, p[1], K, down[2], "none", gate, residual)

    def quantised(x: Tensor, up: Any, down: Any, p: Any) -> Tensor:
        q, scale = ops.vnni_linear_quantize(x, None, p[0], N, up[2], "gelu_tanh")
        return ops.vnni_linear(q, scale, p[1], K, down[2], "none", gate, residual)

    def beside(x: Tensor, up: Any, down: Any, p: Any) -> Tensor:
        y = F.gelu(ops.vnni_linear(x, None, p[0], N, up[2]), approximate="tanh")
        return ops.vnni_linear(y, None, p[1], K, down[2]) * gate + residual

    return torch.randn(1, M, K), {
        PEER: [lambda x, u=u, d=d: peer(x, u, d) for u, d in pairs],
        OWN: [lambda x, u=u, d=d, p=p: own(x, u, d, p) for (u, d), p in zip(pairs, packed, strict=True)],
        "vnni, hidden rows quantised": [
            lambda x, u=u, d=d, p=p: quantised(x, u, d, p) for (u, d), p in zip(pairs, packed, strict=True)
        ],
        "vnni, GELU and gate beside it": [
            lambda x, u=u, d=d, p=p: beside(x, u, d, p) for (u, d), p in zip(pairs, packed, strict=True)
        ],
    }


def row(M: int, K: int, N: int) -> tuple[Tensor, dict[str, list[Layer]]]:
    """The weight-only product of ``M`` rows, beside the same in float32."""
    parts = weights(K, N)
    wide = [(w[0] * w[1], w[2]) for w in parts]
    return torch.randn(M, K), {
        PEER: [lambda x, w=w: peer_row(x, w) for w in parts],
        OWN: [lambda x, w=w: torch.ops.ditc.vnni_weight_linear(x, *w) for w in parts],
        "float32": [lambda x, w=w: F.linear(x, *w) for w in wide],
    }


def compare(name: str, build: Any, M: int, K: int, N: int, rounds: int, clock: Clock) -> None:
    """Prints the milliseconds of a layer and how many times as fast as inductor each candidate is."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, ways = build(M, K, N)
    reference = ways[PEER][-1](x)
    field = [Candidate(way, over(layers, x, compiled=True), _BOUND) for way, layers in ways.items()]
    results = measure(field, [reference], rounds=rounds, clock=clock)
    found = ratios(results, PEER)
    for result in results:
        if result.seconds is None:
            print(f"{name} {M}x{K}x{N} {result.name}: {result.refused}")
            continue
        ms, ratio = min(result.samples) / _LAYERS * 1e3, found[result.name]
        print(
            f"{name} {M}x{K}x{N} {result.name}: {ms:.3f} ms at best, {ratio.median:.2f} "
            f"({ratio.low:.2f} – {ratio.high:.2f}) x {PEER}, error {result.error:.0e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine, one thread")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--only", nargs="+", default=["product", "plain", "gated", "normed", "mlp", "row"])
    arguments = parser.parse_args()
    reason = vnni.vnni_reason()
    if reason is not None:
        raise SystemExit(reason)
    torch._dynamo.config.recompile_limit = 10_000
    for M in arguments.tokens:
        for name, build in (("product", product), ("plain", plain)):
            for K, N in _SHAPES if name in arguments.only else ():
                compare(name, build, M, K, N, arguments.rounds, arguments.clock)
        for name, build, K, N in (
            ("gated", gated, 1152, 1152),
            ("normed", normed, 1152, 3456),
            ("mlp", mlp, 1152, 4608),
        ):
            if name in arguments.only:
                compare(name, build, M, K, N, arguments.rounds, arguments.clock)
    for M in (1, 2, 4) if "row" in arguments.only else ():
        compare("row", row, M, 1152, 6912, arguments.rounds, arguments.clock)


if __name__ == "__main__":
    with torch.no_grad():
        main()
