"""Canonicalisation keeps every bit and leaves one way to write each thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ditc.passes.capture import Capture, capture_dynamo, capture_export, graph_inputs
from ditc.passes.pipeline import rewrite
from ditc.passes.plan import Plan

aten = torch.ops.aten


class Function(nn.Module):
    """A module around a function of one tensor and a weight (6, 4)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def attend_by_keyword(x: Tensor, w: Tensor) -> Tensor:
    q = x.unsqueeze(1)
    return F.scaled_dot_product_attention(query=q, key=q, value=q, scale=0.3, is_causal=False)


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "dropout": (lambda x, w: F.dropout(x, 0.5, training=False) + 1, ["add.Tensor"]),
    "cast": (lambda x, w: x.to(torch.float32).type_as(x).contiguous() + 1, ["add.Tensor"]),
    "a cast that casts": (lambda x, w: x.to(torch.float64) + 1, ["_to_copy.default", "add.Tensor"]),
    "view to the same shape": (lambda x, w: x.view(2, 5, 4).expand(2, 5, 4) + 1, ["add.Tensor"]),
    "view": (lambda x, w: x.view(10, 4) + 1, ["reshape.default", "add.Tensor"]),
    "transposed copy": (
        lambda x, w: x.transpose(1, 2).contiguous() + 1,
        ["transpose.int", "clone.default", "add.Tensor"],
    ),
    "clone": (lambda x, w: x.clone(), ["clone.default"]),
    "matmul by the transpose": (lambda x, w: x @ w.t(), ["linear.default"]),
    "matmul by mT": (lambda x, w: torch.matmul(x, w.transpose(-1, -2)), ["linear.default"]),
    "addmm": (lambda x, w: torch.addmm(w[:, 0], x[0], w.t()), ["select.int", "select.int", "addmm.default"]),
    "matmul by a weight": (
        lambda x, w: torch.cat([x, x[..., :2]], -1) @ w,
        ["slice.Tensor", "cat.default", "t.default", "linear.default"],
    ),
    "matmul by a square view": (lambda x, w: x @ w[:4], ["slice.Tensor", "matmul.default"]),
    "attention": (attend_by_keyword, ["unsqueeze.default", "scaled_dot_product_attention.default"]),
}


def by_dynamo(model: nn.Module, x: Tensor) -> Capture:
    found: list[Capture] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(capture_dynamo(gm, example_inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
    return found[0]


@pytest.mark.parametrize("road", ["export", "dynamo"])
@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, road: str) -> None:
    torch.manual_seed(0)
    function, expected = CASES[name]
    model = Function(function).eval()
    x = torch.randn(2, 5, 4)
    done = rewrite(capture_export(model, (x,)) if road == "export" else by_dynamo(model, x), Plan(), passes=())
    targets = [str(n.target).removeprefix("aten.") for n in done.graph.graph.nodes if n.op == "call_function"]
    ignored = {"t.default", "slice.Tensor"} if name == "addmm" else set()
    assert [t for t in targets if t not in ignored] == expected
    with torch.no_grad():
        values = {"weight": model.weight}
        inputs = [values.get(fact.name, x) for fact in graph_inputs(done.graph)]
        assert torch.equal(done.graph(*inputs)[0], model(x))


def test_attention_has_one_layout_of_arguments() -> None:
    x = torch.randn(2, 5, 4)
    done = rewrite(capture_export(Function(attend_by_keyword).eval(), (x,)), Plan(), passes=())
    (node,) = done.graph.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert node.args[3:] == (None, 0.0, False)
    assert node.kwargs == {"scale": 0.3}
