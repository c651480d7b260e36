"""The weight-only GEMM in Triton against float64 on the dequantised weight."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditc.kernels.formats import FORMATS, format_of
from ditc.kernels.linear.triton_weight import weight_linear_triton

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy on infinities

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
"""How much rounding to a type may change a result; the interpreter cuts bfloat16 off."""


def check(x: Tensor, weight: list[Tensor], bias: Tensor | None, format: str) -> Tensor:
    """Runs the kernel, compares, and returns the result."""
    actual = weight_linear_triton(x, weight, bias, format)
    a, b = x.double(), format_of(format).dequantize(weight).double()
    y, size = a @ b.t(), a.abs() @ b.abs().t()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    assert actual.dtype == x.dtype and actual.shape == y.shape and actual.is_contiguous()
    limit = (1e-6 if x.is_cpu else 1e-5) * size + STEP[x.dtype] * y.abs() + torch.finfo(x.dtype).tiny
    error = (actual.double() - y).abs()
    assert bool((error <= limit).all()), float((error / limit).max())
    return actual


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=30, deadline=None)
@given(
    M=st.one_of(st.integers(1, 20), st.integers(60, 140)), N=st.integers(1, 150), blocks=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS), has_bias=st.booleans(), strided=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    device: str, format: str, M: int, N: int, blocks: int, dtype: torch.dtype, has_bias: bool, strided: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = format_of(format)
    K = blocks * (found.block or 29)
    x = torch.randn(M, K, generator=generator).to(device, dtype)
    # every row of the weight of another size, so that scales matter
    sizes = torch.randn(N, 1, generator=generator).exp()
    weight = found.quantize((torch.randn(N, K, generator=generator) * sizes).to(device))
    bias = torch.randn(N, generator=generator).to(device, dtype) if has_bias else None
    x = x.t().contiguous().t() if strided else x
    weight = [part.repeat_interleave(2, dim=0)[::2] for part in weight] if strided else weight
    check(x, weight, bias, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("leading", [(), (1,), (2, 1), (2, 0, 3), (3, 2, 2)])
def test_leading_dimensions(device: str, format: str, leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*leading, 64, generator=generator).to(device)
    weight = format_of(format).quantize(torch.randn(5, 64, generator=generator).to(device))
    check(x, weight, torch.randn(5, generator=generator).to(device), format)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_number_stays_in_its_row_and_column(device: str, format: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, w = torch.randn(18, 96, generator=generator).to(device), torch.randn(70, 96, generator=generator).to(device)
    clean = weight_linear_triton(x, format_of(format).quantize(w), None, format)
    x[3, 40], w[66, 95] = torch.nan, -torch.inf
    actual = weight_linear_triton(x, format_of(format).quantize(w), None, format)
    lost = torch.zeros(18, 70, dtype=torch.bool, device=device)
    lost[3], lost[:, 66] = True, True
    assert torch.equal(actual.isnan(), lost)
    assert torch.equal(actual[~lost], clean[~lost])


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_give_exactly_the_bias(device: str, format: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(4, 64, generator=generator).to(device), torch.randn(33, 64, generator=generator).to(device)
    x[2], w[30] = 0, 0
    bias = torch.randn(33, generator=generator).to(device)
    y = weight_linear_triton(x, format_of(format).quantize(w), bias, format)
    assert torch.equal(y[2], bias) and torch.equal(y[:, 30], bias[30].expand(4))


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("exponent", [-90, -30, 30, 90])
def test_mx_exponents_that_float16_has_not(device: str, format: str, exponent: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = format_of(format).quantize(torch.randn(34, 64, generator=generator).to(device))
    weight[1] = (weight[1].int() + exponent).byte()
    ordinary = torch.randn(5, 64, generator=generator).to(device)
    check(ordinary * 2.0**-exponent, weight, None, format)
    if exponent < 0:  # the products of float16 values are small, and so are their sums in float32
        y = weight_linear_triton(ordinary.half(), weight, torch.full((34,), 1.0, device=device), format)
        assert torch.equal(y, torch.ones_like(y))
    check(ordinary.bfloat16(), weight, None, format)


def test_nvfp4_weights_as_checkpoints_hold_them(device: str) -> None:
    """One outer scale for the tensor, repeated without memory."""
    generator = torch.Generator().manual_seed(5)
    codes, scale, outer = format_of("nvfp4").quantize(
        torch.randn(20, 48, generator=generator).to(device), granularity="tensor"
    )
    x = torch.randn(3, 48, generator=generator).to(device, torch.float16)
    check(x, [codes, scale, outer[:1].expand(20, 1)], None, "nvfp4")


def test_empty_sums(device: str) -> None:
    weight = [torch.zeros(5, 0, dtype=torch.int8, device=device), torch.ones(5, 1, device=device)]
    bias = torch.arange(5.0, device=device)
    assert torch.equal(weight_linear_triton(torch.zeros(3, 0, device=device), weight, bias, "int8"), bias.expand(3, 5))
