"""The encoders of Triton kernels against plain torch, on every exponent, sign and kind of mantissa."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import torch
import triton
import triton.language as tl

from ditc.kernels.formats import e2m1, e8m0
from ditc.kernels.formats.triton_encode import (
    e8m0_of_amax,
    e8m0_reciprocal,
    f32_to_e2m1,
    f32_to_e4m3,
    f32_to_int8,
    magnitude_bits,
    normal_e4m3_to_f32,
)

pytestmark = pytest.mark.interpreter
BLOCK = 4096


@triton.jit
def encode_kernel(x_ptr, e2m1_ptr, e4m3_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(e2m1_ptr + at, f32_to_e2m1(x).to(tl.uint8), mask=at < n)
    tl.store(e4m3_ptr + at, f32_to_e4m3(x).to(tl.uint8), mask=at < n)


@triton.jit
def int8_kernel(x_ptr, q_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(q_ptr + at, f32_to_int8(tl.load(x_ptr + at, mask=at < n, other=0.0)), mask=at < n)


@triton.jit
def e4m3_kernel(byte_ptr, value_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(byte_ptr + at, mask=at < n, other=0).to(tl.int32)
    tl.store(value_ptr + at, normal_e4m3_to_f32(byte), mask=at < n)


@triton.jit
def e8m0_kernel(amax_ptr, byte_ptr, reciprocal_ptr, n, LARGEST: tl.constexpr, RCEIL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    amax = tl.load(amax_ptr + at, mask=at < n, other=0.0)
    byte = e8m0_of_amax(magnitude_bits(amax), LARGEST, RCEIL)
    tl.store(byte_ptr + at, byte.to(tl.uint8), mask=at < n)
    tl.store(reciprocal_ptr + at, e8m0_reciprocal(byte), mask=at < n)


def floats() -> torch.Tensor:
    """Every sign, exponent and upper mantissa of float32, each with lower mantissas at and around ties."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] | lower).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def test_elements_equal_torch_on_every_binade(device: str) -> None:
    x = floats()
    x = x[~x.isnan()]
    fours, eights = (torch.empty(x.shape, dtype=torch.uint8, device=device) for _ in range(2))
    encode_kernel[(triton.cdiv(x.numel(), BLOCK),)](x.to(device), fours, eights, x.numel(), BLOCK=BLOCK)
    assert torch.equal(fours.cpu(), e2m1.encode(x))
    assert torch.equal(eights.cpu(), x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_what_is_no_number_saturates(device: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf")], device=device)
    fours, eights = (torch.empty(3, dtype=torch.uint8, device=device) for _ in range(2))
    encode_kernel[(1,)](x, fours, eights, 3, BLOCK=BLOCK)
    assert (fours.cpu() & 7).tolist() == [7, 7, 7] and (eights.cpu() & 0x7F).tolist() == [0x7E] * 3


def test_int8_rounds_ties_to_even(device: str) -> None:
    x = torch.arange(-127 * 4, 127 * 4 + 1) / 4
    x = torch.cat([x, torch.nextafter(x, torch.tensor(200.0)), torch.nextafter(x, torch.tensor(-200.0))])
    q = torch.empty(x.shape, dtype=torch.int8, device=device)
    int8_kernel[(1,)](x.to(device), q, x.numel(), BLOCK=BLOCK)
    assert torch.equal(q.cpu(), x.round().to(torch.int8))


def test_normal_e4m3_bytes_are_read_back(device: str) -> None:
    byte = torch.arange(8, 127, dtype=torch.uint8)
    value = torch.empty(byte.shape, device=device)
    e4m3_kernel[(1,)](byte.to(device), value, byte.numel(), BLOCK=BLOCK)
    assert torch.equal(value.cpu(), byte.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("rule", ["floor", "rceil"])
@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_e8m0_equals_torch_on_every_binade(largest: float, rule: e8m0.Rule, device: str) -> None:
    amax = floats()
    amax = amax[~torch.signbit(amax)]
    byte = torch.empty(amax.shape, dtype=torch.uint8, device=device)
    reciprocal = torch.empty(amax.shape, device=device)
    bits = int(torch.tensor(largest).view(torch.int32))
    e8m0_kernel[(triton.cdiv(amax.numel(), BLOCK),)](
        amax.to(device), byte, reciprocal, amax.numel(), LARGEST=bits, RCEIL=rule == "rceil", BLOCK=BLOCK
    )
    expected = e8m0.encode(amax, largest, rule)
    assert torch.equal(byte.cpu(), expected)
    assert torch.equal(reciprocal.cpu(), e8m0.reciprocal(expected))
