"""Decoding inside kernels: every code of every format, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")
import triton
import triton.language as tl

from ditc.kernels.formats import format_of
from ditc.kernels.formats.triton_decode import decode_tile, e2m1_to_f16, e4m3_to_f32, e8m0_to_f32

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy on infinities


@triton.jit
def elements_kernel(bytes_, e2m1, e4m3, e8m0):
    i = tl.arange(0, 256)
    code = tl.load(bytes_ + i)
    tl.store(e2m1 + i, e2m1_to_f16(code & 15).to(tl.float32))
    tl.store(e4m3 + i, e4m3_to_f32(code))
    tl.store(e8m0 + i, e8m0_to_f32(code))


@triton.jit
def tile_kernel(
    codes, scales, out, R: tl.constexpr, C: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, R)[:, None]
    codes_RC = tl.load(codes + rows * C + tl.arange(0, C)[None, :])
    scales_RG = tl.load(scales + rows * G + tl.arange(0, G)[None, :])
    values_RK = decode_tile(codes_RC, scales_RG, FORMAT, DTYPE)
    tl.store(out + rows * K + tl.arange(0, K)[None, :], values_RK.to(tl.float32))


def same(actual: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but that any NaN is as good as another."""
    nan = expected.isnan()
    bits = actual.view(torch.int32)[~nan], expected.view(torch.int32)[~nan]
    return torch.equal(actual.isnan(), nan) and torch.equal(*bits)


def test_all_codes_of_all_elements(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    e2m1, e4m3, e8m0 = (torch.full((256,), torch.nan, device=device) for _ in range(3))
    elements_kernel[(1,)](codes, e2m1, e4m3, e8m0)
    halves = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    assert same(e2m1, torch.cat([halves, -halves]).repeat(16))
    assert same(e4m3, codes.view(torch.float8_e4m3fn).float())
    assert same(e8m0, codes.view(torch.float8_e8m0fnu).float())
    assert float(e8m0[0]) == 2.0**-127 and bool(e8m0[255].isnan())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_all_products_of_nvfp4_are_exact_in_float16(device: str, dtype: str) -> None:
    scales = torch.arange(256, dtype=torch.uint8, device=device).reshape(64, 4)
    codes = (torch.arange(16, dtype=torch.uint8, device=device) * 16 + torch.arange(16, device=device).flip(0)).byte()
    codes = codes.repeat(64, 2).contiguous()  # blocks of 8 bytes: each scale meets half of the codes, in either nibble
    codes[::2] = codes[::2].roll(8, dims=1)
    out = torch.full((64, 64), torch.nan, device=device)
    tile_kernel[(1,)](codes, scales, out, 64, 32, 4, 64, "nvfp4", getattr(tl, dtype))
    ones = torch.ones(64, 1, device=device)
    assert same(out, format_of("nvfp4").dequantize([codes, scales.view(torch.float8_e4m3fn), ones]))


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8"])
def test_all_scales_of_mx_formats_are_exact_in_float32(device: str, format: str) -> None:
    scales = torch.arange(256, dtype=torch.uint8, device=device).reshape(64, 4)
    C = 64 if format == "mxfp4" else 128
    codes = (torch.arange(64 * C, device=device) % 251).to(torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes).reshape(64, C).contiguous()
    codes = codes.view(torch.float8_e4m3fn) if format == "mxfp8" else codes
    out = torch.full((64, 128), torch.nan, device=device)
    tile_kernel[(1,)](codes, scales, out, 64, C, 4, 128, format, tl.float32)
    assert same(out, format_of(format).dequantize([codes, scales]))
