"""INT8 ops: every implementation against the reference, and the reference against its own properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.library import opcheck

from ditc.kernels import int8

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.ditc


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(M: int, K: int, N: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    q, scale = OPS.quantize_int8(normal(M, K, dtype=dtype))
    weight_q, weight_scale = OPS.quantize_int8_weight(normal(N, K, seed=1, dtype=dtype))
    return q, scale, weight_q, weight_scale, normal(N, seed=2, dtype=dtype)


def lowered(name: str, device: str = "cpu") -> Callable[..., Any]:
    return int8.lowerings(device)[getattr(OPS, name).default]


SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "quantize_int8": [
        (normal(5, 33),),
        (normal(2, 3, 17, dtype=torch.bfloat16),),
        (normal(7, dtype=torch.float16),),
        (normal(19, 6).t(),),
        (normal(0, 8),),
        (torch.zeros(3, 5),),
    ],
    "quantize_int8_weight": [(normal(5, 33),), (normal(12, 7).t(),), (normal(3, 9, dtype=torch.bfloat16),)],
    "int8_linear": [
        (*packed(5, 33, 7), torch.float32),
        (*packed(1, 64, 3, torch.bfloat16), torch.bfloat16),
        (*packed(18, 48, 16, torch.float16), torch.float16),
        (*packed(9, 31, 13)[:4], None, torch.float32),
        (*packed(0, 8, 4), torch.float32),
        (*packed(4, 1, 6), torch.float32),
        (*packed(4, 6, 1), torch.float32),
        (*packed(4, 0, 3), torch.float32),
        # one row whose stride means nothing, as slices of size one have
        (torch.arange(-9, 9, dtype=torch.int8).as_strided((1, 9), (1, 1)), *packed(1, 9, 4)[1:], torch.float32),
        # the largest sums: every product is 127 * 127
        (torch.full((2, 515), 127, dtype=torch.int8), torch.ones(2, 1), torch.full((3, 515), -127, dtype=torch.int8),
         torch.ones(3), None, torch.float32),
    ],
    "int8_weight_linear": [
        (normal(1, 33), *packed(1, 33, 7)[2:]),
        (normal(2, 3, 20), *packed(1, 20, 5)[2:4], None),
        (normal(3, 17, dtype=torch.bfloat16), *packed(1, 17, 6)[2:]),
        (normal(0, 8), *packed(1, 8, 4)[2:]),
    ],
}  # fmt: skip
REFERENCES = {
    "quantize_int8": int8.quantize_int8_reference,
    "quantize_int8_weight": int8.quantize_int8_weight_reference,
    "int8_linear": int8.int8_linear_reference,
    "int8_weight_linear": int8.int8_weight_linear_reference,
}
CASES = [
    pytest.param(name, args, id=f"{name}-{i}") for name, samples in SAMPLES.items() for i, args in enumerate(samples)
]


@pytest.mark.parametrize(("name", "args"), CASES)
def test_op_is_registered_soundly(name: str, args: tuple[Any, ...]) -> None:
    opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("implementation", ["dispatched", "cpu lowering", "cuda lowering"])
@pytest.mark.parametrize(("name", "args"), CASES)
def test_every_implementation_equals_the_reference(implementation: str, name: str, args: tuple[Any, ...]) -> None:
    run = getattr(OPS, name) if implementation == "dispatched" else lowered(name, implementation.split()[0])
    actual, expected = run(*args), REFERENCES[name](*args)
    exact = name != "int8_weight_linear"  # a float sum has an order; all else is integers and single roundings
    rtol = 0.0 if exact else max(1e-5, torch.finfo(args[0].dtype).eps)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_lowering_compiles_and_agrees(dtype: torch.dtype, dynamic: bool) -> None:
    torch._dynamo.reset()

    def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        q, scale = OPS.quantize_int8(x)
        weight_q, weight_scale = OPS.quantize_int8_weight(w)
        return OPS.int8_linear(q, scale, weight_q, weight_scale, b, x.dtype)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, decompositions={**select_decomp_table(), **int8.lowerings("cpu")})

    compiled = torch.compile(linear, backend=backend, dynamic=dynamic, fullgraph=True)
    w, b = normal(45, 131, seed=1, dtype=dtype), normal(45, seed=2, dtype=dtype)
    with torch.no_grad():
        for M in (7, 29) if dynamic else (7,):
            x = normal(2, M, 131, seed=M, dtype=dtype)
            # inductor may contract a multiplication and an addition: one unit in the last place
            torch.testing.assert_close(compiled(x, w, b), linear(x, w, b), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(M=st.integers(0, 9), K=st.integers(1, 70), N=st.integers(1, 30), dtype=st.sampled_from(FLOATS))
def test_weight_linear_is_near_the_float_product(M: int, K: int, N: int, dtype: torch.dtype) -> None:
    x, w = normal(M, K, dtype=dtype), normal(N, K, seed=1)
    weight_q, weight_scale = OPS.quantize_int8_weight(w)
    truth = x.double() @ w.double().t()
    bound = x.double().abs().sum(-1, keepdim=True) * weight_scale.double() / 2 + truth.abs() * torch.finfo(dtype).eps
    for run in (OPS.int8_weight_linear, lowered("int8_weight_linear"), int8.int8_weight_linear_reference):
        y = run(x, weight_q, weight_scale, None)
        assert y.dtype == dtype and y.shape == (M, N)
        assert bool(((y.double() - truth).abs() <= bound * (1 + 2 * torch.finfo(dtype).eps) + 1e-5).all())


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
def test_cuda_lowering_gives_the_gemm_at_least_17_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    int_mm = torch._int_mm

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(a.shape[0])
        return int_mm(a, b)

    args = (*packed(rows, 24, 16), torch.float32)
    monkeypatch.setattr(torch, "_int_mm", spy)
    actual = lowered("int8_linear", "cuda")(*args)
    assert seen == [max(rows, 17)]
    torch.testing.assert_close(actual, int8.int8_linear_reference(*args), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 96), (3, 37, 51)])
def test_quantisation_is_bit_equal_to_torchao(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = normal(*shape, seed=3, dtype=dtype) * 3
    wide = x.float()  # torchao rounds the scale to the input's type, ditc keeps it in float32
    block = (*(1 for _ in shape[:-1]), shape[-1])
    scale, zero = primitives.choose_qparams_affine(
        wide, primitives.MappingType.SYMMETRIC, block, torch.int8, quant_min=-127, quant_max=127, eps=1e-30,
        scale_dtype=torch.float32, keepdim=True,
    )  # fmt: skip
    theirs = primitives.quantize_affine(wide, block, scale, zero, torch.int8, quant_min=-127, quant_max=127)
    q, ours = OPS.quantize_int8(x)
    torch.testing.assert_close(ours, scale.float().reshape(ours.shape), rtol=0, atol=0)
    assert torch.equal(q, theirs)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 20),
    K=st.integers(1, 70),
    N=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**20),
    transposed=st.booleans(),
)
def test_linear_is_near_the_float_product(
    M: int, K: int, N: int, exponent: int, dtype: torch.dtype, seed: int, transposed: bool
) -> None:
    if dtype == torch.float16:
        exponent = exponent // 10
    x = (normal(K, M, seed=seed).t() if transposed else normal(M, K, seed=seed)) * 10.0**exponent
    x, w = x.to(dtype), normal(N, K, seed=seed + 1)
    q, scale = OPS.quantize_int8(x)
    weight_q, weight_scale = OPS.quantize_int8_weight(w)
    y = OPS.int8_linear(q, scale, weight_q, weight_scale, None, torch.float32)
    truth = x.double() @ w.double().t()
    # each operand is off by half a step at most: |dx| <= scale / 2, |dw| <= weight_scale / 2
    step_x, step_w = scale.double() / 2, weight_scale.double() / 2
    bound = step_x * w.double().abs().sum(-1) + x.double().abs().sum(-1, keepdim=True) * step_w + K * step_x * step_w
    assert y.shape == (M, N)
    assert bool(((y.double() - truth).abs() <= bound * (1 + 1e-5) + 1e-36).all())


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(1, 50),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    position=st.integers(0, 49),
    dtype=st.sampled_from(FLOATS),
    where=st.sampled_from(["input", "weight"]),
)
def test_what_is_no_number_stays_visible(K: int, bad: float, position: int, dtype: torch.dtype, where: str) -> None:
    x, w = normal(3, K, dtype=dtype), normal(5, K, seed=1, dtype=dtype)
    (x if where == "input" else w)[1, position % K] = bad
    for quantize, quantize_weight in (
        (OPS.quantize_int8, OPS.quantize_int8_weight),
        (lowered("quantize_int8"), lowered("quantize_int8_weight")),
    ):
        y = OPS.int8_linear(*quantize(x), *quantize_weight(w), None, torch.float32)
        row_or_column = y if where == "input" else y.t()
        assert bool(row_or_column[1].isnan().all())
        others = torch.cat([row_or_column[:1], row_or_column[2:]])
        assert bool(others.isfinite().all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_rows_give_exactly_the_bias(dtype: torch.dtype) -> None:
    x = normal(4, 30, dtype=dtype)
    x[2] = 0
    w, bias = normal(6, 30, seed=1, dtype=dtype), normal(6, seed=2, dtype=dtype)
    w[4] = 0
    q, scale = OPS.quantize_int8(x)
    weight_q, weight_scale = OPS.quantize_int8_weight(w)
    plain = OPS.int8_linear(q, scale, weight_q, weight_scale, None, torch.float32)
    assert torch.count_nonzero(plain[2]) == 0 and torch.count_nonzero(plain[:, 4]) == 0
    biased = OPS.int8_linear(q, scale, weight_q, weight_scale, bias, torch.float32)
    assert torch.equal(biased[2], bias.float()) and torch.equal(biased[:, 4], bias.float()[4].expand(4))


@settings(max_examples=40, deadline=None)
@given(
    amax=st.floats(2.0**-149, 2.0**127, width=32), sign=st.sampled_from([-1.0, 1.0]), K=st.integers(1, 40)
)  # fmt: skip
def test_the_largest_value_of_a_row_becomes_127_and_none_wraps(amax: float, sign: float, K: int) -> None:
    x = torch.linspace(-1, 1, K).unsqueeze(0) * amax
    x[0, 0] = sign * amax
    q, scale = OPS.quantize_int8(x)
    assert bool(scale.isfinite().all()) and bool((scale > 0).all())
    assert int(q.abs().max()) <= 127
    if amax > 1e-35:
        assert int(q[0, 0]) == sign * 127
    assert bool((q.sign() * x.sign() >= 0).all())


def test_sqnr_on_gaussian_data_is_that_of_eight_bits() -> None:
    x, w = normal(256, 1152), normal(384, 1152, seed=1)
    q, scale = OPS.quantize_int8(x)
    y = OPS.int8_linear(q, scale, *OPS.quantize_int8_weight(w), None, torch.float32)
    truth = x.double() @ w.double().t()
    sqnr = 10 * torch.log10(truth.square().sum() / (y - truth).square().sum())
    assert 38 < float(sqnr) < 46


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(2, 3), torch.ones(2, 1)), TypeError, "int8 by int8"),
        ((torch.zeros(2, 5, dtype=torch.int8), torch.ones(2, 1)), ValueError, "expected"),
        ((torch.zeros(2, 3, dtype=torch.int8), torch.ones(2)), ValueError, "scale has shape"),
        ((torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, 1).double()), TypeError, "float32"),
    ],
)
def test_wrong_operands_are_refused(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    weight = (torch.zeros(4, 3, dtype=torch.int8), torch.ones(4))
    with pytest.raises(error, match=message):
        OPS.int8_linear(*args, *weight, None, torch.float32)


def test_a_sum_that_could_overflow_is_refused() -> None:
    K = int8.MAX_K + 1
    q, w = torch.zeros(1, K, dtype=torch.int8), torch.zeros(1, K, dtype=torch.int8)
    with pytest.raises(ValueError, match="overflow"):
        OPS.int8_linear(q, torch.ones(1, 1), w, torch.ones(1), None, torch.float32)
    assert "overflow" in str(int8.supported("cpu", K, 1))
    full = torch.full((1, int8.MAX_K), 127, dtype=torch.int8)
    y = OPS.int8_linear(full, torch.ones(1, 1), -full, torch.ones(1), None, torch.float32)
    assert float(y) == float(torch.tensor(-127 * 127 * int8.MAX_K, dtype=torch.float32))


def test_wrong_types_are_refused_by_the_quantisers() -> None:
    with pytest.raises(TypeError, match="float64"):
        OPS.quantize_int8(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="scalar"):
        OPS.quantize_int8(torch.tensor(1.0))
    with pytest.raises(ValueError, match="2 dimensions"):
        OPS.quantize_int8_weight(torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("device", "K", "N", "reason"),
    [
        ("cpu", 33, 7, None),
        ("cuda", 64, 32, None),
        ("cuda", 60, 32, "divisible by 8"),
        ("cuda", 64, 30, "divisible by 8"),
        ("cpu", 0, 8, "empty"),
        ("meta", 64, 64, "no integer GEMM"),
    ],
)
def test_supported_says_why_not(device: str, K: int, N: int, reason: str | None) -> None:
    actual = int8.supported(device, K, N)
    assert actual is None if reason is None else reason in str(actual)


def test_inputs_are_left_alone() -> None:
    x, w = normal(3, 20), normal(4, 20)
    before = x.clone(), w.clone()
    OPS.int8_linear(*OPS.quantize_int8(x), *OPS.quantize_int8_weight(w), None, torch.float32)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])
