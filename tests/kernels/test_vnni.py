"""VNNI linears against the reference: integers exact, floats within the declared tolerance."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from ditc.kernels.formats.int8 import quantize_int8
from ditc.kernels.linear import TOLERANCE, quantized_linear_reference, vnni, weight_linear_reference
from ditc.kernels.linear.vnni import build

REASON = vnni.vnni_reason()
runs = pytest.mark.skipif(REASON is not None, reason=str(REASON))
OPS = torch.ops.ditc
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
M_K_N = st.tuples(st.integers(1, 70), st.integers(1, 150), st.integers(1, 110))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(N: int, K: int) -> tuple[list[Tensor], Tensor]:
    parts = quantize_int8(normal(N, K, seed=1))
    return parts, vnni.pack(*parts)


def reference(x: list[Tensor], weight: list[Tensor], bias: Tensor | None) -> Tensor:
    return quantized_linear_reference(x, weight, bias, None, None, "int8", torch.float32)


def poison(*shape: int) -> None:
    """Fills memory with NaN and frees it, so that what an op leaves unwritten is seen."""
    torch.full(shape, float("nan"))


def assert_close(actual: Tensor, wanted: Tensor, magnitude: Tensor | None = None) -> None:
    """NaN where NaN is wanted, else within the tolerance (of ``magnitude``: the size of what was added up)."""
    assert actual.shape == wanted.shape
    nan = wanted.isnan()
    assert torch.equal(actual.isnan(), nan)
    bound = TOLERANCE * (wanted if magnitude is None else magnitude).double().abs() + torch.finfo(torch.float32).tiny
    if actual.dtype != torch.float32:  # rounded once, perhaps from the other side of an edge
        bound = bound + wanted.double().abs() * torch.finfo(actual.dtype).eps + torch.finfo(actual.dtype).tiny
    error = (actual.double() - wanted.double()).abs()
    fine = (error <= bound) | (actual == wanted) | nan  # equal infinities, too
    assert bool(fine.all()), float((error - bound)[~fine].max())


@runs
@settings(deadline=None, max_examples=60)
@given(M_K_N, st.booleans(), st.booleans(), st.sampled_from(FLOATS))
def test_integers_are_exact(shape: tuple[int, int, int], floats: bool, biased: bool, dtype: torch.dtype) -> None:
    M, K, N = shape
    x, (weight, packed) = normal(M, K, dtype=dtype), weight_of(N, K)
    bias = normal(N, seed=2) if biased else None
    parts = quantize_int8(x)
    poison(M, N)
    y = vnni.linear(x, None, packed, N, bias) if floats else vnni.linear(*parts, packed, N, bias)
    assert torch.equal(y, reference(parts, weight, bias))


@runs
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 23),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from(("absent", "columns", "batch", "chunk", "last", "full")),
    st.sampled_from((None, *FLOATS)),
    st.sampled_from(FLOATS),
)
def test_epilogue(
    B: int, S: int, K: int, N: int, activation: str, gating: str, residual: torch.dtype | None, out: torch.dtype
) -> None:
    x, (weight, packed), bias = 3 * normal(B, S, K), weight_of(N, K), normal(N, seed=2)
    gate = {
        "absent": None,
        "columns": normal(N, seed=3),
        "batch": normal(B, 1, N, seed=3),
        "chunk": normal(B, 1, 3 * N, seed=3).chunk(3, dim=-1)[1],
        "last": normal(1, S, 1, seed=3),
        "full": normal(B, S, N, seed=3, dtype=torch.bfloat16),
    }[gating]
    added = None if residual is None else normal(B, S, 2 * N, seed=4, dtype=residual)[..., :N]
    poison(B, S, N)
    y = vnni.linear(x, None, packed, N, bias, activation, gate, added, out)
    before = reference(quantize_int8(x), weight, bias)
    wanted, magnitude = ACTIVATIONS[activation](before.double()), before.abs().double()
    if gate is not None:
        wanted, magnitude = wanted * gate, magnitude * gate.abs()
    if added is not None:
        wanted, magnitude = wanted + added, magnitude + added.abs()
    assert y.dtype == out and y.is_contiguous()
    assert_close(y, wanted.to(out), magnitude)


@runs
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_everywhere(activation: str) -> None:
    x = torch.cat([torch.linspace(-20, 20, 40_001), torch.tensor([0.0, 1e-30, -1e-30, 1e30, -1e30])]).reshape(-1, 1)
    # a product of one: row scales carry the value, so the activation sees each x
    ones, packed = torch.ones(len(x), 1, dtype=torch.int8), vnni.pack(torch.ones(1, 1, dtype=torch.int8), torch.ones(1))
    y = vnni.linear(ones, x, packed, 1, None, activation)
    assert_close(y, ACTIVATIONS[activation](x.double()).float(), x)


@runs
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 30),
    st.integers(1, 70),
    st.sampled_from([0.0, float("nan"), float("inf"), -float("inf"), 1e-42, 3e38]),
)
def test_unusual_rows(M: int, K: int, value: float) -> None:
    x, (weight, packed) = normal(M, K), weight_of(37, K)
    x[M // 2] = value
    x[-1, K // 2] = value
    parts = quantize_int8(x)
    poison(M, 37)
    assert_close(vnni.linear(x, None, packed, 37), reference(parts, weight, None))
    q, scale = vnni.linear_quantize(x, None, packed, 37)
    nan = scale.isnan()
    wanted = quantize_int8(reference(parts, weight, None))
    assert torch.equal(nan, wanted[1].isnan())
    assert torch.equal(scale[~nan], wanted[1][~nan]) and torch.equal(q[~nan[:, 0]], wanted[0][~nan[:, 0]])


@runs
def test_nan_of_a_weight_reaches_its_column_alone() -> None:
    w = normal(40, 20, seed=1)
    w[33, 7] = float("nan")
    parts = quantize_int8(w)
    assert vnni.linear(normal(5, 20), None, vnni.pack(*parts), 40).isnan().nonzero()[:, 1].unique().tolist() == [33]


@runs
@pytest.mark.parametrize("K", [515, 4608, 133_143])
def test_largest_sums(K: int) -> None:
    for sign in (1, -1):
        q, w = torch.full((13, K), 127, dtype=torch.int8), torch.full((33, K), sign * 127, dtype=torch.int8)
        y = vnni.linear(q, torch.ones(13, 1), vnni.pack(w, torch.ones(33)), 33)
        assert torch.equal(y, torch.full((13, 33), float(sign * 127 * 127 * K)))


@runs
def test_strides() -> None:
    weight, packed = weight_of(21, 18)
    for x in (normal(18, 7).t(), normal(7, 40)[:, 3:21], normal(4, 5, 18).transpose(0, 1), normal(14, 18)[::2]):
        assert torch.equal(vnni.linear(x, None, packed, 21), reference(quantize_int8(x), weight, None))
        q, scale = quantize_int8(x)
        strided = torch.empty(*q.shape, 2, dtype=torch.int8)[..., 0].copy_(q)
        assert torch.equal(vnni.linear(strided, scale, packed, 21), reference([q, scale], weight, None))
    single = torch.arange(-9, 9, dtype=torch.int8).as_strided((1, 18), (1, 1))
    assert torch.equal(
        vnni.linear(single, torch.ones(1, 1), packed, 21), reference([single, torch.ones(1, 1)], weight, None)
    )


@runs
@pytest.mark.parametrize(("M", "K", "N"), [(0, 8, 4), (3, 0, 4), (3, 8, 0), (1, 1, 1)])
def test_nothing_to_do(M: int, K: int, N: int) -> None:
    weight, packed = weight_of(N, K)
    x, bias = normal(M, K), normal(N, seed=2)
    wanted = reference(quantize_int8(x), weight, bias)
    assert torch.equal(vnni.linear(x, None, packed, N, bias), wanted)
    assert_close(vnni.weight_linear(x, *weight, bias), weight_linear_reference(x, weight, bias, "int8"), wanted)


@runs
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 15), st.integers(2, 90), st.sampled_from(("layer", "rms")), st.booleans(),
    st.sampled_from(FLOATS),
)  # fmt: skip
def test_norm(B: int, S: int, K: int, norm: str, affine: bool, dtype: torch.dtype) -> None:
    x, N = 2 * normal(B, S, K, dtype=dtype) + 1, 29
    parts, packed = weight_of(N, K)
    weight, bias = (normal(K, seed=5), normal(K, seed=6)) if affine else (None, None)
    multiplier, shift = normal(B, 1, K, seed=7), normal(B, 1, 2 * K, seed=8)[..., K:]
    wide = x.double()
    middle = wide.mean(-1, keepdim=True) if norm == "layer" else torch.zeros(())
    y = (wide - middle) * (((wide - middle) ** 2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    y = y if weight is None or bias is None else y * weight + bias
    y = (y * multiplier + shift).float()
    actual = vnni.norm_linear(x, norm, 1e-5, weight, bias, multiplier, shift, packed, N)
    q, scale = quantize_int8(y)
    # one value in a thousand may lie on the edge between two integers: no element may move by more than a few steps
    steps = scale * parts[1].t() * 127 * 2
    error = (actual - reference([q, scale], parts, None)).abs()
    assert bool((error <= steps + 1e-4 * y.norm(dim=-1, keepdim=True)).all())
    close = error <= 1e-5 * (y.norm(dim=-1, keepdim=True) + 1) * (parts[0].float() * parts[1]).norm(dim=-1)
    assert close.float().mean() > 0.8


@runs
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 70), st.booleans(), st.sampled_from(FLOATS))
def test_weight_only(M: int, K: int, N: int, biased: bool, dtype: torch.dtype) -> None:
    x, (weight, _) = normal(M, K, dtype=dtype), weight_of(N, K)
    bias = normal(N, seed=2) if biased else None
    wanted = weight_linear_reference(x, weight, bias, "int8")
    terms = x.double().abs() @ (weight[0].double() * weight[1]).abs().t() + (0 if bias is None else bias.abs())
    assert_close(vnni.weight_linear(x, *weight, bias), wanted, terms)


@runs
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    before = torch.get_num_threads()
    weight, packed = weight_of(500, 96)
    x = normal(100, 96)
    try:
        torch.set_num_threads(threads)
        y = vnni.linear(x, None, packed, 500)
        few = vnni.linear(x, None, vnni.pack(weight[0][:5], weight[1][:5]), 5)
    finally:
        torch.set_num_threads(before)
    wanted = reference(quantize_int8(x), weight, None)
    assert torch.equal(y, wanted) and torch.equal(few, wanted[:, :5])


@runs
def test_opcheck() -> None:
    x, (weight, packed), bias = normal(2, 5, 33), weight_of(7, 33), normal(7, seed=2)
    q, scale = quantize_int8(x)
    gate, residual = normal(2, 1, 7, seed=3), normal(2, 5, 7, seed=4)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.vnni_pack, tuple(weight)),
        (OPS.vnni_linear, (q, scale, packed, 7, bias, "gelu", gate, residual, torch.bfloat16)),
        (OPS.vnni_linear, (x, None, packed, 7)),
        (OPS.vnni_norm_linear, (x, "rms", 1e-5, None, None, None, None, packed, 7, bias)),
        (OPS.vnni_linear_quantize, (x, None, packed, 7, bias, "silu")),
        (OPS.vnni_weight_linear, (x, *weight, bias)),
    ]
    for op, args in cases:
        opcheck(op.default, args)


@runs
def test_compiles_into_one_graph() -> None:
    _, packed = weight_of(24, 33)

    def block(x: Tensor) -> Tensor:
        q, scale = OPS.vnni_linear_quantize(x * 2, None, packed, 24, None, "gelu")
        return OPS.vnni_linear(x + x, None, packed, 24).t() + q.sum() * scale.sum()

    x = normal(6, 33)
    assert torch.allclose(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-5)


@runs
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x, w, p: vnni.linear(x, None, p, 40), ValueError),
        (lambda x, w, p: vnni.linear(x[:, :9], None, p, 24), ValueError),
        (lambda x, w, p: vnni.linear(x, None, p, 24, torch.ones(3)), ValueError),
        (lambda x, w, p: vnni.linear(x, None, p, 24, None, "mish"), ValueError),
        (lambda x, w, p: vnni.linear(x.double(), None, p, 24), TypeError),
        (lambda x, w, p: vnni.linear(x, torch.ones(6, 1), p, 24), ValueError),
        (lambda x, w, p: vnni.linear(x.to(torch.int8), None, p, 24), ValueError),
        (lambda x, w, p: vnni.linear(x, None, p, 24, None, "none", None, torch.ones(6, 23)), ValueError),
        (lambda x, w, p: vnni.linear(x, None, p, 24, None, "none", torch.ones(2, 6, 24)), ValueError),
        (lambda x, w, p: vnni.norm_linear(x, "group", 1e-5, None, None, None, None, p, 24), ValueError),
        (lambda x, w, p: vnni.pack(w[0], w[1][:3]), ValueError),
        (lambda x, w, p: vnni.weight_linear(x, w[0].float(), w[1]), TypeError),
    ],
)
def test_refusals(call: Callable[..., Any], error: type[Exception]) -> None:
    weight, packed = weight_of(24, 33)
    with pytest.raises(error):
        call(normal(6, 33), weight, packed)


@pytest.fixture
def fresh() -> Any:
    build.vnni_reason.cache_clear()
    yield
    build.vnni_reason.cache_clear()


def test_reason_names_what_is_missing(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "arm64")
    assert "arm64" in str(vnni.vnni_reason())
    build.vnni_reason.cache_clear()
    monkeypatch.undo()
    if build._machine_reason() is not None:
        pytest.skip(str(build._machine_reason()))
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert "no C++ compiler" in str(vnni.vnni_reason())
    build.vnni_reason.cache_clear()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'error: broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert "error: broken" in str(vnni.vnni_reason())
    assert not list(tmp_path.rglob("*.so"))
    assert subprocess.run([broken], check=False, capture_output=True).returncode == 1
