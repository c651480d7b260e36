"""Softmax weights rounded inside kernels: bit for bit as the op's meaning rounds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")
import triton
import triton.language as tl

from ditc.kernels.attention.quantized import round_weights
from ditc.kernels.attention.triton_weights import fp8_weights, nvfp4_weights
from ditc.kernels.formats.nvfp4 import scaled_elements

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy on infinities

FULL = {"fp8": 448.0, "nvfp4": 2688.0}
ROWS, KEYS = 64, 64


@triton.jit
def fp8_kernel(weights, operands, values, R: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr):
    at = tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]
    operand, value = fp8_weights(tl.load(weights + at), FP8)
    tl.store(values + at, value)
    if FP8 == "decode":
        tl.store(operands + at, operand)
    else:
        tl.store(operands + at, operand.to(tl.uint8, bitcast=True))


@triton.jit
def nvfp4_kernel(
    weights, operands, scales, values, R: tl.constexpr, N: tl.constexpr, NATIVE: tl.constexpr, CAST: tl.constexpr
):
    row = tl.arange(0, R)[:, None]
    at = row * N + tl.arange(0, N)[None, :]
    operand, scale, value = nvfp4_weights(tl.load(weights + at), NATIVE, CAST)
    tl.store(values + at, value)
    if NATIVE:
        tl.store(operands + row * (N // 2) + tl.arange(0, N // 2)[None, :], operand)
        tl.store(scales + row * (N // 16) + tl.arange(0, N // 16)[None, :], scale.to(tl.uint8, bitcast=True))
    else:
        tl.store(operands + at, operand)


def samples(device: str) -> Tensor:
    """Weights of every size up to one, ties between codes, zeros, blocks of zeros and NaN."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(ROWS, KEYS, generator=generator) * torch.randn(ROWS, 1, generator=generator).mul(4).exp()
    weights[:8] = (torch.rand(8, KEYS, generator=generator) * 30).neg().exp()
    ties = torch.arange(KEYS * 8, dtype=torch.float32).reshape(8, KEYS) / 2**9
    weights[8:16], weights[16, :32], weights[17] = ties, 0.0, 0.0
    weights[18, 3], weights[19] = torch.nan, torch.nan
    weights[:, 0] = torch.where(weights[:, 0].isnan(), torch.nan, 1.0)
    return weights.clamp(max=1.0).to(device)


@pytest.mark.parametrize("fp8", ["encode", "decode", "cast"])
def test_fp8_weights(device: str, fp8: str) -> None:
    if fp8 == "cast" and (device == "cpu" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("the interpreter's casts are wrong, and hardware before sm_89 has none")
    weights = samples(device)
    expected = round_weights(weights, "fp8") * 448
    values = torch.empty_like(weights)
    operands = torch.empty(ROWS, KEYS, dtype=torch.float16 if fp8 == "decode" else torch.uint8, device=device)
    fp8_kernel[(1,)](weights * 448, operands, values, ROWS, KEYS, fp8)
    torch.testing.assert_close(values, expected, rtol=1e-7, atol=0, equal_nan=True)
    read = operands.float() if fp8 == "decode" else operands.view(torch.float8_e4m3fn).float()
    number = ~expected.isnan()
    assert torch.equal(read[number], values[number]) and bool(values[18, 3].isnan())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_nvfp4_weights(device: str, native: bool, cast: bool) -> None:
    if cast and (device == "cpu" or torch.cuda.get_device_capability() < (10 if native else 8, 0 if native else 9)):
        pytest.skip("the interpreter's casts are wrong, and this hardware has none")
    weights = samples(device)
    expected = round_weights(weights, "nvfp4") * 2688
    values = torch.empty_like(weights)
    operands = torch.empty(ROWS, KEYS // 2 if native else KEYS, dtype=torch.uint8 if native else torch.float16)
    operands, scales = operands.to(device), torch.empty(ROWS, KEYS // 16, dtype=torch.uint8, device=device)
    nvfp4_kernel[(1,)](weights * 2688, operands, scales, values, ROWS, KEYS, native, cast)
    number = ~expected.isnan()
    # where a weight over its scale lies within rounding of a tie, the reciprocal may fall to its other side
    apart = ((values - expected).abs() > 1e-6 * expected)[number]
    assert int(apart.sum()) <= 2 and bool(values[18, 3].isnan() and values[19].isnan().all())
    read = scaled_elements(operands, scales.view(torch.float8_e4m3fn)) if native else operands.float()
    clean = number.unflatten(1, (-1, 16)).all(-1, keepdim=True).expand(ROWS, -1, 16).flatten(1)
    assert torch.equal(read[clean], values[clean])
