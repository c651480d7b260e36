"""Both roads end in one normal form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ditc.passes.capture import Capture, capture_dynamo, capture_export, dotted_path, graph_inputs
from ditc.passes.errors import CaptureError

aten = torch.ops.aten


def by_dynamo(model: nn.Module, inputs: tuple[Any, ...], **settings: Any) -> Capture:
    found: list[Capture] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        before = gm.code
        found.append(capture_dynamo(gm, example_inputs))
        assert gm.code == before, "Dynamo's own graph must stay as it is"
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, **settings)(*inputs)
    return found[0]


@pytest.mark.parametrize("road", ["dynamo", "export"])
def test_normal_form(make_dit: Any, dit_inputs: Any, road: str) -> None:
    model, inputs = make_dit(), dit_inputs()
    capture = by_dynamo(model, inputs) if road == "dynamo" else capture_export(model, inputs)
    targets = [node.target for node in capture.graph.graph.nodes if node.op == "call_function"]
    assert targets.count(aten.linear.default) == 2 + 2 * 8 + 1
    assert targets.count(aten.scaled_dot_product_attention.default) == 2
    assert targets.count(aten.layer_norm.default) == 5
    assert not any(t._schema.is_mutable for t in targets if isinstance(t, torch._ops.OpOverload))
    facts = graph_inputs(capture.graph)
    assert {f.name for f in facts if f.kind == "parameter"} == {name for name, _ in model.named_parameters()}
    assert [f.name for f in facts if f.kind == "data"] == ["hidden_states", "timestep"]
    with torch.no_grad():
        assert torch.equal(capture.graph(*capture.examples)[0], model(*inputs))


def test_rms_norm_stays_one_node() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)).eval()
    for capture in (by_dynamo(model, (torch.randn(2, 4),)), capture_export(model, (torch.randn(2, 4),))):
        assert aten.rms_norm.default in [node.target for node in capture.graph.graph.nodes]


def test_symbolic_shapes_stay_symbolic(make_dit: Any, dit_inputs: Any) -> None:
    model = make_dit()
    capture = by_dynamo(model, dit_inputs(), dynamic=True)
    assert any(fact.kind == "size" for fact in graph_inputs(capture.graph))
    batch = torch.export.Dim("batch", min=2, max=16)
    exported = capture_export(model, dit_inputs(), dynamic_shapes={"hidden_states": {0: batch}, "timestep": {0: batch}})
    with torch.no_grad():
        bigger = dit_inputs(batch=3)
        weights = [x for x, fact in zip(exported.examples, graph_inputs(exported.graph), strict=True) if fact.is_weight]
        assert torch.equal(exported.graph(*weights, *bigger)[0], model(*bigger))


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['0']._modules['attn']._parameters['weight']", "blocks.0.attn.weight"),
        ("L['self']._orig_mod._modules['head']._buffers['table']", "head.table"),
        ("blocks.0.attn1", "blocks.0.attn1"),
        ("L['hidden_states']", "hidden_states"),
        ("L['kwargs']['timestep']", "timestep"),
        ("L['args'][2]", "args_2"),
        ("L['cond']['text']", "cond.text"),
    ],
)
def test_dotted_path(source: str, path: str) -> None:
    assert dotted_path(source) == path


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * self.count


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Random(), "random"),
        (Counts(), "writes to one of its inputs"),
        (nn.Dropout(0.5).train(), "random"),
        (nn.Dropout(0.5).eval(), None),
        (nn.Dropout(0.0).train(), None),
        (Attends(), None),
    ],
)
def test_says_what_must_not_be_rewritten(model: nn.Module, reason: str | None) -> None:
    found = by_dynamo(model, (torch.randn(1, 2, 5, 4),)).unsupported
    assert found is None if reason is None else reason in str(found)


def test_an_export_that_is_wrong_is_not_trusted() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                return x + 1
            return x + 2

    with pytest.raises(CaptureError, match="disagrees with the model: output 0 differs by 1"):
        capture_export(Counting(), (torch.zeros(3),))


def test_an_export_that_fails_says_so() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureError, match="could not capture Branches"):
        capture_export(Branches(), (torch.zeros(3),))
