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
pytestmark = pytest.mark.usefixtures("portable")


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


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="node names are those of torch 2.13")
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
        assert count(done, ops.quantized_linear.default) == 2 * linears
        quantisers = (ops.quantize.default, ops.norm_quantize.default, ops.activation_quantize.default)
        assert [count(done, op) for op in quantisers] == [2, 4, 2], "Q, K and V share one, gate and up another"
        assert count(done, ops.quantize_weight.default) == 0, "weights are packed in the prologue"
        kept = {fact.name for fact in graph_inputs(done.graph) if fact.kind == "parameter"}
        read = {n.meta["ditc_input"].name for n in done.graph.graph.find_nodes(op="placeholder") if n.users}
        for name in ("patch.weight", "time_in.weight", "time_out.weight", "head.weight", "blocks.0.modulation.weight"):
            assert name in read & kept
        assert "blocks.0.to_q.weight" not in read


class ShapesBlock(nn.Module):
    """Attention and an MLP of odd sizes, with and without biases."""

    def __init__(self, width: int, heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        inner = width * heads
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(inner, inner, bias=bias) for _ in range(3))
        self.out = nn.Linear(inner, inner, bias=bias)
        self.up, self.down = nn.Linear(inner, hidden, bias=bias), nn.Linear(hidden, inner)

    def query(self, x: Tensor) -> Tensor:
        result: Tensor = self.q(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), self.k(x), self.v(x)))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Adapted(ShapesBlock):
    """The weight of Q is made in the graph: from other weights (a low-rank adapter), or from the input."""

    def __init__(self, from_input: bool) -> None:
        super().__init__(4, 2, 8, True)
        self.from_input = from_input
        self.down_lora, self.up_lora = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def query(self, x: Tensor) -> Tensor:
        update = self.up_lora @ self.down_lora
        if self.from_input:
            update = update * x.mean()
        return F.linear(x, self.q.weight + update, self.q.bias)


class Stacked(nn.Module):
    """An embedding and two blocks."""

    def __init__(self, inner: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(3, inner)
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


@settings(max_examples=15, deadline=None)
@given(
    width=st.integers(1, 9), heads=st.integers(1, 3), hidden=st.integers(1, 33), bias=st.booleans(),
    batch=st.integers(1, 3), tokens=st.integers(1, 17), fuse=st.booleans(),
)  # fmt: skip
def test_any_shape(width: int, heads: int, hidden: int, bias: bool, batch: int, tokens: int, fuse: bool) -> None:
    torch.manual_seed(0)
    model = Stacked(width * heads, lambda: ShapesBlock(width, heads, hidden, bias)).eval()
    x = torch.randn(batch, tokens, 3)
    expected = model(x).detach()
    structural = run(rewritten(model, (x,), fuse=fuse), model, (x,))
    torch.testing.assert_close(structural, expected, rtol=1e-5, atol=1e-5)
    done = rewritten(model, (x,), fuse=fuse, quantize="int8")
    assert next(r for r in done.reports if r.name == "quantize").rewrites == 2 * (4 if fuse else 6)
    assert float((run(done, model, (x,)) - expected).norm() / expected.norm()) < 0.04


@pytest.mark.parametrize("from_input", [False, True])
def test_a_weight_that_the_graph_makes(from_input: bool) -> None:
    torch.manual_seed(0)
    model, x = Stacked(8, lambda: Adapted(from_input)).eval(), torch.randn(2, 5, 3)
    done = rewritten(model, (x,), quantize="int8")
    quantize = next(report for report in done.reports if report.name == "quantize")
    # fused K and V, the output, the MLP's two; and Q where its weight is made from weights alone
    assert quantize.rewrites == 2 * (4 if from_input else 5)
    assert [skip.reason for skip in quantize.skipped] == ["its weight depends on an input"] * (2 if from_input else 0)
    if not from_input:
        assert count(done, aten.matmul.default) == 0, "the adapter is applied once per set of weights"
        assert done.prologue is not None
        assert any("q.weight" in name and "down_lora" in name for _, name in done.prologue.quantized)
    expected = model(x).detach()
    assert float((run(done, model, (x,)) - expected).norm() / expected.norm()) < 0.04
