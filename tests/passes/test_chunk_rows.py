"""Rows: on random graphs of operators that treat each token on its own, a sparse step is the rows of a dense one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ditc.passes.cache.chunks.rows import Part, Rows, TokensMixed
from ditc.passes.cache.chunks.sparse import Sparse, propagate

B, TEXT, TOKENS, WIDTH = 2, 3, 6, 8
GATHERED = 4

Op = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From a joint stream (B, TEXT + TOKENS, WIDTH), a table (1, TEXT + TOKENS, WIDTH) and a matrix to a joint stream."""


def _heads(x: Tensor) -> Tensor:
    return x.reshape(B, TEXT + TOKENS, 2, WIDTH // 2).permute(0, 2, 1, 3)


def _back(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(B, -1, WIDTH)


def _written(x: Tensor, table: Tensor) -> Tensor:
    """The image tokens alone are rotated, as CogVideoX does it."""
    y = _heads(x)
    return _back(torch.slice_scatter(y, y[:, :, TEXT:] * _heads(table.expand(B, -1, -1))[:, :, TEXT:], 2, TEXT))


OPS: dict[str, Op] = {
    "linear": lambda x, table, w: F.linear(x, w),
    "norm": lambda x, table, w: F.layer_norm(x, (WIDTH,)) * w[0] + w[1],
    "rms": lambda x, table, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "table": lambda x, table, w: x * table + table[0],
    "gate": lambda x, table, w: x + torch.sigmoid(F.linear(x, w)) * x,
    "heads": lambda x, table, w: _back(_heads(x) * _heads(table.expand(B, -1, -1))),
    "softmax": lambda x, table, w: torch.softmax(_back(F.gelu(_heads(x))), -1),
    "chunk": lambda x, table, w: torch.cat([part * 2 for part in x.chunk(2, -1)][::-1], -1),
    "pairs": lambda x, table, w: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(2),
    "complex": lambda x, table, w: torch.view_as_real(
        torch.view_as_complex(x.reshape(B, -1, 4, 2)) * torch.view_as_complex(table.reshape(1, -1, 4, 2))
    ).flatten(2),
    "apart": lambda x, table, w: torch.cat([F.linear(x[:, :TEXT], w), x[:, TEXT:] * table[:, TEXT:]], 1),
    "split": lambda x, table, w: torch.cat([part.sin() for part in x.split([TEXT, TOKENS], 1)], 1),
    "written": lambda x, table, w: _written(x, table),
    "flat": lambda x, table, w: x.unsqueeze(2).expand(-1, -1, 3, -1).sum(2).squeeze(-1),
}


def _traced(run: Callable[..., Tensor], *examples: Tensor) -> fx.GraphModule:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(example) for example in examples]
        traced = make_fx(run, pre_dispatch=True)(*fakes)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    return traced


def _sparse(graph: fx.GraphModule, seeds: int, index: Tensor) -> tuple[fx.GraphModule, Any]:
    """The sparse variant of a graph whose first inputs are joint streams, and the rows of what it returns."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    rows = Rows(1, 0 if index.dim() == 2 else None, (Part(TEXT, False), Part(TOKENS, True)))
    (result,) = graph.graph.output_node().all_input_nodes
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    entering = dict.fromkeys(placeholders[:seeds], rows)
    known, steps = propagate(nodes, entering)
    mode = placeholders[0].meta["val"].fake_mode
    new = fx.Graph()
    outside = {}
    for node in placeholders:
        outside[node] = new.placeholder(node.name)
        outside[node].meta = dict(node.meta)
    at = new.placeholder("index")
    with mode:
        at.meta = {"val": torch.empty(index.shape, dtype=torch.int64)}
    twins, _ = Sparse(new, mode, at).write(nodes, steps, entering, outside, {})
    new.output(twins[result])
    return fx.GraphModule(graph, new), known[result]


@pytest.mark.parametrize("each", [True, False], ids=["own chunks", "shared chunks"])
@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed: int, each: bool) -> None:
    chosen = random.Random(seed)
    names = [chosen.choice(list(OPS)) for _ in range(6)]
    torch.manual_seed(seed)
    x, table, w = torch.randn(B, TEXT + TOKENS, WIDTH), torch.randn(1, TEXT + TOKENS, WIDTH), torch.randn(WIDTH, WIDTH)

    def run(x: Tensor, table: Tensor, w: Tensor) -> Tensor:
        for name in names:
            x = x + OPS[name](x, table, w) / 4
        return x

    index = torch.stack([torch.randperm(TOKENS)[:GATHERED] for _ in range(B)]) if each else torch.tensor([5, 0, 2, 3])
    sparse, rows = _sparse(_traced(run, x, table, w), 1, index)
    assert rows == Rows(1, 0 if each else None, (Part(TEXT, False), Part(TOKENS, True))), names
    found, dense = sparse(x, table, w, index), run(x, table, w)
    for sample in range(B):
        own = torch.cat([torch.arange(TEXT), TEXT + (index[sample] if each else index)])
        torch.testing.assert_close(
            found[sample], dense[sample, own], rtol=1e-5, atol=1e-5, msg=lambda m: f"{names} {m}"
        )


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda x, w: x.mean(1, keepdim=True) + x, "reduces over the tokens"),
        (lambda x, w: torch.softmax(x, 1), "works along the tokens"),
        (lambda x, w: x.cumsum(1), "works along the tokens"),
        (lambda x, w: x.reshape(B, 3, 3, WIDTH), "merges tokens"),
        (lambda x, w: x.reshape(-1, WIDTH), "merges tokens"),
        (lambda x, w: x[:, TEXT + 1 :], "cuts the tokens of the latent apart"),
        (lambda x, w: x[:, 0], "picks one token"),
        (lambda x, w: x[:1] * x, "among samples"),
        (lambda x, w: x @ x.transpose(1, 2), "tokens meet tokens"),
        (lambda x, w: x[:, ::2], "every second token"),
        (lambda x, w: F.conv1d(x.transpose(1, 2), w[:, :, None]).transpose(1, 2), "no proof"),
        (lambda x, w: x.flip(1), "works along the tokens"),
    ],
)
def test_what_mixes_tokens_is_refused(run: Callable[..., Tensor], why: str) -> None:
    graph = _traced(run, torch.randn(B, TEXT + TOKENS, WIDTH), torch.randn(WIDTH, WIDTH))
    with pytest.raises(TokensMixed, match=why):
        _sparse(graph, 1, torch.zeros(B, GATHERED, dtype=torch.int64))


def test_operands_that_hold_other_tokens_are_refused() -> None:
    graph = _traced(lambda x, y: x.transpose(1, 2) * y, *(torch.randn(B, 9, 9) for _ in range(2)))
    with pytest.raises(TokensMixed):
        _sparse(graph, 2, torch.zeros(B, GATHERED, dtype=torch.int64))
