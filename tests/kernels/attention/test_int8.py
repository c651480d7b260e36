"""INT8 attention against exact attention and against its own meaning in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from ditc.kernels.attention import TOLERANCE, attention_int8, attention_int8_reference, attention_reason

REASON = attention_reason()
runs = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 300), st.integers(1, 100))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(B: int, H: int, Lq: int, Lk: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(B, L, H, D, seed=i, dtype=dtype).transpose(1, 2) for i, L in enumerate((Lq, Lk, Lk))]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weights = (q.double() @ k.double().transpose(-1, -2) * scale).softmax(-1)
    return weights @ v.double()


def poison(*shape: int) -> None:
    """Fills memory with NaN and frees it, so that what an op leaves unwritten is seen."""
    torch.full(shape, float("nan"))


def error(actual: Tensor, wanted: Tensor, v: Tensor) -> float:
    """Relative to the output, or, where values cancel, to what a mean of that many values would be."""
    least = v.double().norm() / v.shape[-2] * wanted.shape[-2] ** 0.5
    return float((actual.double() - wanted).norm() / torch.maximum(wanted.norm(), least))


@runs
@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from(FLOATS), st.floats(0.01, 1.0), st.sampled_from([1e-18, 1.0, 100.0]))
def test_is_its_meaning(shape: tuple[int, int, int, int, int], dtype: torch.dtype, factor: float, size: float) -> None:
    size = size if dtype == torch.float32 else 1.0
    q, k, v = operands(*shape, dtype)
    v = v * size
    scale = factor * (-1) ** shape[2] * shape[-1] ** -0.5
    poison(*q.shape)
    y = attention_int8(q, k, v, scale)
    wanted = attention_int8_reference(q, k, v, scale)
    assert y.dtype == dtype and y.shape == q.shape and y.stride() == wanted.stride()
    # a value between two integers may go to either side
    rounding = 3e-3 if dtype == torch.float32 else 1e-2
    assert error(y, wanted.double(), v) < rounding
    # TOLERANCE is of many numbers together, a single one scatters more
    assert error(y, exact(q, k, v, scale), v) < (TOLERANCE if y.numel() > 1000 else 2 * TOLERANCE) + rounding


@runs
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 4, 256, 256, 72), (2, 2, 300, 77, 40), (1, 2, 100, 1000, 64), (1, 1, 64, 64, 256)]
)
def test_signal_to_noise(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    q, k, v = operands(*shape, dtype)
    wanted = exact(q, k, v, shape[-1] ** -0.5)
    y = attention_int8(q, k, v, shape[-1] ** -0.5).double()
    assert -20 * torch.log10((y - wanted).norm() / wanted.norm()) > 34
    assert 0.998 < y.norm() / wanted.norm() < 1.002


@runs
@pytest.mark.parametrize("deviation", [0.3, 2.0, 4.0, 8.0])
def test_flat_and_peaked_rows(deviation: float) -> None:
    q, k, v = operands(1, 2, 256, 1024, 64)
    scale = deviation / 8
    wanted, y = exact(q, k, v, scale), attention_int8(q, k, v, scale).double()
    assert -20 * torch.log10((y - wanted).norm() / wanted.norm()) > 28
    assert 0.99 < y.norm() / wanted.norm() < 1.02


@runs
@settings(deadline=None, max_examples=40)
@given(SHAPES, st.floats(0, 20))
def test_values_of_one_give_one(shape: tuple[int, int, int, int, int], scale: float) -> None:
    q, k, v = operands(*shape)
    y = attention_int8(q, k, torch.ones_like(v), scale)
    assert float((y - 1).abs().max()) < 2e-6


@runs
def test_a_channel_of_keys_far_from_zero_costs_nothing() -> None:
    q, k, v = operands(1, 2, 64, 200, 64)
    shifted = k + 100 * (torch.arange(64) == 5)
    wanted = exact(q, shifted, v, 0.125)
    assert error(attention_int8(q, shifted, v, 0.125), wanted, v) < TOLERANCE


@runs
def test_layouts_do_not_matter() -> None:
    q, k, v = operands(2, 3, 20, 30, 24)
    wanted = attention_int8(q, k, v, 0.2)
    packed = torch.cat([t.transpose(1, 2) for t in (k, v)], -1).transpose(1, 2)
    assert torch.equal(attention_int8(q.contiguous(), packed[..., :24], packed[..., 24:], 0.2), wanted)
    columns = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert columns.stride(-1) != 1 and torch.equal(attention_int8(q, columns, v, 0.2), wanted)
    one = k[:, :, :1].expand(-1, -1, 30, -1)
    assert torch.equal(attention_int8(q, one, v, 0.2), attention_int8(q, one.contiguous(), v, 0.2))
    assert wanted.transpose(1, 2).flatten(2).data_ptr() == wanted.data_ptr()


@runs
def test_zeros_and_equal_scores() -> None:
    q, k, v = operands(1, 2, 13, 270, 72)
    nothing = torch.zeros_like(k)
    assert torch.equal(attention_int8(q, k, nothing, 1.0), torch.zeros_like(q))
    mean = v.mean(-2, keepdim=True).expand_as(q)
    for queries, keys in ((torch.zeros_like(q), k), (q, nothing), (q, k[:, :, :1].expand_as(k))):
        assert torch.allclose(attention_int8(queries, keys, v, 1.0), mean, atol=2e-3)


@runs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_visible(bad: float) -> None:
    q, k, v = operands(2, 2, 30, 270, 24)
    for operand, where in ((q, (1, 0, 17, 3)), (k, (1, 0, 260, 3)), (v, (1, 0, 260, 3))):
        changed = operand.clone()
        changed[where] = bad
        y = attention_int8(*(changed if t is operand else t for t in (q, k, v)), 0.2)
        wanted = torch.zeros_like(y, dtype=torch.bool)
        wanted[(1, 0, 17) if operand is q else (1, 0) if operand is k else (1, 0, slice(None), 3)] = True
        assert torch.equal(y.isnan(), wanted)


@runs
@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e18, 1e30, 3e38])
def test_extreme_sizes(size: float) -> None:
    q, k, v = operands(1, 1, 14, 40, 24)
    big = v / v.abs().max() * size
    assert error(attention_int8(q, k, big, 0.2) / size, exact(q, k, big, 0.2) / size, big / size) < 2 * TOLERANCE
    y = attention_int8(q * min(size, 1e30), k * min(size, 1e30), v, 0.2)
    # finite scores give a mean of values, scores beyond float32 are NaN as they are in torch
    assert bool((y.isnan() | (y.abs() <= v.abs().max() * 1.01)).all())
    assert not y.isnan().any() or size > 1e17


@runs
def test_threads() -> None:
    before, (q, k, v) = torch.get_num_threads(), operands(2, 3, 50, 300, 40)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attention_int8(q, k, v, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@runs
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype: torch.dtype) -> None:
    opcheck(torch.ops.ditc.attention_int8.default, (*operands(2, 3, 5, 9, 12, dtype), 0.3))


@runs
def test_no_queries() -> None:
    q, k, v = operands(1, 2, 4, 9, 12)
    assert attention_int8(q[:, :, :0], k, v, 1.0).shape == (1, 2, 0, 12)


@runs
def test_compiles_into_one_graph() -> None:
    q, k, v = operands(1, 2, 20, 30, 24)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_int8(q * 2, k, v, 0.1).transpose(1, 2).flatten(2) + 1

    assert torch.allclose(torch.compile(block, fullgraph=True)(q, k, v), block(q, k, v), rtol=1e-5)
    native = F.scaled_dot_product_attention(q * 2, k, v, scale=0.1).transpose(1, 2).flatten(2) + 1
    assert torch.allclose(block(q, k, v), native, atol=0.05)


@runs
@pytest.mark.parametrize(
    ("call", "refusal"),
    [
        (lambda q, k, v: attention_int8(q[0], k, v, 1.0), ValueError),
        (lambda q, k, v: attention_int8(q[:, :1], k, v, 1.0), ValueError),
        (lambda q, k, v: attention_int8(q, k[:, :0], v[:, :0], 1.0), ValueError),
        (lambda q, k, v: attention_int8(q, k, v, 1.0, torch.ones(5, 8)), ValueError),
        (lambda q, k, v: attention_int8(q, k, v, 1.0, torch.ones(1, 1, 2, 5, 9)), ValueError),
        (lambda q, k, v: attention_int8(q, k, v, 1.0, torch.ones(5, 9, dtype=torch.int8)), TypeError),
        (lambda q, k, v: attention_int8(q, k, v, 1.0, blocks=torch.ones(1, 2, 1, 1)), TypeError),
        (lambda q, k, v: attention_int8(q, k, v, 1.0, blocks=torch.ones(1, 1, 1, 1, dtype=torch.bool)), ValueError),
        (lambda q, k, v: attention_int8(q, k, v, 1.0, window=-2), ValueError),
        (lambda q, k, v: attention_int8(q, k, v, 1.0, window=3), ValueError),
        (lambda q, k, v: attention_int8(q, k, v[:, :, 1:], 1.0), ValueError),
        (lambda q, k, v: attention_int8(q, k[:, :, :0], v[:, :, :0], 1.0), ValueError),
        (lambda q, k, v: attention_int8(*(t.repeat(1, 1, 1, 30) for t in (q, k, v)), 1.0), ValueError),
        (lambda q, k, v: attention_int8(q.double(), k.double(), v.double(), 1.0), TypeError),
        (lambda q, k, v: attention_int8(q.half(), k, v, 1.0), TypeError),
    ],
)
def test_refusals(call: Callable[..., Any], refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        call(*operands(1, 2, 5, 9, 12))
