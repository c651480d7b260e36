"""MXFP8 and MXFP4 against torchao and modelopt, bit for bit but for what is documented to differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.kernels.formats import (
    dequantize_mxfp4,
    dequantize_mxfp8,
    e2m1,
    quantize_mxfp4,
    quantize_mxfp8,
    sqnr,
)

QUANTIZE = {"mxfp4": quantize_mxfp4, "mxfp8": quantize_mxfp8}
DEQUANTIZE = {"mxfp4": dequantize_mxfp4, "mxfp8": dequantize_mxfp8}
LARGEST = {"mxfp4": 6.0, "mxfp8": 448.0}
every_case = pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name in QUANTIZE for rule in ("floor", "rceil")]
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raw(part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().view(torch.uint8)


def torchao_parts(x: torch.Tensor, name: str, rule: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """``q`` and scale bytes of torchao, and what it reads them as."""
    pytest.importorskip("torchao", minversion="0.18")
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    mode = {"floor": module.ScaleCalculationMode.FLOOR, "rceil": module.ScaleCalculationMode.RCEIL}[rule]
    element = torch.float4_e2m1fn_x2 if name == "mxfp4" else torch.float8_e4m3fn
    theirs = module.MXTensor.to_mx(x, element, 32, mode)
    return [theirs.qdata, raw(theirs.scale)], theirs.dequantize(torch.float32)


def agree(x: torch.Tensor, name: str, rule: str, theirs: list[torch.Tensor]) -> torch.Tensor:
    """Which blocks must have torchao's bits.

    Not those whose scale byte is 0 though they are no zeros: torchao does not scale them. Nor, under rceil, those
    whose ``amax / largest`` lies within 2**-15 above a power of two: torchao's float32 logarithm rounds that to an
    integer.
    """
    blocks = torch.unflatten(x.float(), -1, (-1, 32)).abs().amax(-1)
    mantissa = torch.frexp(blocks / LARGEST[name]).mantissa
    exact = torch.ones_like(mantissa, dtype=torch.bool) if rule == "floor" else (mantissa == 0.5) | (mantissa > 0.50002)
    return (exact & (theirs[1] != 0)) | (blocks == 0)


def assert_bits(x: torch.Tensor, name: str, rule: Any) -> float:
    """Returns the part of the blocks that was compared."""
    ours = QUANTIZE[name](x, rule=rule)
    theirs, read = torchao_parts(x, name, rule)
    blocks = agree(x, name, rule, theirs)
    assert torch.equal(ours[1][blocks], theirs[1][blocks])
    for our, their in zip(ours[:1], theirs[:1], strict=True):
        per_block = [torch.unflatten(raw(q), -1, (ours[1].shape[-1], -1))[blocks] for q in (our, their)]
        assert torch.equal(*per_block)
    values = torch.unflatten(DEQUANTIZE[name](ours), -1, (-1, 32))[blocks]
    assert torch.equal(values, torch.unflatten(read, -1, (-1, 32))[blocks])
    return float(blocks.float().mean())


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_torchao_s(adversarial: Mapping[str, torch.Tensor], name: str, rule: str, dtype: torch.dtype) -> None:
    for x in adversarial.values():
        assert assert_bits(x.to(dtype), name, rule) > 0.5


@settings(max_examples=150, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    blocks=st.integers(1, 7),
    exponent=st.integers(-100, 90),
    seed=st.integers(0, 2**20),
    name=st.sampled_from(["mxfp4", "mxfp8"]),
    rule=st.sampled_from(["floor", "rceil"]),
)
def test_bits_agree_on_any_shape(lead: list[int], blocks: int, exponent: int, seed: int, name: str, rule: str) -> None:
    sized = normal(*lead, blocks, 32, seed=seed) * normal(*lead, blocks, 1, seed=seed + 1).mul(4).exp()
    assert_bits((sized.flatten(-2).double() * 2.0**exponent).float(), name, rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_values_are_modelopt_s(adversarial: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """modelopt rounds ties down, E2M1 to the even code: where no value lies on a tie, the codes are the same."""
    pytest.importorskip("modelopt", minversion="0.47")
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.mxfp4_tensor").MXFP4QTensor
    for x in adversarial.values():
        x = x.to(dtype)
        theirs, scale = module.quantize(x, 32)
        q, ours = quantize_mxfp4(x)
        blocks = agree(x, "mxfp4", "rceil", [q, scale.reshape(ours.shape)])
        assert torch.equal(ours[blocks], scale.reshape(ours.shape)[blocks])
        scaled = torch.unflatten(x.float(), -1, (-1, 32)) / 2.0 ** (ours.float() - 127).unsqueeze(-1)
        tie = (scaled.abs().unsqueeze(-1) == torch.tensor([0.75, 1.75, 3.5])).any(-1)
        compared = blocks.unsqueeze(-1) & ~tie & (scaled != 0)
        assert float(compared.float().mean()) > 0.01
        codes = [torch.unflatten(e2m1.unpack(c), -1, (-1, 32))[compared] for c in (q, theirs._quantized_data)]
        assert torch.equal(*codes)


@every_case
def test_every_scale_byte_that_a_number_can_have(name: str, rule: Any) -> None:
    """One block for each binade: the byte, and each value within half a step of the block."""
    largest, quantize, dequantize = LARGEST[name], QUANTIZE[name], DEQUANTIZE[name]
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64)
    x = (ramp * 1.25 * 2.0 ** torch.arange(-149, 128).double().unsqueeze(1)).float()
    q, scale = quantize(x, rule=rule)
    emax = 2 if name == "mxfp4" else 8
    assert scale.flatten().tolist() == [max(0, e - emax + 127) for e in range(-149, 128)]  # 1.25 is below 1.5, 1.75
    y = dequantize([q, scale]).double()
    step = 2.0 ** (scale.double() - 127) * (2.0 if name == "mxfp4" else 32.0)
    assert bool(((y - x.double()).abs() <= step / 2).all())
    # every byte but NaN reads as its power of two
    every = torch.arange(255, dtype=torch.uint8).unsqueeze(1)
    ones = torch.full((255, 16), 0x22, dtype=torch.uint8) if name == "mxfp4" else torch.ones(255, 32).to(q.dtype)
    assert torch.equal(dequantize([ones, every]).double(), (2.0 ** (every.double() - 127)).expand(255, 32))
    assert largest * 2.0 ** (float(scale.max()) - 127) < 2.0**128


@every_case
def test_values_beyond_the_largest_element_saturate(name: str, rule: Any) -> None:
    largest = LARGEST[name]
    x = torch.zeros(1, 32)
    x[0, 0] = largest * 1.1  # the same exponent as the largest element's, a larger mantissa
    y = DEQUANTIZE[name](QUANTIZE[name](x, rule=rule))
    if rule == "floor":
        assert float(y[0, 0]) == largest
    else:
        assert abs(float(y[0, 0]) / float(x[0, 0]) - 1) < 0.03 + 0.1 * (name == "mxfp4")


def test_small_blocks_keep_their_values() -> None:
    x = torch.full((1, 32), 3 * 2.0**-128)
    for name in ("mxfp4", "mxfp8"):
        assert torch.equal(DEQUANTIZE[name](QUANTIZE[name](x)), x)


@pytest.mark.parametrize("seed", range(3))
def test_sqnr_on_gaussian_data(seed: int) -> None:
    """The tensors' own, and those of a linear layer with both operands quantised."""
    x, w = normal(128, 1024, seed=seed), normal(96, 1024, seed=seed + 100)
    for name, floor, linear in (("mxfp8", 30.0, 25.0), ("mxfp4", 18.0, 12.0)):
        for rule in ("floor", "rceil"):
            x_, w_ = (DEQUANTIZE[name](QUANTIZE[name](t, rule=rule)) for t in (x, w))  # type: ignore[arg-type]
            assert floor < sqnr(x, x_) < floor + 4
            assert sqnr(x @ w.t(), x_ @ w_.t()) > linear + 2
