"""The smoothing kernels in Triton against their meaning in plain torch.

Norms and means add up in an order of their own, so a value near a tie may get the neighbouring code. What is asserted:
means, outer scales and products agree to float32's rounding; few block scales differ, by one step; where a row's scales
agree, few of its codes differ, by one step.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditc.kernels.formats import e2m1
from ditc.kernels.smooth.op import smooth_keys_reference, smooth_queries_reference
from ditc.kernels.smooth.triton import smooth_keys_triton, smooth_queries_triton

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy on infinities
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Heads = tuple[int, int, int]


def tokens(shape: tuple[int, int, int, int], kind: str, layout: str, dtype: torch.dtype, pieces: int) -> list[Tensor]:
    """``[B, H, L, D]`` in one or two pieces, as a projection leaves them."""
    B, H, L, D = shape
    x = torch.randn(B, L, H, D) + torch.randn(D)
    if kind == "outliers":
        x[..., D // 2] *= 50
    elif kind == "zeros":
        x[:, :, -1] = 0
        x[:, L // 2] = 0
    elif kind == "bad":
        x[0, L // 2, 0, D // 3] = torch.nan
        x[-1, L - 1, -1, 0] = torch.inf
    elif kind == "tiny":
        x *= 1e-4
    if layout == "part":  # of one product that makes queries, keys and values
        wide = torch.randn(B, L, 3 * H * D).to(dtype)
        wide[..., H * D : 2 * H * D] = x.flatten(2).to(dtype)
        x = wide[..., H * D : 2 * H * D].unflatten(-1, (H, D))
    elif layout == "columns":
        x = x.to(dtype).transpose(1, 3).contiguous().transpose(1, 3)
    x = x.to(dtype).transpose(1, 2)
    return [x] if pieces == 1 or L == 1 else [x[:, :, : L // 3 + 1].clone(), x[:, :, L // 3 + 1 :]]


def described(shape: tuple[int, int, int, int], norm: str, own: str, rope: str, pieces: int) -> tuple[Any, ...]:
    """Norm and tables for ``shape``."""
    B, H, L, D = shape
    weight = [torch.rand(D) + 0.5 for _ in range(pieces)] if norm != "none" and own != "none" else []
    bias = [torch.randn(D) for _ in range(pieces)] if weight and own == "both" else []
    sizes = {"none": None, "pairs": (1, 1), "halves": (1, 1), "each sample": (B, 1), "each head": (1, H)}[rope]
    tables = [] if sizes is None else [torch.randn(*sizes, L, D) for _ in range(2)]
    distance = max(1, D // 2) if rope in ("halves", "each head") else 1
    return norm, 1e-6, weight, bias, tables, distance


def codes(packed: Tensor) -> Tensor:
    """Codes as integers that are ordered as their values are."""
    bits = e2m1.unpack(packed.cpu())
    magnitude = (bits & 7).int()
    return torch.where((bits & 8) != 0, -magnitude, magnitude)


def assert_near(actual: list[Tensor], expected: list[Tensor], slack: Tensor) -> None:
    """Parts and what comes last, which may differ by ``slack``."""
    actual = [part.cpu() for part in actual]
    assert [(part.shape, part.dtype) for part in actual] == [(part.shape, part.dtype) for part in expected]
    (q, scale, outer, last), (want_q, want_scale, want_outer, want_last) = actual, expected
    assert bool((((last - want_last).abs() <= slack) | ~(last.isfinite() | want_last.isfinite())).all())
    torch.testing.assert_close(outer, want_outer, rtol=1e-5, atol=0, equal_nan=True)
    good = want_outer.isfinite().squeeze(-1)
    apart = (scale.view(torch.uint8).int() - want_scale.view(torch.uint8).int()).abs()[good]
    assert int(apart.amax() if apart.numel() else 0) <= 1 and int(apart.count_nonzero()) <= 1 + apart.numel() // 50
    same = good & (scale.view(torch.uint8) == want_scale.view(torch.uint8)).all(-1)
    apart = (codes(q) - codes(want_q)).abs()[same]
    assert int(apart.amax() if apart.numel() else 0) <= 1 and int(apart.count_nonzero()) <= 2 + apart.numel() // 50


@settings(max_examples=14, deadline=None)
@given(
    heads=st.sampled_from([(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 4, 2)]),
    Lq=st.one_of(st.integers(1, 40), st.integers(120, 140)),
    Lk=st.one_of(st.integers(1, 40), st.integers(60, 100)),
    D=st.sampled_from([40, 64, 72, 100, 128, 256]),
    kind=st.sampled_from(["normal", "outliers", "zeros", "bad", "tiny"]),
    layout=st.sampled_from(["plain", "part", "columns"]),
    dtype=st.sampled_from(FLOATS),
    norm=st.sampled_from(["none", "rms", "layer"]),
    own=st.sampled_from(["none", "weight", "both"]),
    rope=st.sampled_from(["none", "pairs", "halves", "each sample", "each head"]),
    pieces=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_queries_and_keys(
    device: str, heads: Heads, Lq: int, Lk: int, D: int, kind: str, layout: str, dtype: torch.dtype, norm: str,
    own: str, rope: str, pieces: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    B, H, G = heads
    means, largest = torch.zeros(0), torch.zeros(0)
    for keys, shape in ((False, (B, H, Lq, D)), (True, (B, G, Lk, D))):
        x = tokens(shape, kind, layout, dtype, pieces)
        given = (x, *described(shape, norm, own, rope, len(x)))
        there = [[t.to(device) for t in arg] if isinstance(arg, list) else arg for arg in given]
        if not keys:
            expected = smooth_queries_reference(*given)
            means = expected[3]
            largest = means.abs().amax()
            assert_near(smooth_queries_triton(*there), expected, 2e-6 * (1 + largest) * (1 + D**0.5))
        else:
            expected = smooth_keys_reference(*given, means)
            wide = expected[3].abs().nan_to_num(0.0, 0.0, 0.0).amax()
            size = means.abs().amax() * (1 + expected[2].nan_to_num(0.0).amax() * 2688)
            actual = smooth_keys_triton(*there, means.to(device))
            assert_near(actual, expected, 1e-5 * (wide + size * D**0.5))


def test_tokens_that_are_not_there_are_not_written(device: str) -> None:
    means = torch.zeros(1, 1, 1, 64, device=device)
    x = [torch.ones(1, 1, 0, 64, device=device)]
    parts = smooth_queries_triton(x, "none", 0.0, [], [], [], 1)
    assert [tuple(part.shape) for part in parts] == [(1, 1, 0, 32), (1, 1, 0, 4), (1, 1, 0, 1), (1, 1, 0, 64)]
    assert smooth_keys_triton(x, "none", 0.0, [], [], [], 1, means)[3].shape == (1, 1, 1, 0)


def test_large_heads_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="heads of 264 features"):
        smooth_queries_triton([torch.ones(1, 1, 1, 264, device=device)], "none", 0.0, [], [], [], 1)
