"""Decompositions of ATen ops for CPU, against the ops themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.kernels import aten

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 67),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 30.0, 1e4]),
    form=st.sampled_from(["tanh", "none"]),
    dtype=st.sampled_from(FLOATS),
)
def test_gelu_is_gelu(n: int, scale: float, form: str, dtype: torch.dtype) -> None:
    x = (torch.randn(3, n) * scale).to(dtype)
    expected = torch.nn.functional.gelu(x.double(), approximate=form).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        aten.gelu(x, form), expected, rtol=2 * max(eps, 1e-6), atol=max(eps, 1e-7) * min(scale, 1)
    )


@pytest.mark.parametrize("form", ["tanh", "none"])
def test_gelu_keeps_nan_and_the_limits(form: str) -> None:
    y = aten.gelu(torch.tensor([float("nan"), 1e30, 100.0, -100.0, 0.0]), form)
    assert y[0].isnan() and y[1] == 1e30 and y[2] == 100 and y[3] == 0 and y[4] == 0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    K=st.integers(2, 130),
    offset=st.sampled_from([0.0, 1e3, -1e4]),
    affine=st.booleans(),
    dtype=st.sampled_from(FLOATS[:2]),
)
def test_layer_norm_is_layer_norm(rows: int, K: int, offset: float, affine: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(2, rows, K) + offset).to(dtype)
    weight, bias = (torch.randn(K).to(dtype), torch.randn(K).to(dtype)) if affine else (None, None)
    y, mean, rstd = aten.layer_norm(x, [K], weight, bias, 1e-6)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    truth = torch.nn.functional.layer_norm(x.double(), [K], *wide, eps=1e-6)
    # fp32 rounds the mean to the size of the largest value, and the norm divides that error by the deviation
    centred = x.double() - x.double().mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    error = torch.finfo(torch.float32).eps * 4 * (x.double().abs().amax(-1, keepdim=True) / deviation).clamp(min=1)
    if weight is not None:
        error = error * weight.double().abs().clamp(min=1)
    assert ((y.double() - truth).abs() <= error + torch.finfo(dtype).eps * (1 + truth.abs())).all()
    expected = torch.native_layer_norm(x, [K], weight, bias, 1e-6)
    assert [t.shape for t in (y, mean, rstd)] == [t.shape for t in expected]
    assert [t.dtype for t in (y, mean, rstd)] == [t.dtype for t in expected]


def test_other_devices_keep_inductors_own() -> None:
    assert aten.lowerings("cuda") == {}
    assert set(aten.lowerings("cpu")) == {torch.ops.aten.gelu.default, torch.ops.aten.native_layer_norm.default}
