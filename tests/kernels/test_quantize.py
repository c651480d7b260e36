"""Quantising ops: sound registration, every implementation against the reference, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.library import opcheck

from ditc.kernels import quantize as room
from ditc.kernels.formats import FORMATS, format_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FORMAT_NAMES = sorted(FORMATS)
# opcheck compares tensors by arithmetic that torch does not have for float8; whether inputs are left alone and outputs
# alias nothing is then shown by test_inputs_are_left_alone and the formats without float8
UTILITIES = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FLOAT8 = ("fp8", "mxfp8", "nvfp4")
OPS = torch.ops.ditc
Normal = Callable[..., Tensor]


def dequantized(parts: list[Tensor], format: str) -> Tensor:
    return format_of(format).dequantize(parts)


def samples(normal: Normal, format: str) -> dict[str, list[tuple[Any, ...]]]:
    x, K = normal(2, 3, 64), 64
    scale, shift = normal(2, 1, K, seed=1), normal(2, 1, K, seed=2)
    static = None if format.startswith("mx") else torch.tensor(0.01)
    return {
        "quantize": [
            (x, format),
            (normal(5, 96, dtype=torch.bfloat16), format),
            (normal(64, 7, dtype=torch.float16).t(), format),
            (torch.zeros(3, 32), format),
            (normal(0, 32), format),
            *([(x, format, static)] if static is not None else []),
        ],
        "quantize_weight": [(normal(5, 96), format), (normal(32, 7).t(), format)],
        "norm_quantize": [
            (x, "layer", 1e-5, None, None, 1 + scale, shift, format),
            (x, "rms", 1e-6, normal(K, seed=3), None, None, None, format, static),
            (x.bfloat16(), "layer", 1e-6, normal(K).bfloat16(), normal(K, seed=3).bfloat16(), None, None, format),
        ],
        "activation_quantize": [
            (x, "gelu", None, format),
            (x, "gelu_tanh", None, format, static),
            (x, "silu", normal(2, 3, K, seed=4), format),
            (x.half(), "relu", None, format),
        ],
        "dequantize": [(OPS.quantize(x, format), format, dtype) for dtype in FLOATS],
    }


CASES = [
    pytest.param(format, name, index, id=f"{name}-{format}-{index}")
    for format in FORMAT_NAMES
    for name, count in (("quantize", 5), ("quantize_weight", 2), ("norm_quantize", 3), ("activation_quantize", 4),
                        ("dequantize", 3))
    for index in range(count)
]  # fmt: skip


@pytest.mark.parametrize(("format", "name", "index"), CASES)
def test_op_is_registered_soundly(normal: Normal, format: str, name: str, index: int) -> None:
    options = {"test_utils": UTILITIES} if format in FLOAT8 else {}
    opcheck(getattr(OPS, name).default, samples(normal, format)[name][index], **options)


@pytest.mark.parametrize(("format", "name", "index"), CASES)
def test_every_implementation_equals_the_reference(normal: Normal, format: str, name: str, index: int) -> None:
    args = samples(normal, format)[name][index]
    expected = getattr(room, f"{name}_reference")(*args)
    lowering = room.lowerings("cpu")[getattr(OPS, name).default](*args)
    for actual in (getattr(OPS, name)(*args), lowering):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_a_fused_producer_equals_its_parts(normal: Normal, format: str) -> None:
    x, K = normal(2, 5, 64), 64
    scale, shift, up = normal(2, 1, K, seed=1), normal(2, 1, K, seed=2), normal(2, 5, K, seed=3)
    for fused, plain in (
        (
            OPS.norm_quantize(x, "layer", 1e-6, None, None, 1 + scale, shift, format),
            F.layer_norm(x, (K,), eps=1e-6) * (1 + scale) + shift,
        ),
        (
            OPS.norm_quantize(x, "rms", 1e-6, normal(K), normal(K, seed=5), None, None, format),
            F.rms_norm(x, (K,), normal(K), 1e-6) + normal(K, seed=5),
        ),
        (OPS.activation_quantize(x, "silu", up, format), F.silu(x) * up),
        (OPS.activation_quantize(x, "gelu", None, format), F.gelu(x)),
        (OPS.activation_quantize(x, "gelu_tanh", None, format), F.gelu(x, approximate="tanh")),
    ):
        torch.testing.assert_close(fused, OPS.quantize(plain, format), rtol=0, atol=0)


@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_a_static_range_saturates_and_keeps_its_scale(normal: Normal, format: str) -> None:
    x = normal(4, 64)
    x[1, 3], x[2, 5] = 1e4, -1e4
    largest = {"int8": 127.0, "fp8": 448.0, "nvfp4": 6 * 448.0}[format]
    parts = OPS.quantize(x, format, torch.tensor(3.0 / largest))
    y = dequantized(parts, format)
    assert float(y.abs().max()) == pytest.approx(3.0, rel=1e-6)
    assert float(y[1, 3]) > 0 > float(y[2, 5])
    inside = x.abs() < 2.9
    assert float((y - x)[inside].abs().max()) < {"int8": 0.02, "fp8": 0.2, "nvfp4": 0.7}[format]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 96), (3, 37, 51)])
def test_int8_is_bit_equal_to_torchao(normal: Normal, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = normal(*shape, seed=3, dtype=dtype) * 3
    wide = x.float()  # torchao rounds the scale to the input's type, ditc keeps it in float32
    block = (*(1 for _ in shape[:-1]), shape[-1])
    scale, zero = primitives.choose_qparams_affine(
        wide, primitives.MappingType.SYMMETRIC, block, torch.int8, quant_min=-127, quant_max=127, eps=1e-30,
        scale_dtype=torch.float32, keepdim=True,
    )  # fmt: skip
    theirs = primitives.quantize_affine(wide, block, scale, zero, torch.int8, quant_min=-127, quant_max=127)
    q, ours = OPS.quantize(x, "int8")
    torch.testing.assert_close(ours, scale.float().reshape(ours.shape), rtol=0, atol=0)
    assert torch.equal(q, theirs)


@settings(max_examples=40, deadline=None)
@given(
    amax=st.floats(2.0**-149, 2.0**127, width=32), sign=st.sampled_from([-1.0, 1.0]), K=st.integers(1, 40)
)  # fmt: skip
def test_the_largest_int8_of_a_row_becomes_127_and_none_wraps(amax: float, sign: float, K: int) -> None:
    x = torch.linspace(-1, 1, K).unsqueeze(0) * amax
    x[0, 0] = sign * amax
    q, scale = OPS.quantize(x, "int8")
    assert bool(scale.isfinite().all()) and bool((scale > 0).all())
    assert int(q.abs().max()) <= 127
    if amax > 1e-35:
        assert int(q[0, 0]) == sign * 127
    assert bool((q.sign() * x.sign() >= 0).all())


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(FORMAT_NAMES), blocks=st.integers(1, 4), rows=st.integers(1, 5),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]), position=st.integers(0, 127), dtype=st.sampled_from(FLOATS),
)  # fmt: skip
def test_what_is_no_number_stays_visible(
    format: str, blocks: int, rows: int, bad: float, position: int, dtype: torch.dtype
) -> None:
    K = 32 * blocks
    x = torch.randn(rows + 1, K, generator=torch.Generator().manual_seed(position)).to(dtype)
    x[1, position % K] = bad
    y = dequantized(OPS.quantize(x, format), format)
    assert not bool(y[1].isfinite().all())
    others = torch.cat([y[:1], y[2:]])
    assert bool(others.isfinite().all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_compiles_into_its_neighbours(normal: Normal, dtype: torch.dtype) -> None:
    torch._dynamo.reset()

    def chain(x: Tensor, m: Tensor, s: Tensor) -> list[Tensor]:
        parts: list[Tensor] = OPS.norm_quantize(x, "layer", 1e-6, None, None, m, s, "int8")
        return parts

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, decompositions={**select_decomp_table(), **room.lowerings("cpu")})

    x, m, s = (normal(2, n, 131, seed=n, dtype=dtype) for n in (7, 1, 1))
    with torch.no_grad():
        q, scale = torch.compile(chain, backend=backend, fullgraph=True)(x, m, s)
        expected_q, expected_scale = chain(x, m, s)
    torch.testing.assert_close(scale, expected_scale, rtol=4 * torch.finfo(dtype).eps, atol=0)
    # where the norm's last bit differs a value on a boundary may fall to either side
    assert int((q.int() - expected_q.int()).abs().max()) <= 1 if dtype == torch.float32 else 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: OPS.quantize(torch.zeros(2, 3, dtype=torch.float64), "int8"), TypeError, "float64"),
        (lambda: OPS.quantize(torch.tensor(1.0), "int8"), ValueError, "scalar"),
        (lambda: OPS.quantize(torch.zeros(2, 32), "int7"), ValueError, "int8"),
        (lambda: OPS.quantize(torch.zeros(2, 40), "mxfp8"), ValueError, "32"),
        (lambda: OPS.quantize(torch.zeros(2, 24), "nvfp4"), ValueError, "16"),
        (lambda: OPS.quantize(torch.zeros(2, 32), "mxfp4", torch.tensor(1.0)), ValueError, "static"),
        (lambda: OPS.quantize(torch.zeros(2, 32), "int8", torch.ones(2)), ValueError, "one float32 number"),
        (lambda: OPS.quantize_weight(torch.zeros(2, 3, 32), "int8"), ValueError, "2 dimensions"),
        (lambda: OPS.norm_quantize(torch.ones(2, 32), "batch", 0, None, None, None, None, "int8"), ValueError, "rms"),
        (lambda: OPS.activation_quantize(torch.zeros(2, 32), "tanh", None, "int8"), ValueError, "gelu"),
    ],
)  # fmt: skip
def test_wrong_operands_are_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_every_format_compiles_beside_int8(normal: Normal, format: str) -> None:
    torch._dynamo.reset()

    def chain(x: Tensor) -> Tensor:
        y: Tensor = OPS.dequantize(OPS.quantize(x, "int8"), "int8", torch.float32)
        z: Tensor = OPS.dequantize(OPS.activation_quantize(y, "relu", None, format), format, torch.float32)
        return z

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, decompositions={**select_decomp_table(), **room.lowerings("cpu")})

    x = normal(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(chain, backend=backend)(x), chain(x), rtol=1e-6, atol=1e-6)
