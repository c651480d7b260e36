"""Which implementation of attention is chosen on CUDA; and on a device that is there, the op against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

from ditc.kernels import quantize as quantizers
from ditc.kernels.attention import RECIPES, quantize_operands
from ditc.kernels.attention.cuda import implementation

DEVICES = {
    "turing": (7, 5), "a100": (8, 0), "rtx30": (8, 6), "ada": (8, 9), "hopper": (9, 0),
    "b200": (10, 0), "b300": (10, 3), "rtx50": (12, 0),
}  # fmt: skip
EXPECTED = {
    "int8_fp16": ["reference"] + ["triton"] * 7,
    "int8_fp8": ["reference"] + ["decoded"] * 2 + ["triton"] * 5,
    "fp8": ["reference"] + ["decoded"] * 2 + ["triton"] * 5,
    "nvfp4": ["reference"] + ["triton"] * 4 + ["native"] * 3,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_runs_where(recipe: str) -> None:
    assert [implementation(recipe, capability) for capability in DEVICES.values()] == EXPECTED[recipe]


def test_native_nvfp4_needs_a_triton_that_compiles_it() -> None:
    assert implementation("nvfp4", (10, 0), (3, 7)) == "triton"
    with pytest.raises(ValueError, match="nvfp4"):
        implementation("fp4", (10, 0))


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def attend(q: Tensor, k: Tensor, v: Tensor, recipe: str, **options: Any) -> Tensor:
    parts = quantize_operands(q, k, v, RECIPES[recipe])
    y: Tensor = torch.ops.ditc.attention_quantized(
        parts.q, parts.k, parts.v, recipe, q.shape[-1] ** -0.5, q.dtype, parts.bias, **options
    )
    return y


def errors(y: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Relative L1, cosine, and how far the magnitude is from one."""
    y, exact = y.double().flatten(), exact.double().flatten()
    magnitude = float((y * exact).sum() / exact.square().sum())
    return float((y - exact).abs().sum() / exact.abs().sum()), float(F.cosine_similarity(y, exact, 0)), magnitude - 1


def check(y: Tensor, exact: Tensor, recipe: str) -> None:
    limits, (l1, cosine, magnitude) = RECIPES[recipe].tolerance, errors(y, exact)
    assert l1 <= limits.relative_l1 and cosine >= limits.cosine and abs(magnitude) <= limits.magnitude


@pytest.mark.parametrize("D", [64, 72, 128, 256])
@pytest.mark.parametrize("tokens", [(1024, 1024), (1000, 77), (1, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES)
class TestOnTheDevice:
    pytestmark = gpu

    def test_against_torch(
        self, recipe: str, dtype: torch.dtype, tokens: tuple[int, int], D: int, normal: Callable[..., Tensor]
    ) -> None:
        Lq, Lk = tokens
        q, k, v = (normal(2, 8, L, D, seed=i, dtype=dtype).cuda() for i, L in enumerate((Lq, Lk, Lk)))
        exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        check(attend(q, k, v, recipe), exact, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
class TestFeaturesOnTheDevice:
    pytestmark = gpu

    @pytest.mark.parametrize("kind", ["padding", "bool", "added", "causal", "window", "sparse", "shared heads"])
    def test_what_is_seen(self, recipe: str, kind: str, normal: Callable[..., Tensor]) -> None:
        heads = 2 if kind == "shared heads" else 8
        q = normal(2, 8, 515, 64, dtype=torch.bfloat16).cuda()
        k, v = (normal(2, heads, 515, 64, seed=i, dtype=torch.bfloat16).cuda() for i in (1, 2))
        i = torch.arange(515, device="cuda")
        blocks = torch.rand(2, 8, 9, 9, device="cuda") > 0.5
        blocks |= torch.eye(9, dtype=torch.bool, device="cuda")
        options: dict[str, Any] = {
            "padding": {"mask": (i < 300).expand(2, 1, 1, 515)},
            "bool": {"mask": (i[:, None] * i) % 3 != 1},
            "added": {"mask": normal(8, 515, 515, seed=3).cuda()},
            "causal": {"causal": True},
            "window": {"window": 100},
            "sparse": {"blocks": blocks},
            "shared heads": {},
        }[kind]
        mask = {
            "causal": i[:, None] >= i,
            "window": (i[:, None] - i).abs() <= 100,
            "sparse": blocks[:, :, i // 64][..., i // 64],
        }.get(kind, options.get("mask"))
        exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, enable_gqa=kind == "shared heads")
        check(attend(q, k, v, recipe, **options), exact, recipe)

    def test_ones(self, recipe: str, normal: Callable[..., Tensor]) -> None:
        q, k = (normal(1, 4, 777, 64, seed=i).cuda() for i in (0, 1))
        y = attend(q * 3, k, torch.ones_like(k), recipe)
        torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-3, atol=0)

    def test_compiled(self, recipe: str, normal: Callable[..., Tensor]) -> None:
        torch._dynamo.reset()

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            return compile_fx(graph, inputs, decompositions={**select_decomp_table(), **quantizers.lowerings("cuda")})

        q, k, v = (normal(2, 4, 300, 64, seed=i, dtype=torch.bfloat16).cuda() for i in range(3))
        with torch.no_grad():
            y = torch.compile(attend, backend=backend, fullgraph=True)(q, k, v, recipe)
        check(y, F.scaled_dot_product_attention(q.float(), k.float(), v.float()), recipe)
