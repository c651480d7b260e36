"""The choice of VNNI kernels: what is taken, and that the numbers stay those of the portable graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditc
from ditc.kernels.errors import WeightError
from ditc.kernels.linear.vnni import vnni_reason
from ditc.passes.capture import capture_export
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan

pytestmark = pytest.mark.skipif(vnni_reason() is not None, reason=str(vnni_reason()))
ops = torch.ops.ditc


class Block(nn.Module):
    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.modulation = nn.Linear(width, 6 * width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, 2 * width) if gated else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, g, d, e, h = self.modulation(c).unsqueeze(1).chunk(6, -1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + a) + b
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + g * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x, x.shape[-1:]) * (1 + d) + e
        inner = F.silu(self.gate(y)) * self.up(y) if self.gate is not None else F.gelu(self.up(y), approximate="tanh")
        return x + h * self.down(inner)


class Model(nn.Module):
    """Two blocks of width 256, whose modulation does not fit a cache."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.embed, self.time, self.head = nn.Linear(8, 256), nn.Linear(256, 256), nn.Linear(256, 8)
        self.blocks = nn.ModuleList(Block(256, gated) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * torch.exp(-torch.arange(128) / 16.0)
        c = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        y: Tensor = self.head(x)
        return y


def example(batch: int = 1, dtype: torch.dtype = torch.float32, gated: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Model(gated).eval().to(dtype)
    return model, (torch.randn(batch, 13, 8).to(dtype), torch.full((batch,), 300.0))


def counts(done: Rewritten) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in done.graph.graph.nodes:
        name = str(node.target).removeprefix("ditc.").removesuffix(".default")
        if node.op == "call_function" and str(node.target).startswith("ditc."):
            found[name] = found.get(name, 0) + 1
    return found


def test_every_int8_linear_is_taken_with_its_neighbours() -> None:
    done = rewrite(capture_export(*example()), Plan(quantize="int8"))
    assert counts(done) == {
        "vnni_weight_linear": 2,  # modulations
        "vnni_norm_linear": 4,  # QKV and up, each behind its norm; up with GELU
        "vnni_linear": 4,  # attention's output, and down
    }


def test_what_several_read_is_quantised_once() -> None:
    done = rewrite(capture_export(*example(gated=True)), Plan(quantize="int8", fuse=False))
    found = counts(done)
    assert found["norm_quantize"] == 4 and found["vnni_linear"] == 2 * 7 and "quantized_linear" not in found


def test_other_formats_are_left_alone() -> None:
    done = rewrite(capture_export(*example()), Plan(quantize="fp8"))
    assert not any(name.startswith("vnni") for name in counts(done))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "gated", "fuse"), [(1, False, True), (3, True, True), (2, True, False)])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_the_numbers_are_those_of_the_portable_graph(
    dtype: torch.dtype, batch: int, gated: bool, fuse: bool, lower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = example(batch, dtype, gated)
    plan = {"quantize": "int8", "fuse": fuse, "lower": lower}
    with torch.no_grad():
        plain = model(*inputs).float()
        actual = ditc.compile(model, plan)(*inputs).float()
        torch._dynamo.reset()
        monkeypatch.setattr("ditc.passes.quantize.vnni.vnni_reason", lambda: "not in this test")
        portable = ditc.compile(model, plan)(*inputs).float()
    bound = 2e-3 if dtype == torch.float32 else 1e-2  # values on an edge may round to either side
    assert float((actual - portable).norm() / portable.norm()) < bound
    assert float((actual - plain).norm() / plain.norm()) < 3e-2


def test_a_weight_that_is_no_number_is_refused() -> None:
    model, inputs = example()
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = float("nan")
        with pytest.raises(WeightError, match=r"blocks\.1\.down\.weight"):
            ditc.compile(model, {"quantize": "int8", "lower": "eager"})(*inputs)
