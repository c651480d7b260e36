"""Linear ops: sound registration, every implementation against the reference, error bounds, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.library import opcheck

from ditc.kernels import linear as room
from ditc.kernels import quantize as quantizers
from ditc.kernels.formats import FORMATS, format_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FORMAT_NAMES = sorted(FORMATS)
# opcheck compares tensors by arithmetic that torch does not have for float8; whether inputs are left alone and outputs
# alias nothing is then shown by test_inputs_are_left_alone and the formats without float8
UTILITIES = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FLOAT8 = ("fp8", "mxfp8", "nvfp4")
OPS = torch.ops.ditc
Normal = Callable[..., Tensor]


def operands(normal: Normal, format: str, shape: tuple[int, ...], N: int, dtype: torch.dtype = torch.float32) -> Any:
    x, w = normal(*shape, dtype=dtype), normal(N, shape[-1], seed=1, dtype=dtype)
    return OPS.quantize(x, format), OPS.quantize_weight(w, format)


def samples(normal: Normal, format: str) -> dict[str, list[tuple[Any, ...]]]:
    bias, gate, residual = normal(7, seed=2), normal(2, 1, 7, seed=3), normal(2, 5, 7, seed=4)
    batch = operands(normal, format, (2, 5, 64), 7)
    return {
        "quantized_linear": [
            (*batch, None, None, None, format, torch.float32),
            (*batch, bias, gate, residual, format, torch.float32),
            (*batch, bias.half(), None, residual.half(), format, torch.float16),
            (*operands(normal, format, (1, 96), 3, torch.bfloat16), None, None, None, format, torch.bfloat16),
            (*operands(normal, format, (18, 32), 16), normal(16), normal(16), None, format, torch.float32),
            (*operands(normal, format, (0, 32), 4), None, None, None, format, torch.float32),
        ],
        "weight_linear": [
            (normal(1, 64), OPS.quantize_weight(normal(7, 64), format), bias, format),
            (normal(2, 9, 32, dtype=torch.bfloat16), OPS.quantize_weight(normal(5, 32), format), None, format),
            (normal(0, 32), OPS.quantize_weight(normal(4, 32), format), None, format),
        ],
    }


CASES = [
    pytest.param(format, name, index, id=f"{name}-{format}-{index}")
    for format in FORMAT_NAMES
    for name, count in (("quantized_linear", 6), ("weight_linear", 3))
    for index in range(count)
]


@pytest.mark.parametrize(("format", "name", "index"), CASES)
def test_op_is_registered_soundly(normal: Normal, format: str, name: str, index: int) -> None:
    options = {"test_utils": UTILITIES} if format in FLOAT8 else {}
    opcheck(getattr(OPS, name).default, samples(normal, format)[name][index], **options)


@pytest.mark.parametrize("implementation", ["dispatched", "cpu lowering", "cuda lowering"])
@pytest.mark.parametrize(("format", "name", "index"), CASES)
def test_every_implementation_equals_the_reference(
    normal: Normal, implementation: str, format: str, name: str, index: int
) -> None:
    args = samples(normal, format)[name][index]
    op = getattr(OPS, name)
    run = op if implementation == "dispatched" else room.lowerings(implementation.split()[0])[op.default]
    actual, expected = run(*args), getattr(room, f"{name}_reference")(*args)
    exact = format == "int8" and name == "quantized_linear"
    rtol = 0.0 if exact else max(2e-5, 2 * torch.finfo(expected.dtype).eps)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "args",
    [
        # one row whose stride means nothing, as slices of size one have
        (torch.arange(-9, 9, dtype=torch.int8).as_strided((1, 9), (1, 1)), 4),
        # the largest sums: every product is 127 * 127
        (torch.full((2, 515), 127, dtype=torch.int8), 3),
        (torch.full((4, 1), 3, dtype=torch.int8), 6),
        (torch.full((4, 6), 3, dtype=torch.int8), 1),
        (torch.full((4, 0), 3, dtype=torch.int8), 3),
    ],
)
def test_int8_shapes_that_the_integer_gemm_gets_wrong(args: tuple[Tensor, int]) -> None:
    q, N = args
    weight = torch.full((N, q.shape[1]), -127, dtype=torch.int8)
    parts = ([q, torch.ones(len(q), 1)], [weight, torch.ones(N, 1)], None, None, None, "int8", torch.float32)
    for run in (OPS.quantized_linear, room.lowerings("cpu")[OPS.quantized_linear.default]):
        assert torch.equal(run(*parts), room.quantized_linear_reference(*parts))


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_int8_compiles_and_agrees(normal: Normal, dtype: torch.dtype, dynamic: bool) -> None:
    torch._dynamo.reset()

    def layer(x: Tensor, w: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        y: Tensor = OPS.quantized_linear(
            OPS.quantize(x, "int8"), OPS.quantize_weight(w, "int8"), b, gate, None, "int8", x.dtype
        )
        return y

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        table = {**select_decomp_table(), **quantizers.lowerings("cpu"), **room.lowerings("cpu")}
        return compile_fx(graph, inputs, decompositions=table)

    compiled = torch.compile(layer, backend=backend, dynamic=dynamic, fullgraph=True)
    w, b, gate = normal(45, 131, seed=1, dtype=dtype), normal(45, seed=2, dtype=dtype), normal(2, 1, 45).to(dtype)
    with torch.no_grad():
        for M in (7, 29) if dynamic else (7,):
            x = normal(2, M, 131, seed=M, dtype=dtype)
            # inductor may contract a multiplication and an addition: one unit in the last place
            expected = layer(x, w, b, gate)
            torch.testing.assert_close(compiled(x, w, b, gate), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
def test_cuda_lowering_gives_the_gemm_at_least_17_rows(
    normal: Normal, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    int_mm = torch._int_mm

    def spy(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a.shape[0])
        return int_mm(a, b)

    args = (*operands(normal, "int8", (rows, 24), 16), None, None, None, "int8", torch.float32)
    monkeypatch.setattr(torch, "_int_mm", spy)
    actual = room.lowerings("cuda")[OPS.quantized_linear.default](*args)
    assert seen == [max(rows, 17)]
    torch.testing.assert_close(actual, room.quantized_linear_reference(*args), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 20), K=st.integers(1, 70), N=st.integers(1, 40), exponent=st.integers(-30, 30),
    dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**20), transposed=st.booleans(),
)  # fmt: skip
def test_int8_is_near_the_float_product(
    M: int, K: int, N: int, exponent: int, dtype: torch.dtype, seed: int, transposed: bool
) -> None:
    if dtype == torch.float16:
        exponent = exponent // 10
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(K, M, generator=generator).t() if transposed else torch.randn(M, K, generator=generator)
    x, w = (x * 10.0**exponent).to(dtype), torch.randn(N, K, generator=generator)
    parts, weight = OPS.quantize(x, "int8"), OPS.quantize_weight(w, "int8")
    y = OPS.quantized_linear(parts, weight, None, None, None, "int8", torch.float32)
    truth = x.double() @ w.double().t()
    # each operand is off by half a step at most: |dx| <= scale / 2, |dw| <= weight_scale / 2
    step_x, step_w = parts[1].double() / 2, weight[1].double().t() / 2
    bound = step_x * w.double().abs().sum(-1) + x.double().abs().sum(-1, keepdim=True) * step_w + K * step_x * step_w
    assert y.shape == (M, N)
    assert bool(((y.double() - truth).abs() <= bound * (1 + 1e-5) + 1e-36).all())


@settings(max_examples=50, deadline=None)
@given(
    format=st.sampled_from(FORMAT_NAMES), M=st.integers(0, 9), blocks=st.integers(1, 4), N=st.integers(1, 30),
    dtype=st.sampled_from(FLOATS),
)  # fmt: skip
def test_weight_linear_is_the_product_with_the_decoded_weight(
    format: str, M: int, blocks: int, N: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(M * 100 + N)
    x = torch.randn(M, 32 * blocks, generator=generator).to(dtype)
    weight = OPS.quantize_weight(torch.randn(N, 32 * blocks, generator=generator), format)
    decoded = format_of(format).dequantize(weight).double()
    truth = x.double() @ decoded.t()
    bound = x.double().abs() @ decoded.abs().t() * 1e-5 + truth.abs() * torch.finfo(dtype).eps
    y = OPS.weight_linear(x, weight, None, format)
    assert y.dtype == dtype and y.shape == (M, N)
    assert bool(((y.double() - truth).abs() <= bound).all())


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(FORMAT_NAMES), bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    position=st.integers(0, 63), where=st.sampled_from(["input", "weight"]),
)  # fmt: skip
def test_what_is_no_number_stays_visible(format: str, bad: float, position: int, where: str) -> None:
    generator = torch.Generator().manual_seed(position)
    x, w = torch.randn(3, 64, generator=generator), torch.randn(5, 64, generator=generator)
    (x if where == "input" else w)[1, position] = bad
    y = OPS.quantized_linear(
        OPS.quantize(x, format), OPS.quantize_weight(w, format), None, None, None, format, torch.float32
    )
    row_or_column = y if where == "input" else y.t()
    assert not bool(row_or_column[1].isfinite().any())
    if format != "nvfp4" or where == "input":  # the outer scale of an NVFP4 weight belongs to all of it
        assert bool(torch.cat([row_or_column[:1], row_or_column[2:]]).isfinite().all())


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_zero_rows_give_exactly_the_bias(normal: Normal, format: str) -> None:
    x, w, bias = normal(4, 32), normal(6, 32, seed=1), normal(6, seed=2)
    x[2], w[4] = 0, 0
    parts = OPS.quantize(x, format), OPS.quantize_weight(w, format)
    plain = OPS.quantized_linear(*parts, None, None, None, format, torch.float32)
    assert torch.count_nonzero(plain[2]) == 0 and torch.count_nonzero(plain[:, 4]) == 0
    biased = OPS.quantized_linear(*parts, bias, None, None, format, torch.float32)
    assert torch.equal(biased[2], bias) and torch.equal(biased[:, 4], bias[4].expand(4))


@pytest.mark.parametrize(
    ("format", "low", "high"), [("int8", 38, 46), ("fp8", 26, 34), ("mxfp8", 25, 34), ("nvfp4", 15, 21),
                                ("mxfp4", 12, 19)]
)  # fmt: skip
def test_sqnr_on_gaussian_data(normal: Normal, format: str, low: float, high: float) -> None:
    x, w = normal(256, 1152), normal(384, 1152, seed=1)
    y = OPS.quantized_linear(
        OPS.quantize(x, format), OPS.quantize_weight(w, format), None, None, None, format, torch.float32
    )
    truth = x.double() @ w.double().t()
    assert low < float(10 * torch.log10(truth.square().sum() / (y - truth).square().sum())) < high


@pytest.mark.parametrize("rank", [1, 8, 100])
def test_a_low_rank_split_sums_to_the_weight_and_takes_the_largest_part(normal: Normal, rank: int) -> None:
    w = normal(24, 40) + 20 * normal(24, 1, seed=1) @ normal(1, 40, seed=2)
    residual, down, up = OPS.lowrank_split(w, rank)
    assert down.shape == (min(rank, 24), 40) and up.shape == (24, min(rank, 24))
    torch.testing.assert_close(up @ down + residual, w, rtol=1e-5, atol=1e-4)
    singular = torch.linalg.svdvals(w.double())
    assert float(residual.norm()) == pytest.approx(float(singular[rank:].norm()), rel=1e-3, abs=1e-3)
    opcheck(OPS.lowrank_split.default, (w.bfloat16(), rank))


def test_smoothing_moves_outliers_into_the_weight(normal: Normal) -> None:
    x, w = normal(64, 32), normal(16, 32, seed=1)
    x[:, 3] *= 100
    x[:, 7], w[:, 9] = 0, 0
    amax = x.abs().amax(0)
    scale = OPS.smoothing_scale(w, amax.tolist(), 0.5)
    assert bool((scale > 0).all()) and float(scale[7]) == 1.0 == float(scale[9])
    torch.testing.assert_close((x / scale) @ (w * scale).t(), x @ w.t(), rtol=1e-4, atol=1e-3)
    assert float((x / scale).abs().amax()) < 0.3 * float(x.abs().amax())
    opcheck(OPS.smoothing_scale.default, (w, amax.tolist(), 0.5))
    with pytest.raises(ValueError, match="31 channels"):
        OPS.smoothing_scale(w, amax.tolist()[:31], 0.5)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([torch.zeros(2, 3), torch.ones(2, 1)], TypeError, "wants torch.int8"),
        ([torch.zeros(2, 5, dtype=torch.int8), torch.ones(2, 1)], ValueError, "x has 5 features and the weight 3"),
        ([torch.zeros(2, 3, dtype=torch.int8), torch.ones(2)], ValueError, "expected"),
        ([torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, 1).double()], TypeError, "float32"),
        ([torch.zeros(2, 3, dtype=torch.int8)], ValueError, "1 parts"),
    ],
)
def test_wrong_operands_are_refused(x: list[Tensor], error: type[Exception], message: str) -> None:
    weight = [torch.zeros(4, 3, dtype=torch.int8), torch.ones(4, 1)]
    with pytest.raises(error, match=message):
        OPS.quantized_linear(x, weight, None, None, None, "int8", torch.float32)


def test_neighbours_that_do_not_fit_are_refused(normal: Normal) -> None:
    parts = operands(normal, "int8", (2, 5, 8), 4)
    with pytest.raises(ValueError, match="gate"):
        OPS.quantized_linear(*parts, None, normal(3, 2, 5, 4), None, "int8", torch.float32)
    with pytest.raises(ValueError, match="residual"):
        OPS.quantized_linear(*parts, None, None, normal(2, 1, 4), "int8", torch.float32)
    with pytest.raises(ValueError, match="bias"):
        OPS.quantized_linear(*parts, normal(5), None, None, "int8", torch.float32)


def test_a_sum_that_could_overflow_is_refused() -> None:
    K = room.INT8_MAX_K + 1
    q, w = torch.zeros(1, K, dtype=torch.int8), torch.zeros(1, K, dtype=torch.int8)
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="overflow"):
        OPS.quantized_linear([q, one], [w, one], None, None, None, "int8", torch.float32)
    assert "overflow" in str(room.supported("cpu", "int8", K, 1))
    full = torch.full((1, room.INT8_MAX_K), 127, dtype=torch.int8)
    y = OPS.quantized_linear([full, one], [-full, one], None, None, None, "int8", torch.float32)
    assert float(y) == float(torch.tensor(-127 * 127 * room.INT8_MAX_K, dtype=torch.float32))


@pytest.mark.parametrize(
    ("device", "format", "K", "N", "reason"),
    [
        ("cpu", "int8", 33, 7, None),
        ("cuda", "int8", 64, 32, None),
        ("cuda", "int8", 60, 32, "divisible by 8"),
        ("cuda", "int8", 64, 30, "divisible by 8"),
        ("cpu", "int8", 0, 8, "empty"),
        ("cpu", "mxfp8", 40, 8, "32"),
        ("cpu", "nvfp4", 40, 8, "16"),
        ("cpu", "nvfp4", 48, 7, None),
        ("meta", "int8", 64, 64, "no quantised GEMM"),
    ],
)
def test_supported_says_why_not(device: str, format: str, K: int, N: int, reason: str | None) -> None:
    actual = room.supported(device, format, K, N)
    assert actual is None if reason is None else reason in str(actual)


def test_inputs_are_left_alone(normal: Normal) -> None:
    x, w = normal(3, 32), normal(4, 32)
    before = x.clone(), w.clone()
    for format in FORMAT_NAMES:
        OPS.quantized_linear(
            OPS.quantize(x, format), OPS.quantize_weight(w, format), None, None, None, format, torch.float32
        )
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])
