"""The choice of INT8 attention: what is taken, what stays and why, and the numbers of compiled models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditc
from ditc.kernels.attention import TOLERANCE, attention_reason
from ditc.passes.attention import UseInt8Attention
from ditc.passes.capture import capture_export
from ditc.passes.errors import PassError
from ditc.passes.pipeline import rewrite
from ditc.passes.plan import Plan

runs = pytest.mark.skipif(attention_reason() is not None, reason=str(attention_reason()))
PLAN = Plan(attention="int8", lower="eager")


class Attention(nn.Module):
    def __init__(self, heads: int = 4, width: int = 72, **options: Any) -> None:
        super().__init__()
        self.heads, self.options = heads, options
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2))
        return y


def example(queries: int = 40, keys: int = 50, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Attention(**options).eval().to(dtype)
    return model, (torch.randn(2, queries, 72).to(dtype), torch.randn(2, keys, 72).to(dtype))


def passes_report(model: Any, inputs: Any) -> Any:
    done = rewrite(capture_export(model, inputs), PLAN)
    return next(report for report in done.reports if report.name == UseInt8Attention.name)


@runs
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"heads": 9}])
def test_takes_plain_attention(options: dict[str, Any]) -> None:
    assert passes_report(*example(**options)).rewrites == 1


@runs
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_causal": True, "keys": 40}, "causal"),
        ({"attn_mask": torch.ones(40, 50, dtype=torch.bool)}, "masked"),
        ({"dropout_p": 1e-9}, "dropout"),
        ({"queries": 8}, "8 queries of 50 keys are too few"),
        ({"keys": 3}, "40 queries of 3 keys are too few"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_says_why_it_takes_nothing(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        passes_report(*example(**options))


def test_says_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditc.passes.attention.int8.attention_reason", lambda: "the CPU lacks fma")
    with pytest.raises(PassError, match="the CPU lacks fma"):
        passes_report(*example())


def test_a_plan_that_does_not_ask_gets_none() -> None:
    done = rewrite(capture_export(*example()), Plan(lower="eager"))
    assert not any(report.name == UseInt8Attention.name for report in done.reports)


@runs
@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_compiled(lower: str, dtype: torch.dtype, quantize: str) -> None:
    torch._dynamo.reset()
    model, inputs = example(dtype=dtype, scale=0.5)
    plan = {"attention": "int8", "lower": lower, "quantize": quantize}
    with torch.no_grad():
        wanted = model(*inputs).float()
        native = torch.compile(model, backend="ditc", options={**plan, "attention": "native"})(*inputs).float()
        torch._dynamo.reset()
        actual = torch.compile(model, backend="ditc", options=plan)(*inputs).float()
    assert not torch.equal(actual, native)
    assert float((actual - wanted).norm() / wanted.norm()) < TOLERANCE


@runs
def test_one_graph_serves_other_lengths() -> None:
    model, inputs = example()
    compiled = ditc.compile(model, PLAN)
    with torch.no_grad():
        for length in (40, 64, 129):
            x = torch.randn(2, length, 72)
            wanted = model(x, inputs[1])
            assert float((compiled(x, inputs[1]) - wanted).norm() / wanted.norm()) < TOLERANCE
