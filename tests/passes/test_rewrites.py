"""Horizontal fusion, INT8 quantisation and hoisting: what they write, what they keep, how near the result is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ditc.passes.capture import capture_export, graph_inputs
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan
from ditc.passes.verify import graph_text

aten, ops = torch.ops.aten, torch.ops.ditc


def rewritten(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> Rewritten:
    return rewrite(capture_export(model, inputs), Plan(**options))


def run(done: Rewritten, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Runs a rewritten graph with the weights of ``model``, packed by the prologue."""
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    facts = [fact for fact in graph_inputs(done.graph) if fact.kind != "packed"]
    data = iter(inputs)
    values = [weights[fact.name] if fact.name in weights else next(data) for fact in facts]
    with torch.no_grad():
        packed = done.prologue.graph(*(values[i] for i in done.prologue.inputs)) if done.prologue else ()
        output: Tensor = done.graph(*values, *packed)[0]
    return output


def count(done: Rewritten, target: Any) -> int:
    return len(done.graph.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int8", "fuse": False}])
def test_golden(make_dit: Any, dit_inputs: Any, golden: Callable[[str, str], None], options: dict[str, Any]) -> None:
    done = rewritten(make_dit(depth=1), dit_inputs(), **options)
    name = "-".join(f"{key}={value}" for key, value in options.items()) or "default"
    prologue = graph_text(done.prologue.graph) if done.prologue else "none\n"
    golden(f"passes/{name}.txt", graph_text(done.graph) + "\nprologue:\n" + prologue)


def test_fusion_groups_what_reads_one_tensor(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(), dit_inputs()
    done = rewritten(model, inputs)
    assert count(done, aten.split_with_sizes.default) == 2 * 2
    assert count(done, aten.linear.default) == 2 + 2 * (1 + 1 + 1 + 1 + 1) + 1
    torch.testing.assert_close(run(done, model, inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_quantisation_shares_each_input_and_keeps_by_role(make_dit: Any, dit_inputs: Any) -> None:
    model, inputs = make_dit(), dit_inputs()
    for fuse, linears in ((True, 4), (False, 7)):
        done = rewritten(model, inputs, quantize="int8", fuse=fuse)
        assert count(done, ops.int8_linear.default) == 2 * linears
        assert count(done, ops.quantize_int8.default) == 2 * 4, "Q, K and V share one, gate and up another"
        assert count(done, ops.quantize_int8_weight.default) == 0, "weights are packed in the prologue"
        kept = {fact.name for fact in graph_inputs(done.graph) if fact.kind == "parameter"}
        read = {n.meta["ditc_input"].name for n in done.graph.graph.find_nodes(op="placeholder") if n.users}
        for name in ("patch.weight", "time_in.weight", "time_out.weight", "head.weight", "blocks.0.modulation.weight"):
            assert name in read & kept
        assert "blocks.0.to_q.weight" not in read


class Shapes(nn.Module):
    """One attention block of odd sizes, with and without biases."""

    def __init__(self, width: int, heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        inner = width * heads
        self.heads = heads
        self.embed = nn.Linear(3, inner)
        self.q, self.k, self.v = (nn.Linear(inner, inner, bias=bias) for _ in range(3))
        self.out = nn.Linear(inner, inner, bias=bias)
        self.up, self.down = nn.Linear(inner, hidden, bias=bias), nn.Linear(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


@settings(max_examples=15, deadline=None)
@given(
    width=st.integers(1, 9), heads=st.integers(1, 3), hidden=st.integers(1, 33), bias=st.booleans(),
    batch=st.integers(1, 3), tokens=st.integers(1, 17), fuse=st.booleans(),
)  # fmt: skip
def test_any_shape(width: int, heads: int, hidden: int, bias: bool, batch: int, tokens: int, fuse: bool) -> None:
    torch.manual_seed(0)
    model = Shapes(width, heads, hidden, bias).eval()
    x = torch.randn(batch, tokens, 3)
    expected = model(x).detach()
    structural = run(rewritten(model, (x,), fuse=fuse), model, (x,))
    torch.testing.assert_close(structural, expected, rtol=1e-5, atol=1e-5)
    done = rewritten(model, (x,), fuse=fuse, quantize="int8")
    assert next(r for r in done.reports if r.name == "quantize").rewrites == (4 if fuse else 6)
    assert float((run(done, model, (x,)) - expected).norm() / expected.norm()) < 0.04


def test_a_weight_that_the_graph_computes_is_skipped_with_the_reason() -> None:
    class Adapted(Shapes):
        def __init__(self) -> None:
            super().__init__(4, 2, 8, True)
            self.down_lora, self.up_lora = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            q = F.linear(x, self.q.weight + self.up_lora @ self.down_lora, self.q.bias)
            k, v = self.k(x), self.v(x)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Adapted().eval(), torch.randn(2, 5, 3)
    done = rewritten(model, (x,), quantize="int8")
    quantize = next(report for report in done.reports if report.name == "quantize")
    assert quantize.rewrites == 2
    assert [skip.reason for skip in quantize.skipped] == ["its weight is computed in the graph"]
    expected = model(x).detach()
    assert float((run(done, model, (x,)) - expected).norm() / expected.norm()) < 0.04
